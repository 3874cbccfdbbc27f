"""What trainings from scratch come to, in PyTorch and in TensorFlow: docs/convergence.json; docs/convergence.md has its tables and curves.

    python -m parity.convergence --results docs/convergence.json --page docs/convergence.md \\
        --pytorch runs/pytorch0.json … --tensorflow runs/seed0 … --data shapes_data --photographs runs/photos.json

The files are those of :mod:`parity.train_shapes` and :mod:`parity.overfit`, the folders those of :mod:`parity.train_shapes_tensorflow`.
Each TensorFlow model is converted back to the official layout and evaluated by the official code (``MASKFORMER_SOURCE``,
``DETECTRON2_SOURCE``). What is given replaces what the results have of it; without any run the page is made of the results as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parity import official, record_zoo, train_shapes
from parity.page import replaced_between
from parity.train_shapes_tensorflow import CANVAS

SEEDS = 3
LEAST_PQ, MOST_APART, MOST_SIGMA, LEAST_BY_HEART = 60.0, 3.0, 3.0, 90.0
"""What has to hold, in percent: the PQ of each run, the difference of the means, the standard deviation of each side, and the PQ of two
photographs by heart."""

SIDES = {"pytorch": "PyTorch", "tensorflow": "TensorFlow"}

_COUNTS = ("true_positives", "false_positives", "false_negatives")


def pytorch_run(file: Path) -> dict[str, Any]:
    """A run, of the two files that :mod:`parity.train_shapes` wrote.

    Returns:
        ``seed``; ``quality`` in percent; that of every image ``padded`` to :data:`CANVAS`, which the official code takes for a part of it;
        ``curves`` by the number of steps.
    """
    made = json.loads(file.read_text(encoding="utf-8"))
    code, config = _official(["MODEL.MASK_FORMER.SIZE_DIVISIBILITY", CANVAS[0]])
    padded = train_shapes.evaluate(code.model(config, str(file.with_suffix(".pkl"))))
    return {
        "seed": made["seed"],
        "quality": _quality(_whole(made["validation"])),
        "padded": _quality(_whole(padded)),
        "curves": made.get("curves", {"loss": {}, "pq": {}}),
    }


def _official(options: Sequence[Any] = ()) -> tuple[official.Official, Any]:
    code = official.load()
    path, own = record_zoo.TINY[train_shapes.NAME]
    config = code.config(code.maskformer / path)
    config.merge_from_list([*own, *options])
    return code, config


def tensorflow_run(folder: Path) -> dict[str, Any]:
    """The same of a folder of ``tfmaskformer train``."""
    import tensorflow as tf

    curves: dict[str, dict[int, float]] = {"total_loss": {}, "evaluation/PQ": {}}
    for file in sorted((folder / "events").iterdir()):
        for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                if value.tag in curves:
                    curves[value.tag][event.step] = value.simple_value
    losses: dict[int, list[float]] = {}
    for step, loss in curves["total_loss"].items():  # of so few steps that they are not looked through
        losses.setdefault(-(-step // train_shapes.LOSS_STEPS) * train_shapes.LOSS_STEPS, []).append(loss)
    return {
        "seed": json.loads((folder / "run.json").read_text(encoding="utf-8"))["seed"],
        "quality": _quality(_last_evaluation(folder)["metrics"]["panoptic"]),
        "curves": {
            "loss": {step: round(statistics.mean(values), 4) for step, values in sorted(losses.items())},
            "pq": {step: round(pq, 2) for step, pq in sorted(curves["evaluation/PQ"].items())},
        },
    }


def evaluated_officially(folder: Path, data: Path) -> dict[str, Any]:
    """What the official code makes of the model that was trained in ``folder``, converted back, beside ``tfmaskformer eval``.

    Returns:
        ``quality`` in percent; ``same_counts``: whether matched, surplus and missed segments of every class are those of TensorFlow;
        ``pixels`` of all validation images, and how many of them have another segment; ``differing_images``.
    """
    from PIL import Image

    from converters.convert import convert
    from tfmaskformer.evaluation import cli
    from tfmaskformer.evaluation.results import PNG_FOLDER

    code, config = _official()
    differing: list[int] = []
    pixels = 0
    with tempfile.TemporaryDirectory() as scratch:
        file, results, report = (Path(scratch, name) for name in ("model.pkl", "results", "report.json"))
        command = ["--ckpt", str(folder), "--data", str(data), "--cpu", "--limit", str(max(train_shapes.PARTS))]
        command += ["--canvas", *map(str, CANVAS)]
        with contextlib.redirect_stdout(sys.stderr):
            if cli.main([*command, "--results", str(results), "--json", str(report)]):
                raise RuntimeError(f"{folder}: tfmaskformer eval failed")
        convert(folder, file)

        def seen(index: int, panoptic_seg: np.ndarray, segments_info: list[dict[str, Any]]) -> None:
            nonlocal pixels
            rgb = np.asarray(Image.open(results / PNG_FOLDER / f"{index:012}.png")).astype(np.int32)
            differing.append(int(np.count_nonzero(rgb @ [1, 256, 65536] != panoptic_seg)))
            pixels += panoptic_seg.size

        found = _whole(train_shapes.evaluate(code.model(config, str(file)), seen))
        ours = json.loads(report.read_text(encoding="utf-8"))
    return {
        "quality": _quality(found),
        "same_counts": all(found[counts] == ours["counts"]["panoptic"][counts] for counts in _COUNTS),
        "pixels": pixels,
        "differing_pixels": sum(differing),
        "differing_images": sum(map(bool, differing)),
    }


def _last_evaluation(folder: Path) -> dict[str, Any]:
    steps = [int(file.stem.partition("-")[2]) for file in folder.glob("evaluation-*.json")]
    return json.loads((folder / f"evaluation-{max(steps)}.json").read_text(encoding="utf-8"))


def _whole(validation: Mapping[str, Any]) -> Any:
    return validation[f"first_{max(train_shapes.PARTS)}_images"]


def _quality(groups: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Percent with two digits, of groups of classes."""
    return {group: {key: round(groups[group][key], 2) for key in ("pq", "sq", "rq")} for group in ("all", "things", "stuff")}


