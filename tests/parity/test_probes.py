"""The self-test of the environment: right here, and not blind."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from parity import probes


def test_what_the_model_uses_is_right_here():
    environment = probes.examine()
    assert environment.broken == ()
    assert len([probe for probe in environment.probes if probe.used]) >= 8
    assert set(environment.versions) == {"python", "tensorflow", "keras", "numpy"}
    assert "unknown" not in environment.versions.values()


def test_a_broken_operation_is_found(monkeypatch):
    right = tf.nn.softmax
    monkeypatch.setattr(tf.nn, "softmax", lambda x: right(x) * 1.001)
    errors = {name: probes.relative_error(*pair()) for name, pair in probes._probes()}
    assert [name for name, error in errors.items() if not probes.Probe(name, True, error).passed] == ["tf.nn.softmax"]


def test_only_what_is_used_breaks_the_environment():
    probe = {used: probes.Probe("op", used, 0.8) for used in (True, False)}
    common = {"versions": {}, "cpu": "", "onednn": "default", "threads": {}}
    assert probes.Environment(**common, probes=(probe[True],)).broken == (probe[True],)
    avoided = probes.Environment(**common, probes=(probe[False],))
    assert avoided.broken == ()
    assert avoided.notes == ("op is broken here (error 8.0e-01); the model never calls it",)


@pytest.mark.parametrize(
    ("code", "error"),
    [("print(0.25)", 0.25), ("import os; os.abort()", math.inf), ("print(0.75, flush=True); import os; os.abort()", 0.75), ("", math.inf)],
)
def test_a_probe_that_crashes_its_process_has_a_result(code, error):
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert probes._printed(process) == error


def test_the_oracle_convolves_as_defined():
    random = np.random.default_rng(0)
    images, kernel = random.standard_normal((1, 5, 7, 2)), random.standard_normal((3, 3, 2, 4))
    found = probes._convolve(2, 1)(images, kernel)
    assert found.shape == (1, 3, 4, 4)
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)])
    assert found[0, 1, 2, 3] == pytest.approx((padded[0, 2:5, 4:7] * kernel[..., 3]).sum())
