"""The batched assignment under XLA beside SciPy's, one problem after the other, and beside the TensorFlow Model Garden's under XLA.

Two kinds of cost: independent numbers, whose shortest paths are short, and numbers like a network's, where some queries suit every
object, so that the objects compete. All sides take turns. The Model Garden's solves square problems: it gets as many objects as queries,
those that are none at the highest cost, as its own DETR has it. It is measured where ``tf-models-official`` is installed.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import numpy as np

from bench.common import THREADS, progress, section

SIZES = ((8, 100, 10), (8, 100, 100), (16, 100, 100), (48, 100, 20))
"""(problems, queries, objects); the last one is a batch of 8 images with 6 decoder layers."""
RUNS, GARDEN_RUNS = 30, 5


def main() -> int:
    """Measures and prints the section."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf
    from scipy.optimize import linear_sum_assignment

    from tfmaskformer.assignment import linear_assignment

    tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    solve = tf.function(linear_assignment, jit_compile=True)
    garden = _garden()
    rows = []
    for size in SIZES:
        for kind in ("independent", "competing"):
            progress(f"  {size} {kind}")
            cost = _costs(kind, *size)
            tensor, num_objects = tf.constant(cost), tf.fill([size[0]], size[2])
            ours = solve(tensor, num_objects).queries.numpy()
            theirs = [linear_sum_assignment(matrix) for matrix in cost]
            excess = _excess(cost, ours, theirs)
            times: dict[str, list[float]] = {"ours": [], "scipy": [], "garden": []}
            square = tf.constant(np.concatenate([cost, np.full([size[0], size[1], size[1] - size[2]], cost.max(), np.float32)], axis=2))
            if garden:
                excess = max(excess, _excess(cost, tf.argmax(garden(square), axis=1).numpy()[:, : size[2]], theirs))
            for run in range(RUNS):
                start = time.perf_counter()
                solve(tensor, num_objects).queries.numpy()
                middle = time.perf_counter()
                for matrix in cost:
                    linear_sum_assignment(matrix)
                end = time.perf_counter()
                times["ours"].append(middle - start)
                times["scipy"].append(end - middle)
                if garden and run < GARDEN_RUNS:
                    garden(square).numpy()
                    times["garden"].append(time.perf_counter() - end)
            ours_s, scipy_s, garden_s = (statistics.median(values) if values else 0.0 for values in times.values())
            problems, queries, objects = size
            rows.append(
                [
                    f"{problems} × {queries} queries, {objects} objects, {kind}",
                    f"{1e3 * ours_s:.2f} ms",
                    f"{1e3 * scipy_s:.2f} ms",
                    f"{ours_s / scipy_s:.1f}",
                    f"{1e3 * garden_s:.0f} ms" if garden else "–",
                    f"1/{garden_s / ours_s:.0f}" if garden else "–",
                    f"{excess:.0e}",
                ]
            )
    text = (
        f"`python -m bench.assignment`: `tfmaskformer.assignment` compiled by XLA for the CPU, float32, {THREADS} threads, beside SciPy's "
        f"`linear_sum_assignment` called for each problem, and `hungarian_matching` of {_garden_version()} (DETR), which XLA compiles too; "
        f"medians of {RUNS} runs, of the Model Garden's {GARDEN_RUNS}, taken in turns. Ratios: of ours to each. Excess: the most by which "
        "a matching, ours or the Model Garden's, costs more than SciPy's."
    )
    print(section("Assignment", text, ["", "ours", "SciPy", "ratio", "Model Garden", "ratio", "excess"], rows))
    return 0


def _garden() -> Callable[[Any], Any] | None:
    """The Model Garden's matching of square problems, bool [problems, queries, objects], or None where it is not installed."""
    import tensorflow as tf

    if importlib.util.find_spec("official") is None:
        return None
    from official.projects.detr.ops import matchers

    return tf.function(lambda cost: tf.cast(matchers.hungarian_matching(cost)[1], tf.int32), jit_compile=True)


def _garden_version() -> str:
    try:
        return f"tf-models-official {metadata.version('tf-models-official')}"
    except metadata.PackageNotFoundError:
        return "tf-models-official (not installed here)"


def _excess(cost: np.ndarray, found: np.ndarray, best: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """The most by which a matching, the query of each object, costs more than the best, (queries, objects)."""
    objects = np.arange(cost.shape[2])
    totals = cost[np.arange(len(cost))[:, None], found, objects].sum(axis=1, dtype=np.float64)
    assert all(len(set(queries)) == len(objects) for queries in found)
    return max(0.0, *(total - matrix[pair].sum(dtype=np.float64) for total, matrix, pair in zip(totals, cost, best, strict=True)))


def _costs(kind: str, problems: int, queries: int, objects: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    cost = rng.normal(size=(problems, queries, objects))
    if kind == "competing":
        cost = 2 * rng.random((problems, queries, 1)) + 2 * rng.random((problems, 1, objects)) + 0.2 * cost
    return cost.astype(np.float32)


if __name__ == "__main__":
    raise SystemExit(main())
