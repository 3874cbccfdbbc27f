"""What the official models take on a TPU: tables compiled without one; see docs/compile.md.

``python -m bench.tpu`` compiles the evaluation step of each model at the official test size, ``python -m bench.tpu --step train`` the
training step of each backbone, in bfloat16, at the official crops; first for one image, then the largest batch that fits is looked for,
of a training step (of which a compilation takes minutes) the largest power of two, as which official batches are shared out to cores.
Memory grows with the batch by about the same amount for each image, so few compilations tell where it ends; the search goes on until
the largest that fits and the next, which does not, have been compiled. Each compilation is kept in docs/tpu_memory.json, and the page
written; what is there is not compiled again, so it may be interrupted at any time. It takes many hours in all.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from bench.common import progress, section
from checkpoints import registry

COLUMNS = {"eval": ("v5e:2x2", "v4:2x2x1"), "train": ("v5e:2x2",)}
"""Step → targets."""

TRAINED = (
    *("maskformer_R50_bs16_160k", "maskformer_R101_bs16_160k", "maskformer_R101c_bs16_160k"),
    *("maskformer_swin_tiny_bs16_160k", "maskformer_swin_small_bs16_160k"),
    *("maskformer_swin_base_IN21k_384_bs16_160k_res640", "maskformer_swin_large_IN21k_384_bs16_160k_res640"),
    *("maskformer_panoptic_R50_bs64_554k", "maskformer_panoptic_R101_bs64_554k"),
    *("maskformer_panoptic_swin_tiny_bs64_554k", "maskformer_panoptic_swin_small_bs64_554k"),
    *("maskformer_panoptic_swin_base_IN21k_384_bs64_554k", "maskformer_panoptic_swin_large_IN21k_384_bs64_554k"),
)
"""Each backbone at its crops of ADE20K, and at the canvas of COCO."""

LIMITS = {"v5e": 15.75 * 2**30, "v4": 15.25 * 2**30}
"""Bytes of a core, with which a search begins; what fits is for the compiler to say."""

MOST = 4096
"""Images; no search goes beyond."""

DOCS = pathlib.Path(__file__).parents[1] / "docs"
RESULTS, PAGE = DOCS / "tpu_memory.json", DOCS / "tpu_memory.md"

Batches: TypeAlias = "dict[str, dict[str, Any] | None]"
"""Batch → what the compiler said of it; None where it does not fit."""


def main() -> int:
    """Compiles what is missing; 0 if nothing is left, or the time is over."""
    parser = argparse.ArgumentParser(prog="python -m bench.tpu", description="The memory that official models take on TPUs.")
    parser.add_argument("--step", choices=COLUMNS, default="eval", help="(default: %(default)s)")
    parser.add_argument("--target", metavar="TPU", help="only this column of the table")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no compilation after this time")
    parser.add_argument("names", nargs="*", metavar="NAME", help="entries of the zoo (default: those of the table)")
    arguments = parser.parse_args()
    start_s = time.monotonic()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    of_step = results.setdefault(arguments.step, {})
    columns = [arguments.target] if arguments.target else COLUMNS[arguments.step]
    for searching in (False, True):
        for column in columns:
            for name in arguments.names or _names(arguments.step):
                found, doubling = of_step.setdefault(name, {}).setdefault(column, {}), arguments.step == "train"
                limit, others = LIMITS[column.partition(":")[0]], list(of_step[name].values())
                while (batch := next_batch(found, limit, others, doubling)) is not None and searching >= (batch > 1):
                    if time.monotonic() - start_s > 60 * arguments.minutes:
                        return 0
                    found[str(batch)] = _compiled(name, arguments.step, column, batch)
                    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                    PAGE.write_text(page(results), encoding="utf-8")
    return 0


def next_batch(found: Batches, limit_bytes: float, others: Sequence[Batches] = (), doubling: bool = False) -> int | None:
    """The batch to compile next in a search for the largest that fits; None at its end.

    Args:
        found: what has been compiled.
        limit_bytes: the memory of a core.
        others: the same of other targets, which tell what an image takes.
        doubling: whether powers of two alone are compiled.
    """
    if not found:
        return 1
    fits, fails = bounds(found)
    if is_found(fits, fails, doubling):
        return None
    stats = found[str(fits)]
    assert stats is not None
    if stats["rematerialized"]:  # memory no longer tells where it ends
        guess = (fits + fails) // 2 if fails < MOST else fits + max(1, fits // 4)
    else:
        peaks = {int(batch): stats["peak_hbm_bytes"] for batches in (*others, found) for batch, stats in batches.items() if stats}
        near = max((batch for batch in peaks if peaks[batch] <= limit_bytes), default=fits)
        alone = peaks[1] - stats["argument_bytes"]
        guess = near + int((limit_bytes - peaks[near]) / ((peaks[near] - peaks[1]) / (near - 1) if near > 1 else alone))
    guess = min(max(guess, fits + 1), fails - 1)
    return max(2 ** (guess.bit_length() - 1), 2 * fits) if doubling else guess


def is_found(fits: int, fails: int, doubling: bool) -> bool:
    """Whether nothing is between the largest batch that fits and the smallest that does not."""
    return fails == ((2 * fits or 1) if doubling else fits + 1)


def bounds(found: Batches) -> tuple[int, int]:
    """The largest batch that is known to fit, 0 if none is, and the smallest that is known not to."""
    fits = max((int(batch) for batch, stats in found.items() if stats), default=0)
    return fits, min((int(batch) for batch, stats in found.items() if stats is None), default=MOST)


def _names(step: str) -> list[str]:
    return [entry.name for entry in registry.entries() if step == "eval" or entry.name in TRAINED]


def _compiled(name: str, step: str, column: str, batch: int) -> dict[str, Any] | None:
    """What the compiler says, in a process of its own, whose memory ends with it; None where it does not fit."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_compile, name, step, column, batch).result()


