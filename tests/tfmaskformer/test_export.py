"""Exports are what the package computes: reloaded where it cannot be imported, folded, through Keras, and refused where they must be."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from checkpoints import registry, synthesize
from converters.convert import convert
from tfmaskformer import destination, export, swin
from tfmaskformer.checkpoint import load
from tfmaskformer.data import shapes
from tfmaskformer.data.preprocessing import decode_image, resize_shortest_edge
from tfmaskformer.folding import FoldingError, fold, relative_error
from tfmaskformer.inference import panoptic_inference, semantic_inference

SOURCE = Path(registry.__file__).parent / "small" / "shapes_panoptic.pkl"
OUTPUTS = ("pred_logits", "pred_masks")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints: ``shapes``, as trained; ``resized``, whose config resizes images. ``earlier`` looks like an export."""
    folder = tmp_path_factory.mktemp("export")
    convert(SOURCE, folder / "shapes", "shapes_panoptic")
    convert(SOURCE, folder / "resized", "shapes_panoptic")
    config = json.loads((folder / "resized" / "config.json").read_text())
    config["test"] |= {"min_size": 112, "max_size": 128}  # image 0 meets the one, image 3 the other
    (folder / "resized" / "config.json").write_text(json.dumps(config))
    (folder / "earlier").mkdir()
    (folder / "earlier" / export.MANIFEST).write_text(json.dumps({"format": export.FORMAT, "version": export.VERSION}))
    return folder


@pytest.fixture(scope="module")
def served(folder):
    """Beside them, SavedModels: ``any`` of resized, ``fixed`` of shapes."""
    export.export(folder / "resized", folder / "any")
    export.export(folder / "shapes", folder / "fixed", size=(160, 160))
    return folder


def photograph(index, kind):
    """Of JPEG files, lying on its side."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(shapes.sample("val", index).image)
    image.transpose(Image.Transpose.ROTATE_90).save(file, format=kind, exif=exif) if kind == "jpeg" else image.save(file, format=kind)
    return file.getvalue()


SERVE = """
import sys
sys.modules.update(dict.fromkeys(("tfmaskformer", "converters", "parity", "checkpoints", "keras", "PIL")))
import numpy as np, tensorflow as tf
exports, paths = sys.argv[2:4], sys.argv[4:]
found = {}
for export in exports:
    model = tf.saved_model.load(export)
    for path in paths:
        data = tf.constant(open(path, "rb").read())
        for name in ("panoptic", "semantic"):
            for key, value in model.signatures[name](image_bytes=data).items():
                found[f"{export} {path} {key}"] = value.numpy()
