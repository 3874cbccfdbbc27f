"""Photographs in, overlays, ids and JSON out, on the small trained model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from checkpoints import registry
from converters.convert import convert
from tfmaskformer import predict
from tfmaskformer.checkpoint import load
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
    with pytest.raises(predict.PredictError, match="would both be 'frame2'"):
        predict.photographs([str(frames / "frame2.png"), str(frames / "more" / "frame2.png")])


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
    for options, suffix in (([], "a"), (["--max-size", "64"], "b"), (["--kind", "semantic"], "c")):
        arguments = ["--ckpt", checkpoint, str(tmp_path / "turned.png"), str(tmp_path / "upright.png"), "--out", str(tmp_path / suffix)]
        assert predict.main(arguments + options) == 0
    turned, upright = (json.loads((tmp_path / "a" / f"{name}.json").read_text()) for name in ("turned", "upright"))
    assert {**turned, "file": ""} == {**upright, "file": ""}
    assert (upright["height"], upright["width"]) == image.size[::-1]
    small = json.loads((tmp_path / "b" / "upright.json").read_text())
    assert max(small["height"], small["width"]) == 64
    assert decode_png((tmp_path / "b" / "upright.ids.png").read_bytes()).shape == (small["height"], small["width"])
    assert sorted(path.name for path in (tmp_path / "c").glob("upright*")) == ["upright.json", "upright.semantic.png"]


def test_bad_photographs_do_not_stop_the_others(checkpoint, frames, tmp_path, capsys):
    (frames / "bad.jpg").write_bytes(b"no image")
    (frames / "cut.png").write_bytes((frames / "frame2.png").read_bytes()[:200])
    assert predict.main(["--ckpt", checkpoint, str(frames), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("3 of 5 photographs")
    assert f"cannot read '{frames / 'bad.jpg'}' as an image: it is of no kind that Pillow knows" in captured.err
    assert f"cannot read '{frames / 'cut.png'}' as an image" in captured.err
    assert len(list((tmp_path / "out").rglob("*.json"))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ckpt", "{tmp}/none", "{frames}"], "cannot read config.json"),
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
