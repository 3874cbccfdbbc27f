"""``tfmaskformer data check`` and ``tfmaskformer data tfrecords``: results, exit codes, and what a user is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import tensorflow as tf

from tfmaskformer.data import cli, generated
from tfmaskformer.data.layouts import LAYOUTS

DATASET = ["--dataset", "coco_panoptic"]


@pytest.fixture
def coco(tmp_path):
    generated.write("coco_panoptic", tmp_path / "data", "val", 4)
    return tmp_path / "data"


def test_clean(coco, capsys):
    for arguments in ([], ["--fast"]):
        assert cli.main(["check", *DATASET, "--data", str(coco), *arguments]) == cli.OK
        out, err = capsys.readouterr()
        assert out.splitlines()[0] == f"coco_panoptic val in {coco}/coco"
        assert [line.split()[-1] for line in out.splitlines()[1:]] == ["4", "4"]
        assert err == ""


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_clean(name, tmp_path, capsys):
    generated.write(name, tmp_path, "train", 2)
    assert cli.main(["check", "--dataset", name, "--data", str(tmp_path), "--split", "train"]) == cli.OK, capsys.readouterr().err


def test_problems(coco, tmp_path, capsys):
    image = coco / "coco" / "val2017" / "000000000997.jpg"
    image.write_bytes(image.read_bytes()[:-500])
    (coco / "coco" / "panoptic_val2017" / "000000000994.png").unlink()
    change = coco / "coco" / "annotations" / "panoptic_val2017.json"
    content = json.loads(change.read_text())
    content["annotations"][3]["segments_info"][0]["category_id"] = 12
    change.write_text(json.dumps(content))

    file = tmp_path / "result.json"
    assert cli.main(["check", *DATASET, "--data", str(coco), "--json", str(file)]) == cli.PROBLEMS
    out, err = capsys.readouterr()
    result = json.loads(file.read_text())
    assert (result["images"], result["sound"]) == (3, 1)
    assert result["counts"] == {"unknown category": 1, "corrupt image": 1, "missing file": 1}
    assert [problem["kind"] for problem in result["problems"]] == list(result["counts"])
    assert f"{image}: corrupt image\n  expected a whole image, got" in err
    assert "annotation 3 (000000000991.png): unknown category\n  expected an id of coco_panoptic's table, got 12 of segment" in err
    assert "unknown category" in out

    assert cli.main(["check", *DATASET, "--data", str(coco), "--fast", "--json", "-"]) == cli.PROBLEMS
    out, _ = capsys.readouterr()
    assert json.loads(out)["counts"] == {"unknown category": 1, "missing file": 1}
    assert json.loads(out)["sound"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", *DATASET, "--data", "nowhere"], "missing file"),
        (["check", *DATASET, "--data", "nowhere", "--split", "test"], "unknown split"),
        (["check", *DATASET, "--data", ".", "--json", "no/such/folder.json"], "there is no folder"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert cli.main(arguments) == cli.BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_a_folder_that_cannot_be_read(coco, monkeypatch, capsys):
    """Listed are the folders of the images when the JSON has been read."""
    listdir = tf.io.gfile.listdir

    def refused(folder):
        if "val2017" in folder:
            raise tf.errors.PermissionDeniedError(None, None, f"{folder}; Permission denied")
        return listdir(folder)

    monkeypatch.setattr(tf.io.gfile, "listdir", refused)
    assert cli.main(["check", *DATASET, "--data", str(coco), "--fast"]) == cli.BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert "val2017: unreadable folder\n  expected a folder, got " in err
    assert "Permission denied" in err


@pytest.mark.parametrize(
    "arguments",
    [[], ["check"], ["check", "--dataset", "coco", "--data", "."], ["tfrecords", *DATASET, "--data", ".", "--out", "o", "--shards", "0"]],
)
def test_usage(arguments):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == cli.BAD_INPUT


def test_tfrecords(coco, tmp_path, capsys):
    command = ["tfrecords", *DATASET, "--data", str(coco), "--out", str(tmp_path / "out"), "--shards", "2", "--processes", "1"]
    assert cli.main(command) == cli.OK
    out, _ = capsys.readouterr()
    assert [line.split()[:-1] for line in out.splitlines()[1:]] == [["shards"], ["images"], ["problems", "skipped"], ["MB"]]
    assert cli.main([*command, "--json", "-"]) == cli.OK  # again: nothing to do
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert cli.main([*command, "--deeplab2"]) == cli.BAD_INPUT
    assert "another build" in capsys.readouterr().err


def test_tfrecords_of_bad_data(coco, tmp_path, capsys):
    image = coco / "coco" / "val2017" / "000000000997.jpg"
    image.write_bytes(b"")
    command = ["tfrecords", *DATASET, "--data", str(coco), "--out", str(tmp_path / "out"), "--processes", "1"]
    assert cli.main(command) == cli.PROBLEMS
    assert f"error: {image}: corrupt image" in capsys.readouterr().err
    assert cli.main([*command, "--on-error", "skip"]) == cli.OK
    out, err = capsys.readouterr()
    assert err == f"skipped: {image}: corrupt image\n"
    assert ["images", "3"] in [line.split() for line in out.splitlines()]


def test_tfrecords_that_cannot_be_written(coco, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert (
        cli.main(["tfrecords", *DATASET, "--data", str(coco), "--out", str(tmp_path / "file" / "out"), "--processes", "1"])
        == cli.COULD_NOT_RUN
    )
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_on_a_full_disk_the_result_is_printed(coco, tmp_path, capsys):
    for command in (["check"], ["tfrecords", "--out", str(tmp_path / "out"), "--processes", "1"]):
        assert cli.main([*command, *DATASET, "--data", str(coco), "--json", "/dev/full"]) == cli.COULD_NOT_RUN
        out, err = capsys.readouterr()
        assert ["images", "4"] in [line.split() for line in out.splitlines()]
        assert "cannot write '/dev/full': No space left on device" in err


def test_progress(monkeypatch, capsys):
    now = iter(range(0, 1000, 40))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    progress = cli.Progress()
    for done in (10, 20, 30):
        progress(done, 110)
    progress.end()
    assert capsys.readouterr().err.splitlines() == [
        "20 of 110 images, 0.2 images/s, 0:06:00 left",
        "30 of 110 images, 0.2 images/s, 0:05:20 left",
    ]


def test_help_needs_no_tensorflow():
    code = "import sys; sys.modules['tensorflow'] = None\nfrom tfmaskformer.data.cli import main\nmain(sys.argv[1:])"
    for command in ([], ["check"], ["tfrecords"]):
        arguments = [sys.executable, "-c", code, *command, "--help"]
        result = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"COLUMNS": "100"})
        assert result.returncode == 0, result.stderr
        assert "usage: tfmaskformer data" in result.stdout