np.savez(sys.argv[1], **found)
"""


def test_serves_files_where_the_package_is_not(served, tmp_path):
    sources = {str(served / "any"): "resized", str(served / "fixed"): "shapes"}
    paths = [tmp_path / f"{index}.{kind}" for index, kind in ((0, "png"), (3, "jpeg"))]
    for path in paths:
        path.write_bytes(photograph(int(path.stem), path.suffix[1:]))
    command = [sys.executable, "-c", SERVE, str(tmp_path / "found.npz"), *sources, *map(str, paths)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / "found.npz") as found:
        for export_, source in sources.items():
            model = load(served / source)
            test = model.config.test
            for path in paths:
                image = decode_image(path.read_bytes())
                resized = resize_shortest_edge(image, test.min_size, test.max_size)
                sizes = [resized.shape[:2]], [image.shape[:2]]
                outputs = model(resized[np.newaxis])
                [(ids, segments)] = panoptic_inference(outputs, model.config, *sizes)
                [scores] = semantic_inference(outputs, model.config, *sizes)
                assert segments
                np.testing.assert_array_equal(found[f"{export_} {path} panoptic_seg"], ids)
                np.testing.assert_array_equal(found[f"{export_} {path} sem_seg"], scores.numpy().argmax(0))
                for key in ("id", "category_id", "isthing"):
                    assert found[f"{export_} {path} {key}"].tolist() == [segment[key] for segment in segments]
                assert (found[f"{export_} {path} score"] > 0.8).all()


def test_logits_are_the_models_at_any_size_and_in_any_canvas(served):
    images = [shapes.sample("val", index).image for index in (2, 3)]
    sizes = [image.shape[:2] for image in images]
    batch = np.zeros((2, *np.max(sizes, axis=0), 3), np.uint8)
    for index, image in enumerate(images):
        batch[index, : sizes[index][0], : sizes[index][1]] = image
    model = load(served / "shapes")
    for name in ("any", "fixed"):
        found = export.Exported(served / name)(batch, np.array(sizes))
        for index, image in enumerate(images):
            expected = model(image[np.newaxis])
            rows, columns = (-(-side // 4) for side in sizes[index])
            masks = found["pred_masks"][index, :, :rows, :columns]
            assert relative_error(masks.numpy(), expected["pred_masks"][0].numpy()) < 2e-6
            assert relative_error(found["pred_logits"][index].numpy(), expected["pred_logits"][0].numpy()) < 2e-6


def test_what_cannot_be_segmented_is_told(served):
    import tensorflow as tf

    model = tf.saved_model.load(str(served / "fixed"))
    large = io.BytesIO()
    Image.new("RGB", (200, 20)).save(large, format="PNG")
    for data, message in (
        (b"no image", "neither a JPEG nor a PNG file"),
        (photograph(0, "png")[:200], "PNG"),
        (photograph(0, "jpeg")[:10], "JPEG"),
        (large.getvalue(), "canvas is"),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            model.signatures["panoptic"](image_bytes=tf.constant(data))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        synthesize.write_pickle(synthesize.synthesize(registry.entry(name)), folder / "model.pkl")
        return convert(folder / "model.pkl", folder / "ckpt", name).destination

    return make


def test_folding_is_exact_but_for_rounding(converted, tmp_path):
    path = converted("tiny_deeplab")
    manifest = export.export(path, tmp_path / "out", "keras", fold_batch_norm=True)
    told = manifest["export"]["fold_batch_norm"]
    exact, rounded = told["float64"], told["float32"]
    assert 0 < exact["worst_tap"]["error"] < 1e-12
    assert exact["unfolded"]["worst_tap"]["error"] == 0
    assert exact["unfolded"]["worst_tap"]["name"].startswith("backbone."), "not the image, which is the same in both"
    assert 1e-9 < rounded["worst_tap"]["error"] < 2 * rounded["unfolded"]["worst_tap"]["error"]
    assert set(rounded["outputs"]) == set(OUTPUTS)

    model, folded = load(path, "float64"), fold(load(path, "float64"))
    norms = sum(name.endswith("running_var") for name in (variable.path.rpartition("/")[2] for variable in model.variables))
    assert len(model.variables) - len(folded.variables) == 3 * norms > 0
    image = shapes.sample("val", 0).image[np.newaxis]
    assert relative_error(export.Exported(tmp_path / "out")(image)["pred_masks"].numpy(), model(image)["pred_masks"].numpy()) < 1e-4


def test_keras_reads_it_in_a_new_process(folder, tmp_path):
    export.export(folder / "shapes", tmp_path / "out", "keras")
    image = shapes.sample("val", 5).image
    np.save(tmp_path / "image.npy", image)
    code = (
        "import sys, numpy, keras, tfmaskformer.model; model = keras.models.load_model(sys.argv[1]);"
        "numpy.save(sys.argv[3], model(numpy.load(sys.argv[2])[None])['pred_masks'])"
    )
    command = [sys.executable, "-c", code, tmp_path / "out" / "model.keras", tmp_path / "image.npy", tmp_path / "masks.npy"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = load(folder / "shapes")(image[np.newaxis])["pred_masks"].numpy()
    np.testing.assert_array_equal(np.load(tmp_path / "masks.npy"), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "onnx"], "invalid choice: 'onnx'"),
        (["--size", "0", "64"], "--size takes positive numbers"),
        (["--format", "litert"], "give --size HEIGHT WIDTH"),
        (["--format", "keras", "--size", "64", "64"], "leave --size out"),
        (["--dtype", "int8"], "--dtype int8 is not for saved_model"),
        (["--ckpt", "{tmp}"], "cannot read config.json"),
        (["--dst", "{tmp}/none/out"], "does not exist"),
        (["--dst", "{tmp}/file/out"], "does not exist"),
        (["--dst", "{tmp}/file", "--force"], "exists and is no export"),
        (["--dst", "{folder}/shapes", "--force"], "exists and is no export"),
        (["--dst", "{folder}/earlier"], "add --force to replace it"),
        (["--dst", "/proc/out"], "choose another --dst"),
        (["--dst", "/", "--force"], "'/' exists and is no export"),
    ],
)
def test_bad_usage(folder, tmp_path, capsys, options, message):
    (tmp_path / "file").touch()
    given = [option.format(tmp=tmp_path, folder=folder) for option in options]
    try:
        code = export.main(["--ckpt", str(folder / "shapes"), "--dst", str(tmp_path / "out"), *given])
    except SystemExit as exited:
        code = exited.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert not list(folder.glob(".*"))


def test_a_trained_checkpoint_has_no_source(folder, tmp_path):
    """What 'tfmaskformer train' writes has no manifest; here it is named as a file system of TensorFlow names it."""
    shutil.copytree(folder / "shapes", tmp_path / "trained", ignore=shutil.ignore_patterns("manifest.json"))
    manifest = export.export(f"file://{tmp_path}/trained", tmp_path / "out", "keras")
    assert manifest["source"] is None
    assert manifest["config"]["name"] == "shapes_panoptic"
    assert export.export(f"file://{folder}/shapes", tmp_path / "other", "keras")["source"]["sha256"]


@pytest.mark.parametrize("text", ["{}", "[1]", "{", '{"source": 1}'])
def test_a_damaged_manifest_is_told_before_the_weights_are_read(tmp_path, capsys, text):
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "manifest.json").write_text(text)
    assert export.main(["--ckpt", str(tmp_path / "ckpt"), "--dst", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert str(tmp_path / "ckpt" / "manifest.json") in told
    assert "convert the source again" in told


def test_out_of_memory_is_told(folder, tmp_path, monkeypatch, capsys):
    def load(*arguments):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    monkeypatch.setattr("tfmaskformer.checkpoint.load", load)
    tf.config.experimental.enable_tensor_float_32_execution(True)
    assert export.main(["--ckpt", str(folder / "shapes"), "--dst", str(tmp_path / "out")]) == 3
    assert not tf.config.experimental.tensor_float_32_execution_enabled()
    assert "out of memory; nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (tf.errors.ResourceExhaustedError(None, None, "part-0; No space left on device"), 2, "No space left on device\n  free space on"),
        (tf.errors.ResourceExhaustedError(None, None, "part-0; Disk quota exceeded"), 2, "Disk quota exceeded\n  free space within"),
        (tf.errors.PermissionDeniedError(None, None, "part-0; Permission denied"), 2, "Permission denied\n  choose another --dst"),
        (tf.errors.UnknownError(None, None, "no such thing"), 2, "TensorFlow says: no such thing\n  choose another --dst"),
        (tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor"), 3, "out of memory; nothing was written"),
    ],
)
def test_what_cannot_be_saved_is_told(error, code, told, folder, tmp_path, monkeypatch, capsys):
    def save(*arguments):
        raise error

    monkeypatch.setattr(tf.saved_model, "save", save)
    monkeypatch.setattr(export, "_serving", lambda *arguments: (None, {"logits": None}))
    assert export.main(["--ckpt", str(folder / "shapes"), "--dst", str(tmp_path / "out")]) == code
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_limit_on_files_is_told(folder, tmp_path, capsys):
    """What the system really says to TensorFlow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert export.main(["--ckpt", str(folder / "shapes"), "--dst", str(tmp_path / "out")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large\n  raise the limit on file sizes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_is_told(folder, tmp_path):
    with pytest.raises(export.ExportError, match=r"no format 'onnx'\n  expected one of saved_model, keras, litert"):
        export.export(folder / "shapes", tmp_path / "out", "onnx")


def test_a_replacement_is_one_step_and_on_the_disk(folder, tmp_path, monkeypatch):
    """Names are exchanged after all files, and the folder that has the name after it."""
    steps = []
    exchange, sync = destination.exchange, destination.sync

    def told(what, function):
        def call(*paths):
            steps.append((what, paths[0].name))
            return function(*paths)

        return call

    export.export(folder / "shapes", tmp_path / "out", "keras")
    monkeypatch.setattr(destination, "exchange", told("exchange", exchange))
    monkeypatch.setattr(destination, "sync", told("sync", sync))
    export.export(folder / "shapes", tmp_path / "out", "keras", force=True)
    names = [name for _, name in steps]
    assert [what for what, _ in steps] == ["sync", "sync", "sync", "exchange", "sync"]
    assert set(names[:2]) == {export.KERAS_FILE, export.MANIFEST}
    assert names[2] == names[3]
    assert names[2].startswith(".out.exporting-")
    assert names[4] == tmp_path.name
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def changed_manifest(**changes):
    def change(directory):
        manifest = json.loads((directory / export.MANIFEST).read_text())
        (directory / export.MANIFEST).write_text(json.dumps({key: value for key, value in (manifest | changes).items() if value}))

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda directory: (directory / "saved_model.pb").unlink(),
        lambda directory: os.truncate(directory / "saved_model.pb", 1000),
        lambda directory: os.truncate(next((directory / "variables").glob("*.data*")), 1000),
        changed_manifest(config=None),
        changed_manifest(config={"head": 1}),
        changed_manifest(export=[1]),
        changed_manifest(export={"format": "onnx", "dtype": "float32", "size": None}),
        changed_manifest(export={"format": "keras", "dtype": "float32", "size": None}),
    ],
    ids=["no graph", "cut graph", "cut variables", "no config", "bad config", "not how", "unknown format", "no file"],
)
def test_a_damaged_export_is_told(served, tmp_path, damage):
    shutil.copytree(served / "fixed", tmp_path / "damaged")
    damage(tmp_path / "damaged")
    with pytest.raises(export.ExportError, match=r"cannot load '.*damaged': .*\n.*export the checkpoint again"):
        export.Exported(tmp_path / "damaged")


