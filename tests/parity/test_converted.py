"""Whose weights a checkpoint has: told by its manifest, or an error that says the next step."""

from __future__ import annotations

import json

import pytest

from parity.converted import CheckError, read_manifest, require_same_weights

SOURCE = {"file": "a.pkl", "sha256": "0" * 64}


def test_a_manifest_is_read(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"source": SOURCE, "tensors": []}))
    assert read_manifest(tmp_path) == {"source": SOURCE, "tensors": []}


@pytest.mark.parametrize("content", ["", "[]", "[[]]", "{}", '{"source": 3}'])
def test_what_is_no_manifest_is_refused(tmp_path, content):
    with pytest.raises(CheckError, match=r"has no manifest\.json, .* expected a directory from 'convert'"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(CheckError, match=r"cannot be read .* convert the checkpoint again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("file", [{}, {"file": "a.pkl"}, {"file": "a.pkl", "sha256": "1" * 64}])
def test_other_weights_are_refused(file):
    require_same_weights("ckpt", SOURCE, "'trace' was recorded from", SOURCE | {"file": "elsewhere.pkl"})
    with pytest.raises(CheckError) as raised:
        require_same_weights("ckpt", SOURCE, "'trace' was recorded from", file)
    assert str(raised.value).splitlines()[:2] == [
        f"other weights: 'ckpt' was converted from a.pkl (SHA-256 {'0' * 64}),",
        f"  but 'trace' was recorded from {file.get('file')} (SHA-256 {file.get('sha256')})",
    ]