def _compile(name: str, step: str, column: str, batch: int) -> dict[str, Any] | None:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import dataclasses

    from tfmaskformer import aot
    from tfmaskformer.compile import default_size, program
    from tfmaskformer.config import MaskFormerConfig
    from tfmaskformer.model import MaskFormer

    start_s = time.monotonic()
    config = MaskFormerConfig.from_dict(registry.entry(name).config)
    model = MaskFormer(config, {"eval": "float32", "train": "mixed_bfloat16"}[step])
    model.build_parameters()
    function, specs = program(model, step, batch, default_size(config, step))
    try:
        stats = dataclasses.asdict(aot.compile_for_tpu(function, *specs, topology=column))
    except aot.TooLargeError:
        stats = None
    took = f"{time.monotonic() - start_s:.0f} s, {time.process_time():.0f} s of CPU"
    progress(f"{name} {step} {column} batch {batch}: {_peak(stats)}, {took}")
    return stats


def _peak(stats: Mapping[str, Any] | None) -> str:
    return f"{stats['peak_hbm_bytes'] / 2**30:.2f} GiB" + "*" * (stats["rematerialized"] > 0) if stats else "–"


def _largest(found: Batches, doubling: bool = False) -> str:
    """For the table: a number, or what is known of it."""
    fits, fails = bounds(found)
    if is_found(fits, fails, doubling):
        return str(fits) if fits else "–"
    return f"≥ {fits}" if fits > 1 else ""


def page(results: Mapping[str, Mapping[str, Mapping[str, Batches]]]) -> str:
    """The page that shows what has been compiled."""
    training = (
        "Forward pass, matcher, losses, gradients and update, bfloat16 with variables in float32, room for 100 objects an image. Of "
        "batches, powers of two. New values of variables are counted beside the old ones, which a TPU overwrites."
    )
    tables = [
        _table("eval", results, "Evaluation", "Network and post-processing, results as large as the canvas, float32."),
        _table("train", results, "Training", training),
    ]
    marks = {
        "GiB* |": "\\*: fits only because the compiler computes intermediate results again. ",
        "| – |": "–: does not fit. ",
        "| ≥ ": "≥: this batch fits; how much larger one may be has not been compiled. ",
        "|  |": "What is empty has not been compiled. ",
    }
    rows = [line for table in tables for line in table.splitlines() if line.startswith("| ") and line[2] != " "]  # but the headers
    legend = "".join(text for mark, text in marks.items() if any(mark in row for row in rows))
    return (
        "# Memory on a TPU\n\n"
        "Written by `python -m bench.tpu` and `python -m bench.tpu --step train`, which [compile](compile.md) for one core of a TPU that "
        "was not there: peak HBM of one image, and the largest batch of a core, behind which the next did not fit. The canvas is that of "
        f"the recipe. {legend}All that the compiler told is in [tpu_memory.json](tpu_memory.json).\n\n" + "\n".join(tables)
    )


def _table(step: str, results: Mapping[str, Any], title: str, text: str) -> str:
    from tfmaskformer.compile import default_size
    from tfmaskformer.config import MaskFormerConfig

    rows = []
    for name in _names(step):
        of = results.get(step, {}).get(name, {})
        height, width = default_size(MaskFormerConfig.from_dict(registry.entry(name).config), step)
        row = [name, f"{height}×{width}"]
        for column in COLUMNS[step]:
            found = of.get(column, {})
            row += [_peak(found["1"]) if "1" in found else "", _largest(found, step == "train")]
        one = of.get(COLUMNS[step][0], {}).get("1")
        rows.append([*row, f"{one['flops']:.2g}" if one else ""])
    header = ["", "canvas", *(cell for column in COLUMNS[step] for cell in (f"{column}: one image", "largest batch")), "flops of one image"]
    return section(title, text, header, rows)


if __name__ == "__main__":
    sys.exit(main())