def summary(results: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation (of a sample; NaN of a single run) of the PQ of each side, percent."""
    qualities = {side: [run["quality"]["all"]["pq"] for run in results[side].values()] for side in SIDES}
    return {
        side: (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan) for side, values in qualities.items()
    }


def holds(results: Mapping[str, Any]) -> bool:
    """Whether everything is as it has to be, and the official code finds the same; not where a side has fewer than :data:`SEEDS` runs.

    Of two photographs by heart, if they are there, the quality at the end is looked at.
    """
    (expected, _), (actual, _) = of = summary(results).values()
    runs, by_heart = results["tensorflow"].values(), results.get("photographs")
    return (
        all(len(results[side]) >= SEEDS for side in SIDES)
        and all(sigma <= MOST_SIGMA for _, sigma in of)
        and abs(expected - actual) <= MOST_APART
        and all(run["quality"]["all"]["pq"] >= LEAST_PQ for run in runs)
        and all(run["official"]["quality"] == run["quality"] for run in runs)
        and (by_heart is None or by_heart["evaluations"][str(by_heart["steps"])]["all"]["pq"] > LEAST_BY_HEART)
    )


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """The Markdown tables of the page, by the name of their place."""
    found = summary(results)
    rows = []
    for side, name in SIDES.items():
        for seed, run in results[side].items():
            quality = run["quality"]
            values = [quality["all"][key] for key in ("pq", "sq", "rq")] + [quality[group]["pq"] for group in ("things", "stuff")]
            rows.append([name, seed, *(f"{value:.2f}" for value in values)])
        mean, sigma = found[side]
        rows.append([f"**{name}**", "mean", f"**{mean:.2f}**, σ {'–' if math.isnan(sigma) else f'{sigma:.2f}'}", *[""] * 4])
    rows.append(["TensorFlow − PyTorch", "", _signed(found["tensorflow"][0] - found["pytorch"][0]), *[""] * 4])
    back = [
        [
            seed,
            f"{run['quality']['all']['pq']:.2f}",
            f"{run['official']['quality']['all']['pq']:.2f}",
            "the same" if run["official"]["same_counts"] else "**others**",
            f"{run['official']['differing_pixels']} of {run['official']['pixels']}, in {run['official']['differing_images']} images",
        ]
        for seed, run in results["tensorflow"].items()
    ]
    padded = [
        [seed, *(f"{quality['all']['pq']:.2f}" for quality in (run["quality"], run["padded"]))] for seed, run in results["pytorch"].items()
    ]
    photographs = results["photographs"]
    heart = [
        [label, *(f"{quality[group]['pq']:.2f}" for group in quality), *(f"{quality['all'][key]:.2f}" for key in ("sq", "rq"))]
        for label, quality in [*photographs["evaluations"].items(), ("ground truth", photographs["limit"])]
    ]
    return {
        "runs": _table(["", "seed", "PQ", "SQ", "RQ", "PQ of things", "of stuff"], rows),
        "back": _table(
            ["seed", "PQ in TensorFlow", "in the official code", "segments matched, missed, surplus", "pixels that differ"], back
        ),
        "padded": _table(["seed", "PQ of PyTorch's model", f"PQ of images padded to {CANVAS[0]}×{CANVAS[1]} px"], padded),
        "photographs": _table(["steps", "PQ", "of things", "of stuff", "SQ", "RQ"], heart),
    }


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def page_of(text: str, results: Mapping[str, Any]) -> str:
    """The page with each table in its place, between ``<!-- NAME -->`` and ``<!-- end -->``.

    Raises:
        ValueError: the page has no such place.
    """
    for name, table in tables(results).items():
        text = replaced_between(text, f"<!-- {name} -->\n", "<!-- end -->", f"{table}\n")
    return text


def draw(results: Mapping[str, Any], file: Path) -> None:
    """Writes the curves of all runs as an SVG file."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "convergence"}):
        figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
        for (side, name), colour in zip(SIDES.items(), ("#2f7ed8", "#e08214"), strict=True):
            for number, run in enumerate(results[side].values()):
                for axis, key in zip(axes, ("loss", "pq"), strict=True):
                    curve = run["curves"][key]
                    label = None if number else name
                    axis.plot(
                        list(map(int, curve)), [*curve.values()], color=colour, marker="o" * (key == "pq"), linewidth=1.2, label=label
                    )
        axes[0].set(title="loss, mean of 100 steps", xlabel="step", yscale="log")
        axes[0].set_yticks([2, 3, 5, 10], labels=["2", "3", "5", "10"])
        axes[0].minorticks_off()
        axes[1].set(title="PQ of 200 validation images, %", xlabel="step")
        axes[1].axhline(LEAST_PQ, color="#8a8f98", linestyle="--", linewidth=1)
        for axis in axes:
            axis.grid(alpha=0.3)
        axes[1].legend(loc="lower right")
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Gathers; 0 if everything is as it has to be, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, metavar="FILE", help="JSON, in which what is given is replaced")
    parser.add_argument("--page", type=Path, required=True, metavar="FILE", help="Markdown; the curves are drawn beside it")
    parser.add_argument("--pytorch", type=Path, nargs="+", default=[], metavar="FILE", help="of python -m parity.train_shapes")
    parser.add_argument("--tensorflow", type=Path, nargs="+", default=[], metavar="DIR", help="of python -m parity.train_shapes_tensorflow")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the images of --tensorflow")
    parser.add_argument("--photographs", type=Path, metavar="FILE", help="of python -m parity.overfit")
    arguments = parser.parse_args(argv)
    if arguments.tensorflow and not arguments.data:
        parser.error("--tensorflow needs the images, --data")
    results: dict[str, Any] = {"pytorch": {}, "tensorflow": {}, "photographs": {}}
    if arguments.results.exists():
        results = json.loads(arguments.results.read_text(encoding="utf-8"))
    runs = {"pytorch": [pytorch_run(file) for file in arguments.pytorch]}
    runs["tensorflow"] = [
        tensorflow_run(folder) | {"official": evaluated_officially(folder, arguments.data)} for folder in arguments.tensorflow
    ]
    for side, given in runs.items():
        replaced = results[side] | {str(run.pop("seed")): run for run in given}
        results[side] = dict(sorted(replaced.items()))
    if arguments.photographs:
        results["photographs"] = json.loads(arguments.photographs.read_text(encoding="utf-8"))
    results = json.loads(json.dumps(results))  # steps are strings there
    arguments.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, arguments.page.with_suffix(".svg"))
    arguments.page.write_text(page_of(arguments.page.read_text(encoding="utf-8"), results), encoding="utf-8")
    return 0 if holds(results) else 1


if __name__ == "__main__":
    sys.exit(main())
