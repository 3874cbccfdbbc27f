"""Photographs in, overlays, ids and JSON out, on the small trained model."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from checkpoints import registry
from converters.convert import convert
from tfmaskformer import predict
from tfmaskformer.checkpoint import load
from tfmaskformer.config import MaskFormerConfig, TestConfig
from tfmaskformer.data import shapes
from tfmaskformer.evaluation.results import decode_png
from tfmaskformer.inference import panoptic_inference

SOURCE = Path(registry.__file__).parent / "small" / "shapes_panoptic.pkl"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(convert(SOURCE, tmp_path_factory.mktemp("predict") / "tf_ckpt", "shapes_panoptic").destination)


@pytest.fixture
def frames(tmp_path):
    folder = tmp_path / "video"
    (folder / "more").mkdir(parents=True)
    for index, name in enumerate(["frame2.png", "frame10.png", "more/frame1.PNG"]):
        Image.fromarray(shapes.sample("val", index).image).save(folder / name)
    (folder / "notes.txt").write_text("not a photograph")
    return folder


class Stub:
    """A model that finds nothing, fast; ``canvases`` are those it was traced for."""

    config = MaskFormerConfig(name="stub", num_classes=2, test=TestConfig(panoptic_on=True, min_size=0))

    def __init__(self):
        self.canvases = []

    def __call__(self, images, sizes, padding):
        assert padding == "masked"
        self.canvases.append(tuple(images.shape))
        masks = tf.zeros([1, 3, images.shape[1] // 4, images.shape[2] // 4])
        return {"pred_logits": tf.zeros([1, 3, 3]), "pred_masks": masks, "valid_sizes": sizes}


@pytest.fixture
def stub(monkeypatch):
    model = Stub()
    monkeypatch.setattr("tfmaskformer.checkpoint.load", lambda _: model)
    return model


def names(pairs):
    return [name.as_posix() for _, name in pairs]


def test_what_arguments_stand_for(frames):
    assert names(predict.photographs([str(frames)])) == ["frame2", "frame10", "more/frame1"]
    assert names(predict.photographs([str(frames / "frame*.png"), str(frames / "frame2.png")])) == ["frame2", "frame10"]
    assert names(predict.photographs([str(frames / "**" / "*.PNG")])) == ["frame1"]
    assert names(predict.photographs([str(frames.parent)])) == ["video/frame2", "video/frame10", "video/more/frame1"]
    with pytest.raises(predict.PredictError, match="is no file, and no file fits it"):
        predict.photographs([str(frames / "none*")])
    (frames / "empty").mkdir()
    with pytest.raises(predict.PredictError, match="holds no photographs"):
        predict.photographs([str(frames / "empty")])
    (frames / "more" / "frame2.png").touch()
    with pytest.raises(predict.PredictError, match=r"would both be 'frame2\.png'"):
        predict.photographs([str(frames / "frame2.png"), str(frames / "more" / "frame2.png")])
    (frames / "more" / "frame2.jpg").touch()
    assert names(predict.photographs([str(frames)])) == ["frame2", "frame10", "more/frame1", "more/frame2.jpg", "more/frame2.png"]


def test_results_and_hidden_files_in_a_folder_are_no_photographs(frames, monkeypatch):
    before = predict.photographs([str(frames)])
    for name in ("frame2.panoptic.png", "out/more/frame1.semantic.png", "out/frame2.ids.png", "._frame2.jpg", ".git/icon.png"):
        (frames / name).parent.mkdir(parents=True, exist_ok=True)
        (frames / name).touch()
    assert predict.photographs([str(frames)]) == before
    assert names(predict.photographs([str(frames / ".git")])) == ["icon"]
    assert names(predict.photographs([str(frames / "frame2.panoptic.png")])) == ["frame2.panoptic"]
    monkeypatch.chdir(frames)
    assert names(predict.photographs(["."])) == names(before)
    with pytest.raises(predict.PredictError, match="'' is no file"):
        predict.photographs([""])


def test_results_are_those_of_the_model(checkpoint, frames, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict.main(["--ckpt", checkpoint, str(frames), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"3 of 3 photographs: {out}\n"
    suffixes = (".ids.png", ".json", ".panoptic.png", ".semantic.png")
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert written == sorted(f"{name}{suffix}" for name in ("frame2", "frame10", "more/frame1") for suffix in suffixes)

    model = load(checkpoint)
    image = shapes.sample("val", 1).image
    [(ids, segments)] = panoptic_inference(model(image[np.newaxis]), model.config, [image.shape[:2]])
    assert np.array_equal(decode_png((out / "frame10.ids.png").read_bytes()), ids)
    told = json.loads((out / "frame10.json").read_text())
    assert (told["height"], told["width"], told["file"]) == (*image.shape[:2], "frame10.png")
    assert [(found["id"], found["category_id"]) for found in told["segments_info"]] == [(one["id"], one["category_id"]) for one in segments]
    for found in told["segments_info"]:
        mask = np.asarray(ids) == found["id"]
        assert found["area"] == mask.sum()
        assert found["category"] == model.config.class_names[found["category_id"]]
        x, y, width, height = found["bbox"]
        assert mask[y : y + height, x : x + width].sum() == mask.sum()
        assert all(edge.any() for edge in (mask[y], mask[y + height - 1], mask[:, x], mask[:, x + width - 1]))
    areas = [found["area"] for found in told["classes"]]
    assert sum(areas) == image.shape[0] * image.shape[1]
    assert areas == sorted(areas, reverse=True)
    assert len(areas) > 1


def test_upright_and_no_larger_than_asked(checkpoint, tmp_path):
    image = Image.fromarray(shapes.sample("val", 3).image)
    exif = Image.Exif()
    exif[274] = 6  # rotated by 90°
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "upright.png")
    for options, suffix in (([], "a"), (["--max-size", "64"], "b")):
        arguments = ["--ckpt", checkpoint, str(tmp_path / "turned.png"), str(tmp_path / "upright.png"), "--out", str(tmp_path / suffix)]
        assert predict.main(arguments + options) == 0
    turned, upright = (json.loads((tmp_path / "a" / f"{name}.json").read_text()) for name in ("turned", "upright"))
    assert {**turned, "file": ""} == {**upright, "file": ""}
    assert (upright["height"], upright["width"]) == image.size[::-1]
    small = json.loads((tmp_path / "b" / "upright.json").read_text())
    assert max(small["height"], small["width"]) == 64
    assert decode_png((tmp_path / "b" / "upright.ids.png").read_bytes()).shape == (small["height"], small["width"])


RESULT = '{"file": "frame2.png", "model": "stub", "segments_info": [], "classes": []}'


def test_one_kind_alone(stub, frames, tmp_path, monkeypatch):
    """Nothing else is computed, and nothing of an earlier run lies beside it."""
    photograph, out = str(frames / "frame2.png"), tmp_path / "out"
    out.mkdir()
    for suffix in (".json", *predict.PICTURES):
        (out / f"frame2{suffix}").write_text(RESULT)

    def must_not_run(*_):
        raise AssertionError("was not asked for")

    for kind, other, written in (("semantic", "panoptic", ["semantic.png"]), ("panoptic", "semantic", ["ids.png", "panoptic.png"])):
        with monkeypatch.context() as patch:
            patch.setattr(f"tfmaskformer.inference.{other}_inference", must_not_run)
            assert predict.main(["--ckpt", "stub", photograph, "--out", str(out), "--kind", kind]) == 0
        assert sorted(path.name for path in out.iterdir()) == sorted(f"frame2.{suffix}" for suffix in ["json", *written])
    assert "classes" not in json.loads((out / "frame2.json").read_text())


def test_json_is_gone_while_pictures_are_written(stub, frames, tmp_path, monkeypatch):
    (tmp_path / "frame2.json").write_text(RESULT)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predict, "_write", full)
    assert predict.main(["--ckpt", "stub", str(frames / "frame2.png"), "--out", str(tmp_path)]) == 2
    assert not (tmp_path / "frame2.json").exists()


def saved(image, kind, **options):
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


@pytest.mark.parametrize("big_endian", [False, True])
def test_greys_of_16_bits_are_those_that_tensorflow_reads(big_endian):
    values = np.random.default_rng(0).integers(0, 65536, (30, 20)).astype(">u2" if big_endian else "<u2")
    image = Image.frombytes("I;16B" if big_endian else "I;16", (20, 30), values.tobytes())
    expected = np.repeat((values >> 8).astype(np.uint8)[..., np.newaxis], 3, -1)
    assert np.array_equal(predict._read(saved(image, "TIFF")), expected)
    png = saved(Image.fromarray(values.astype(np.uint16)), "PNG")
    assert np.array_equal(predict._read(png), expected)
    assert np.array_equal(tf.io.decode_png(png, channels=3), expected)


@pytest.mark.parametrize(("kind", "mode"), [("TIFF", "RGB"), ("PNG", "RGB"), ("WEBP", "RGB"), ("TIFF", "I;16"), ("PNG", "I;16")])
def test_every_kind_is_turned_once(kind, mode):
    exif = Image.Exif()
    exif[274] = 6
    values = np.arange(600, dtype=np.uint16).reshape(20, 30)
    image = Image.fromarray(values * 100) if mode == "I;16" else Image.fromarray(values.astype(np.uint8)).convert(mode)
    options = {"lossless": True} if kind == "WEBP" else {}
    upright = predict._read(saved(image, kind, **options))
    assert np.array_equal(predict._read(saved(image, kind, exif=exif, **options)), np.rot90(upright, -1))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_white_are_refused(dtype):
    with pytest.raises(ValueError, match="nothing tells which value is white"):
        predict._read(saved(Image.fromarray(np.ones((4, 5), dtype)), "TIFF"))


def test_a_graph_for_each_canvas_and_no_warning(stub, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("tensorflow"), "propagate", True)
    predictor = predict.Predictor(stub)
    for width in (100, 200, 300, 400, 500, 600, 700, 800, 100):
        assert predictor(np.zeros((100, width, 3), np.uint8)).semantic.shape == (100, width)
    assert stub.canvases == [(1, 128, width, 3) for width in (128, 256, 384, 512, 640, 768, 896)]
    assert not caplog.messages


def test_products_are_in_float32_on_a_gpu_too(stub, frames, tmp_path):
    tf.config.experimental.enable_tensor_float_32_execution(True)
    assert predict.main(["--ckpt", "stub", str(frames / "frame2.png"), "--out", str(tmp_path)]) == 0
    assert not tf.config.experimental.tensor_float_32_execution_enabled()


def test_out_of_memory_is_told(stub, frames, tmp_path, monkeypatch, capsys):
    def allocate(*_):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    monkeypatch.setattr(predict.Predictor, "__call__", allocate)
    assert predict.main(["--ckpt", "stub", str(frames), "--out", str(tmp_path / "out")]) == 3
    assert "out of memory\n  take a smaller --max-size" in capsys.readouterr().err


def test_bad_photographs_do_not_stop_the_others(stub, frames, tmp_path, capsys):
    (frames / "bad.jpg").write_bytes(b"no image")
    (frames / "cut.png").write_bytes((frames / "frame2.png").read_bytes()[:200])
    assert predict.main(["--ckpt", "stub", str(frames), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("3 of 5 photographs")
    assert f"cannot read '{frames / 'bad.jpg'}' as an image: it is of no kind that Pillow knows" in captured.err
    assert f"cannot read '{frames / 'cut.png'}' as an image" in captured.err
    assert len(list((tmp_path / "out").rglob("*.json"))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ckpt", "{tmp}/none", "{frames}", "--out", "{tmp}/out"], "cannot read config.json"),
        (["--ckpt", "{ckpt}", "{tmp}/none.jpg"], "is no file, and no file fits it"),
        (["--ckpt", "{ckpt}", "{frames}", "--out", "{frames}/frame2.png"], "choose another --out"),
        (["--ckpt", "{ckpt}", "{frames}", "--out", "{frames}/frame2.png/x"], "choose another --out"),
    ],
)
def test_bad_usage(arguments, message, checkpoint, frames, tmp_path, capsys):
    places = {"tmp": tmp_path, "frames": frames, "ckpt": checkpoint}
    assert predict.main([argument.format(**places) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out
    assert not (tmp_path / "out").exists()


def test_a_negative_size_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        predict.main(["--ckpt", "any", "photo.jpg", "--max-size", "-5"])
    assert "'-5' is no size in px, nor 0" in capsys.readouterr().err


def test_labels_beside_photographs_are_left_alone(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    for labels in ('{"shapes": []}', "not JSON"):
        (tmp_path / "a.json").write_text(labels)
        assert predict.main(["--ckpt", "nowhere", str(tmp_path), "--out", str(tmp_path)]) == predict.BAD_INPUT
        assert f"'{tmp_path / 'a.json'}' is there already, and no result of this command" in capsys.readouterr().err
        assert (tmp_path / "a.json").read_text() == labels


def test_pictures_beside_photographs_are_left_alone(tmp_path, capsys):
    """As of ground truth; also where the JSON is of this command, but tells of no such picture."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    for suffix in predict.PICTURES:
        truth = tmp_path / f"a{suffix}"
        Image.new("RGB", (8, 8)).save(truth)
        before = truth.read_bytes()
        for told in (None, "classes" if suffix != ".semantic.png" else "segments_info"):
            if told:
                (tmp_path / "a.json").write_text(json.dumps({"file": "a.jpg", "model": "stub", told: []}))
            assert predict.main(["--ckpt", "nowhere", str(tmp_path / "a.jpg"), "--out", str(tmp_path)]) == predict.BAD_INPUT
            assert f"'{truth}' is there already, and no result of this command" in capsys.readouterr().err
            assert truth.read_bytes() == before
            (tmp_path / "a.json").unlink(missing_ok=True)
        truth.unlink()


def test_own_pictures_are_replaced_after_a_kill_too(stub, frames, tmp_path):
    command = ["--ckpt", "stub", str(frames / "frame2.png"), "--out", str(tmp_path)]
    assert predict.main(command) == 0
    (tmp_path / "frame2.json").unlink()  # as where it was killed before all was written
    assert predict.main(command) == 0
    for suffix in predict.PICTURES:  # without the mark, as earlier versions wrote them
        Image.new("RGB", (8, 8)).save(tmp_path / f"frame2{suffix}")
    assert predict.main(command) == 0
    for suffix in predict.PICTURES:
        with Image.open(tmp_path / f"frame2{suffix}") as picture:
            assert picture.info["Software"] == "tfmaskformer"