def test_image_sizes_are_checked(served):
    logits = tf.saved_model.load(str(served / "fixed")).signatures["logits"]
    images = tf.zeros([1, 160, 160, 3], tf.uint8)
    for size in ([200, 200], [0, 0], [160, 161], [-1, 5]):
        with pytest.raises(tf.errors.InvalidArgumentError, match="image_sizes are"):
            logits(images=images, image_sizes=tf.constant([size]))
    logits(images=images, image_sizes=tf.constant([[160, 1]]))
    with pytest.raises(export.ExportError, match=r"170×20 px, the canvas of '.*fixed' 160×160\n  export it with a larger --size"):
        export.Exported(served / "fixed")(np.zeros((1, 170, 20, 3), np.uint8))


def test_a_link_is_followed(folder, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        export.export(folder / "shapes", tmp_path / "link", "keras", force=True)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real" / export.MANIFEST).exists()
        assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


def test_nothing_to_fold(converted, tmp_path):
    path = converted("tiny_swin")
    with pytest.raises(export.ExportError, match="no frozen batch norm to fold"):
        export.export(path, tmp_path / "out", fold_batch_norm=True)
    with pytest.raises(FoldingError):
        fold(load(path))
    assert not list(tmp_path.iterdir())


def test_force_replaces_and_a_killed_run_leaves_nothing_half_written(folder, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tfmaskformer.export", "--ckpt", str(folder / "shapes"), "--dst", str(out), "--format", "keras"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        for _ in range(3000):
            if list(tmp_path.glob(".out.exporting-*")):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    assert list(tmp_path.glob(".out.exporting-*"))
    export.export(folder / "shapes", out, "keras")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(export.ExportError, match="add --force"):
        export.export(folder / "shapes", out, "keras", dtype="float64")
    export.export(folder / "shapes", out, "keras", dtype="float64", force=True)
    assert export.Exported(out).dtype == "float64"
    # Killed between the two renames of a replacement: the old one comes back.
    out.rename(tmp_path / ".out.replaced-1")
    with pytest.raises(export.ExportError, match="add --force"):
        export.export(folder / "shapes", out, "keras")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_computed_in_bfloat16_is_told_in_float32(folder, tmp_path):
    export.export(folder / "shapes", tmp_path / "out", dtype="bfloat16")
    image = shapes.sample("val", 4).image[np.newaxis]
    found, expected = export.Exported(tmp_path / "out")(image), load(folder / "shapes")(image)
    for name in OUTPUTS:
        assert found[name].dtype == np.float32
        assert 1e-4 < relative_error(found[name].numpy(), expected[name].numpy()) < 0.1


@pytest.mark.skipif(importlib.util.find_spec("ai_edge_litert") is None, reason="needs the extra 'litert'")
def test_litert_with_int8_weights(folder, tmp_path):  # in float32: tests/parity/test_export.py
    export.export(folder / "shapes", tmp_path / "out", "litert", dtype="int8", size=(160, 160))
    image = shapes.sample("val", 4).image
    images = np.stack([image, image[::-1]])
    found, expected = export.Exported(tmp_path / "out")(images), load(folder / "shapes")(images)
    rows, columns = expected["pred_masks"].shape[2:]
    for own, exact in zip(found["pred_masks"], expected["pred_masks"], strict=True):
        assert 1e-3 < relative_error(own[:, :rows, :columns].numpy(), exact.numpy()) < 0.3


def test_an_operation_that_litert_lacks_is_named(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(swin.Gelu, "call", lambda self, inputs: tf.math.digamma(inputs))
    with pytest.raises(export.ExportError, match=r"no operation for Digamma in 'backbone\.layers\.0\.blocks\.0\.mlp\.act' and 7 more"):
        export.export(converted("tiny_swin"), tmp_path / "out", "litert", size=(96, 96))
    assert not os.listdir(tmp_path)
