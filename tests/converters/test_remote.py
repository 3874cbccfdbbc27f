"""Sources that are downloaded: a URL, a zoo entry. The mechanism has its own tests (tests/checkpoints/test_fetch.py)."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import tensorflow as tf

from checkpoints import fetch, registry, synthesize
from converters import cli, remote
from converters.convert import convert
from converters.inspection import inspect
from tests.checkpoints.http_server import Answer, serve


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("TFMASKFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "_BACKOFF_S", 0.0)
    with serve() as running:
        running.answers = [Answer(synthesize.pickle_bytes(synthesize.synthesize(registry.entry("tiny_deeplab"))))]
        yield running


def test_a_url_is_downloaded_once(server, tmp_path):
    url = f"{server.url}/zoo/model_final.pkl"
    convert(url, tmp_path / "a", "tiny_deeplab")
    assert inspect(url, "tiny_deeplab").model == "tiny_deeplab"
    assert len(server.requests) == 1


def test_a_zoo_entry_is_downloaded_unless_a_file_is_called_so(server, tmp_path, monkeypatch):
    entry = dataclasses.replace(registry.entry("tiny_deeplab"), url=f"{server.url}/zoo/model_final_123456.pkl")
    monkeypatch.setattr(remote.registry, "entry", lambda name: {"tiny_deeplab": entry}[name])
    monkeypatch.chdir(tmp_path)
    steps = []
    convert("tiny_deeplab", "a", "tiny_deeplab", progress=lambda step, share: steps.append(step))
    assert steps[0] == "downloading"
    (tmp_path / "tiny_deeplab").write_bytes(b"mine")
    assert cli.main(["--src", "tiny_deeplab", "--dst", "b", "--config", "tiny_deeplab"]) == 2


def test_what_cannot_be_downloaded_is_told(server, tmp_path, capsys):
    server.answers = [Answer(b"<html>not here</html>", status=404)]
    assert cli.main(["--src", f"{server.url}/model.pkl", "--dst", str(tmp_path / "a")]) == 2
    assert "404" in capsys.readouterr().err
    server.answers = [Answer(bytes(1000), stop_after=10)]
    assert cli.main(["inspect", f"{server.url}/other.pkl"]) == 3
    assert "cannot download" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_no_room_for_a_copy_is_not_taken_for_an_unreadable_source(tmp_path, monkeypatch, capsys):
    tf.io.gfile.makedirs("ram://full")
    with tf.io.gfile.GFile("ram://full/model.pkl", "wb") as file:
        file.write(b"x" * 100)

    def full(source, destination, progress=None):
        raise tf.errors.ResourceExhaustedError(None, None, f"{destination}; No space left on device")

    monkeypatch.setattr(remote, "_copy", full)
    arguments = ["--src", "ram://full/model.pkl", "--dst", str(tmp_path / "a")]
    assert cli.main(arguments) == 2
    assert "cannot read 'ram://full/model.pkl'" in capsys.readouterr().err
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda folder: collections.namedtuple("Usage", "free")(4096))
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert "no room for a copy of 'ram://full/model.pkl'" in message
    assert "$TMPDIR" in message
    assert not list(tmp_path.iterdir())
