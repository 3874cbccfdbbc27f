"""The batched assignment under XLA beside SciPy's, one problem after the other.

Two kinds of cost: independent numbers, whose shortest paths are short, and numbers like a network's, where some queries suit every
object, so that the objects compete. Both sides take turns.
"""

from __future__ import annotations

import os
import statistics
import time

import numpy as np

from bench.common import THREADS, progress, section

SIZES = ((8, 100, 10), (8, 100, 100), (16, 100, 100), (48, 100, 20))
"""(problems, queries, objects); the last one is a batch of 8 images with 6 decoder layers."""
RUNS = 30


def main() -> int:
    """Measures and prints the section."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf
    from scipy.optimize import linear_sum_assignment

    from tfmaskformer.assignment import linear_assignment

    tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    solve = tf.function(linear_assignment, jit_compile=True)
    rows = []
    for size in SIZES:
        for kind in ("independent", "competing"):
            progress(f"  {size} {kind}")
            cost = _costs(kind, *size)
            tensor, num_objects = tf.constant(cost), tf.fill([size[0]], size[2])
            ours = solve(tensor, num_objects).queries.numpy()
            theirs = [linear_sum_assignment(matrix) for matrix in cost]
            excess = max(
                (matrix[found, np.arange(size[2])].sum(dtype=np.float64) - matrix[best].sum(dtype=np.float64))
                for matrix, found, best in zip(cost, ours, theirs, strict=True)
            )
            times: dict[str, list[float]] = {"ours": [], "scipy": []}
            for _ in range(RUNS):
                start = time.perf_counter()
                solve(tensor, num_objects).queries.numpy()
                middle = time.perf_counter()
                for matrix in cost:
                    linear_sum_assignment(matrix)
                times["ours"].append(middle - start)
                times["scipy"].append(time.perf_counter() - middle)
            ours_s, scipy_s = (statistics.median(values) for values in times.values())
            problems, queries, objects = size
            rows.append(
                [
                    f"{problems} × {queries} queries, {objects} objects, {kind}",
                    f"{1e3 * ours_s:.2f} ms",
                    f"{1e3 * scipy_s:.2f} ms",
                    f"{ours_s / scipy_s:.1f}",
                    f"{max(excess, 0):.0e}",
                ]
            )
    text = (
        f"`python -m bench.assignment`: `tfmaskformer.assignment` compiled by XLA for the CPU, float32, {THREADS} threads, beside SciPy's "
        f"`linear_sum_assignment` called for each problem; medians of {RUNS} runs, taken in turns. Excess: the most by which a "
        "matching of ours costs more than SciPy's."
    )
    print(section("Assignment", text, ["", "ours", "SciPy", "ratio", "excess"], rows))
    return 0


def _costs(kind: str, problems: int, queries: int, objects: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    cost = rng.normal(size=(problems, queries, objects))
    if kind == "competing":
        cost = 2 * rng.random((problems, queries, 1)) + 2 * rng.random((problems, 1, objects)) + 0.2 * cost
    return cost.astype(np.float32)


if __name__ == "__main__":
    raise SystemExit(main())
