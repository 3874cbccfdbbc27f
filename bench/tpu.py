"""What the official models take on a TPU: a table for all of them, compiled without one; see docs/compile.md.

``python -m bench.tpu`` compiles the evaluation step of each model for each target at the official test size, and looks for the largest
batch that fits: memory grows with the batch by about the same amount for each image, so two compilations tell about where it ends, and
the search goes on until the largest that fits and the next, which does not, have been compiled. Results are kept in
docs/tpu_memory.json; what is there is not compiled again. It takes some hours in all; the page is written after every model.
``--batch-1`` leaves the largest batches for another time.
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
from typing import Any

from bench.common import progress, section
from checkpoints import registry

TARGETS = ("v5e:2x2", "v4:2x2x1")
DOCS = pathlib.Path(__file__).parents[1] / "docs"
RESULTS, PAGE = DOCS / "tpu_memory.json", DOCS / "tpu_memory.md"
MOST = 4096
"""Images; no search goes beyond."""


def main() -> int:
    """Compiles what is missing; 0 if nothing is left."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.tpu", description="The memory that evaluation takes on TPUs, for all official models."
    )
    parser.add_argument("--batch-1", action="store_true", help="only the memory of one image, not the largest batch")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further model after this time")
    parser.add_argument("names", nargs="*", metavar="NAME", help="entries of the zoo (default: all)")
    arguments = parser.parse_args()
    start_s = time.monotonic()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in arguments.names or [entry.name for entry in registry.entries()]:
        for target in TARGETS:
            if time.monotonic() - start_s > 60 * arguments.minutes:
                return 0
            found = results.setdefault(name, {}).setdefault(target, {})
            if "stats" not in found:
                found["stats"] = _compiled(name, target, 1)
            if not arguments.batch_1 and "largest" not in found:
                found["largest"] = _largest(name, target, found["stats"])
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            PAGE.write_text(_page(results), encoding="utf-8")
            progress(f"{name} {target}: {found['stats'] and _gib(found['stats'])}, largest batch {found.get('largest')}")
    return 0


def _largest(name: str, target: str, one: dict[str, Any] | None) -> int:
    """The largest batch that compiles; 0 if none does."""
    if one is None:
        return 0
    sizes = {1: one["peak_hbm_bytes"]}
    fits, fails, guess = 1, MOST, 4
    while fails - fits > 1:
        if (compiled := _compiled(name, target, guess)) is None:
            fails = guess
        else:
            fits, sizes[guess] = guess, compiled["peak_hbm_bytes"]
        most = max(sizes)
        if most == 1 or fails - fits < 4:
            guess = (fits + fails) // 2
            continue
        an_image = (sizes[most] - sizes[1]) / (most - 1)
        guess = min(max(1 + int((_LIMITS[target] - sizes[1]) / an_image), fits + 1), fails - 1)
    return fits


_LIMITS = {"v5e:2x2": 15.75 * 2**30, "v4:2x2x1": 15.25 * 2**30}
"""Bytes of a core, with which a search begins; what fits is for the compiler to say."""


def _compiled(name: str, target: str, batch: int) -> dict[str, Any] | None:
    """What the compiler says, in a process of its own, whose memory ends with it; None where it does not fit."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_compile, name, target, batch).result()


def _compile(name: str, target: str, batch: int) -> dict[str, Any] | None:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import dataclasses

    from tfmaskformer import aot
    from tfmaskformer.compile import default_size, program
    from tfmaskformer.config import MaskFormerConfig
    from tfmaskformer.model import MaskFormer

    config = MaskFormerConfig.from_dict(registry.entry(name).config)
    model = MaskFormer(config)
    model.build_parameters()
    start_s = time.monotonic()
    step, specs = program(model, "eval", batch, default_size(config, "eval"))
    try:
        stats = dataclasses.asdict(aot.compile_for_tpu(step, *specs, topology=target))
    except aot.TooLargeError:
        stats = None
    progress(f"  {name} {target} batch {batch}: {stats and _gib(stats)}, {time.monotonic() - start_s:.0f} s")
    return stats


def _gib(stats: dict[str, Any]) -> str:
    return f"{stats['peak_hbm_bytes'] / 2**30:.2f} GiB"


def _page(results: dict[str, Any]) -> str:
    from tfmaskformer.compile import default_size
    from tfmaskformer.config import MaskFormerConfig

    rows = []
    for entry in registry.entries():
        of = results.get(entry.name, {})
        if not of:
            continue
        height, width = default_size(MaskFormerConfig.from_dict(entry.config), "eval")
        row = [entry.name, f"{height}×{width}"]
        for target in TARGETS:
            stats, largest = of.get(target, {}).get("stats"), of.get(target, {}).get("largest")
            row += [_gib(stats) + ("*" if stats["rematerialized"] else "") if stats else "–", "" if largest is None else str(largest)]
        row.append(f"{of[TARGETS[0]]['stats']['flops']:.2g}" if of.get(TARGETS[0], {}).get("stats") else "")
        rows.append(row)
    text = (
        "Written by `python -m bench.tpu`: the evaluation step (network and post-processing, results as large as the canvas, float32) of "
        "each official model, compiled for one core of a TPU that was not there: peak HBM of one image, and the largest batch that fits. "
        "\\*: fits only because the compiler computes intermediate results again. –: does not fit."
    )
    header = ["", "canvas", *(cell for target in TARGETS for cell in (f"{target}: one image", "largest batch")), "flops of one image"]
    return section("Memory on a TPU", text, header, rows).replace("## ", "# ", 1)


if __name__ == "__main__":
    sys.exit(main())
