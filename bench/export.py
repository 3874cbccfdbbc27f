"""What an export costs in accuracy, on the small trained model: ``python -m bench.export`` writes the table of docs/export.md.

Panoptic quality is taken of the validation images of :mod:`tfmaskformer.data.shapes`; errors are relative L2 errors against the float64
model. Those of taps, which exports do not show, are of the model that a SavedModel was made of, and of a LiteRT conversion that shows them.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import progress
from parity.page import replaced_between

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "export.md"
BEGIN, END = "<!-- made by python -m bench.export -->\n", "<!-- end -->\n"
HEADER = ("export", "file", "PQ", "pred_logits", "pred_masks", "median tap", "worst tap")
CANVAS = (160, 160)
EXPORTS = (
    ("saved_model", "float32", False),
    ("saved_model", "float32", True),
    ("saved_model", "bfloat16", False),
    ("litert", "float32", False),
    ("litert", "float16", False),
    ("litert", "int8", False),
)
ERROR_IMAGE = 0
"""Of the validation images, that on which errors are taken."""


def main() -> int:
    """Measures all exports, and writes the table."""
    from converters.convert import convert
    from tfmaskformer.checkpoint import load
    from tfmaskformer.data import shapes

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        convert(ROOT / "checkpoints" / "small" / "shapes_panoptic.pkl", folder / "ckpt", "shapes_panoptic")
        exact, model = load(folder / "ckpt", "float64"), load(folder / "ckpt")
        image = shapes.sample("val", ERROR_IMAGE).image
        expected, expected_taps = exact(image[np.newaxis]), _taps(exact, image)
        quality = _quality(lambda image: model(image[np.newaxis]), model.config)
        rows = [
            ("the model itself, float32", "", quality, *_errors(model(image[np.newaxis]), expected, _taps(model, image), expected_taps))
        ]
        for export in EXPORTS:
            progress(" ".join(map(str, export)))
            rows.append(_measured(folder, export, image, expected, expected_taps))
    lines = ["| " + " | ".join(HEADER) + " |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    PAGE.write_text(page_of(PAGE.read_text(encoding="utf-8"), lines), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
    return 0


def page_of(text: str, lines: Sequence[str]) -> str:
    """The page with the lines of the table between its marks.

    Raises:
        ValueError: it does not have them.
    """
    return replaced_between(text, BEGIN, END, "\n".join(lines) + "\n")


def _measured(folder: Path, export: tuple[str, str, bool], image: np.ndarray, expected: Any, expected_taps: Any) -> tuple[str, ...]:
    from tfmaskformer import export as exporting
    from tfmaskformer.checkpoint import load
    from tfmaskformer.folding import fold

    kind, dtype, folded = export
    place = folder / f"{kind}-{dtype}-{folded}"
    exporting.export(folder / "ckpt", place, kind, dtype=dtype, size=CANVAS, fold_batch_norm=folded)
    exported = exporting.Exported(place)
    quality = _quality(lambda image: exported(image[np.newaxis]), exported.config)
    model: Any = load(folder / "ckpt", exporting.FORMATS[kind][dtype])
    model = fold(model) if folded else model
    taps = _taps(model, image) if kind == "saved_model" else _litert_taps(folder / f"taps-{dtype}", model, dtype, image)
    size = f"{sum(file.stat().st_size for file in place.rglob('*') if file.is_file()) / 1e6:.1f} MB"
    named = f"{kind}, {dtype}{', folded' * folded}"
    return named, size, quality, *_errors(exported(image[np.newaxis]), expected, taps, expected_taps)


def _errors(outputs: Any, expected: Any, taps: dict[str, np.ndarray], expected_taps: dict[str, np.ndarray]) -> Iterator[str]:
    from tfmaskformer.folding import relative_error

    rows, columns = expected["pred_masks"].shape[2:]
    yield f"{relative_error(np.asarray(outputs['pred_logits']), np.asarray(expected['pred_logits'])):.1e}"
    yield f"{relative_error(np.asarray(outputs['pred_masks'][:, :, :rows, :columns]), np.asarray(expected['pred_masks'])):.1e}"
    errors = {name: relative_error(tap, expected_taps[name]) for name, tap in taps.items() if name in expected_taps}
    worst = max(errors, key=errors.__getitem__)
    yield f"{np.median(list(errors.values())):.1e}"
    yield f"{errors[worst]:.1e} `{worst}`"


def _quality(run: Callable[[np.ndarray], Any], config: Any) -> str:
    from tfmaskformer.data import shapes
    from tfmaskformer.evaluation.panoptic import PanopticQuality
    from tfmaskformer.inference import panoptic_inference

    quality = PanopticQuality(config.num_classes, config.thing_classes)
    for index in range(shapes.VALIDATION_IMAGES):
        sample = shapes.sample("val", index)
        [found] = panoptic_inference(run(sample.image), config, [sample.image.shape[:2]])
        quality.update(sample.panoptic_seg, sample.segments_info, *found)
    return f"{100 * quality.result()['all'].pq:.2f}"


def _taps(model: Any, image: np.ndarray) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().astype(np.float64) for name, tensor in _tapped(model, image[np.newaxis]).items()}


def _tapped(model: Any, images: Any) -> dict[str, Any]:
    from tfmaskformer.module import record_taps

    with record_taps() as taps:
        model(images)
    return {name: tensor for name, tensor in taps.items() if tensor.dtype.is_floating and not name.startswith("images")}


def _litert_taps(folder: Path, model: Any, dtype: str, image: np.ndarray) -> dict[str, np.ndarray]:
    """Taps of a model that is converted together with them, at the image's own size."""
    import tensorflow as tf
    from ai_edge_litert.interpreter import Interpreter

    from tfmaskformer.export import _litert
    from tfmaskformer.module import named_variables

    names: list[str] = []

    def logits(images: Any) -> dict[str, Any]:
        taps = _tapped(model, images)
        names[:] = taps
        return {f"tap{index}": tensor for index, tensor in enumerate(taps.values())}

    serving = tf.Module()
    serving.parameters = {name: variable.value for name, variable in named_variables(model).items()}
    function = tf.function(logits, input_signature=[tf.TensorSpec([1, *image.shape], tf.uint8, "images")], autograph=False)
    tf.saved_model.save(serving, str(folder), {"logits": function.get_concrete_function()})
    run = Interpreter(model_content=_litert(folder, dtype, model, image.shape[:2])).get_signature_runner("logits")
    found = run(images=image[np.newaxis])
    return {name: found[f"tap{index}"] for index, name in enumerate(names)}


if __name__ == "__main__":
    sys.exit(main())
