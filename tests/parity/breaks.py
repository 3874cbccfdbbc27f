"""How the tests break the port: a break changes the loaded model, or a function that it calls, and the check runs on that."""

from __future__ import annotations

import json

import tfmaskformer.checkpoint
from parity import cli
from tfmaskformer.module import named_variables

RIGHT_LOAD = tfmaskformer.checkpoint.load


def replace(owner, name, make):
    """``owner.name`` becomes ``make(what it was)``."""
    return lambda model, monkeypatch: monkeypatch.setattr(owner, name, make(getattr(owner, name)))


def weight(name, change):
    """The variable becomes ``change(its value)``."""

    def apply(model, monkeypatch):
        variable = named_variables(model)[name]
        variable.assign(change(variable.numpy()))

    return apply


def run_broken(broken, checkpoint, trace, monkeypatch, capsys, *options):
    """Exit code and JSON of an eager check of the broken model."""

    def load(*arguments, **keywords):
        model = RIGHT_LOAD(*arguments, **keywords)
        broken(model, monkeypatch)
        return model

    monkeypatch.setattr(tfmaskformer.checkpoint, "load", load)
    arguments = ["--ckpt", str(checkpoint), "--reference", str(trace), "--mode", "eager", "--json", "-", *options]
    code = cli.main(arguments)
    return code, json.loads(capsys.readouterr().out)
