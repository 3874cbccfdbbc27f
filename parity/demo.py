"""The demo: a synthetic checkpoint is written, converted, checked against the official code's trace, and both results are drawn; then a
small checkpoint that the official code trained is converted, and its panoptic quality measured.

``make demo`` runs it. It needs TensorFlow, but neither PyTorch nor the official code: what they computed is in the trace.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from checkpoints import registry
from parity.prove import TRACES
from parity.trace import Trace

ENTRY = "maskformer_panoptic_R50_bs64_554k"
TRACE = TRACES / ENTRY

WHAT = """\
The weights of this demo are SYNTHETIC: made-up numbers in the exact layout of the official file, which this repository does not contain.
What is proven is real: whether both frameworks compute the same from the same weights. What is found in the photograph means nothing.
The small model at the end is trained: what it finds in generated images means something."""

SHAPES = "shapes_panoptic"
SHAPES_FILE = Path(registry.__file__).parent / "small" / f"{SHAPES}.pkl"
SHAPES_IMAGES, SHAPES_DRAWN = 20, 4
"""Images of the validation split that are measured, and the first few of them, which are drawn."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; the exit code of the first step that fails, 0 if none does."""
    parser = argparse.ArgumentParser(prog="python -m parity.demo", description="Convert a synthetic checkpoint and prove it.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="where everything is written; an earlier demo there is replaced")
    directory: Path = parser.parse_args(argv).directory
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import checkpoints.cli
    import converters.cli
    import parity.cli

    start_s = time.monotonic()
    directory.mkdir(parents=True, exist_ok=True)
    source, converted, report = directory / "model_final.pkl", directory / "tf_ckpt", directory / "report"
    shapes = directory / SHAPES
    replaced = ["--dst", str(shapes), "--force"]
    print(WHAT)
    steps = [
        ("tfmaskformer zoo", checkpoints.cli.main, ["synthesize", ENTRY, "--dst", str(source), "--force"]),
        ("convert", converters.cli.main, ["--src", str(source), "--dst", str(converted), "--force"]),
        ("parity-check", parity.cli.main, ["--ckpt", str(converted), "--reference", os.path.relpath(TRACE), "--report", str(report)]),
        ("convert", converters.cli.main, ["--src", os.path.relpath(SHAPES_FILE), *replaced, "--config", SHAPES]),
    ]
    for command, run, arguments in steps:
        print(f"\n$ {command} {' '.join(arguments)}", flush=True)
        if code := run(arguments):
            print(f"error: '{command}' ended with exit code {code}", file=sys.stderr)
            return code
    picture = directory / "panoptic.png"
    agreement = _draw(converted, picture)
    shapes_picture = directory / "shapes.png"
    quality = _measure_shapes(shapes, shapes_picture)
    entry = registry.entry(ENTRY)
    print(f"""
Parity report          {report}
Panoptic results       {picture}, PyTorch beside TensorFlow: {agreement}
TensorFlow checkpoint  {converted}
Trained small model    {shapes_picture}, truth beside TensorFlow: {quality}
Took {time.monotonic() - start_s:.0f} s. The weights were synthetic; with the real file ({entry.url}):

    convert --src {entry.url.rsplit("/", 1)[-1]} --dst tf_ckpt""")
    return 0


def _draw(checkpoint: Path, path: Path) -> str:
    """Draws both frameworks' panoptic segmentation of the trace's first photograph; says how many pixels agree."""
    import numpy as np
    import tensorflow as tf
    from PIL import Image

    import tfmaskformer
    from tfmaskformer.visualize import panoptic_overlay, side_by_side

    trace = Trace(TRACE)
    with trace.case(trace.cases[0]) as case:
        image = case.images[0]
        recorded = {name: case.baseline.read("inference", f"0/{name}") for name in ("panoptic_seg", "segments")}
    keys = ("id", "category_id", "isthing")
    expected = recorded["panoptic_seg"], [dict(zip(keys, segment, strict=True)) for segment in recorded["segments"].tolist()]

    model = tfmaskformer.load(checkpoint)
    outputs = tf.function(model)(tf.constant(image[np.newaxis]))
    [actual] = tfmaskformer.panoptic_inference(outputs, model.config, [image.shape[:2]])
    pictures = [image, *(panoptic_overlay(image, *result, model.config) for result in (expected, actual))]
    Image.fromarray(side_by_side(pictures, ["photograph", "PyTorch", "TensorFlow"])).save(path)
    equal = expected[0] == actual[0]
    return f"{np.count_nonzero(equal)} of {equal.size} pixels have the same segment"


def _measure_shapes(checkpoint: Path, path: Path) -> str:
    """Draws the small model's first results beside the truth; tells its panoptic quality."""
    import numpy as np
    from PIL import Image

    import tfmaskformer
    from tfmaskformer.data.shapes import sample
    from tfmaskformer.evaluation.panoptic import PanopticQuality
    from tfmaskformer.visualize import panoptic_overlay, side_by_side

    model = tfmaskformer.load(checkpoint)
    quality = PanopticQuality(model.config.num_classes, model.config.thing_classes)
    pictures, titles = [], []
    for index in range(SHAPES_IMAGES):
        image, panoptic_seg, segments_info = sample("val", index)
        [found] = tfmaskformer.panoptic_inference(model(image[np.newaxis]), model.config, [image.shape[:2]])
        quality.update(panoptic_seg, segments_info, *found)
        if index < SHAPES_DRAWN:
            large = image.repeat(3, 0).repeat(3, 1)
            for ids, segments in ((panoptic_seg, segments_info), found):
                pictures.append(panoptic_overlay(large, ids.repeat(3, 0).repeat(3, 1), segments, model.config))
            titles += ["truth", "TensorFlow"]
    Image.fromarray(side_by_side(pictures, titles)).save(path)
    return f"PQ {100 * quality.result()['all'].pq:.1f} on {SHAPES_IMAGES} images"


if __name__ == "__main__":
    sys.exit(main())
