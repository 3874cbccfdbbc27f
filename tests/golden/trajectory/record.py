"""Records the trainings beside this file: official architectures at small widths, from synthetic weights.

    OMP_WAIT_POLICY=PASSIVE MASKFORMER_SOURCE=… DETECTRON2_SOURCE=… python tests/golden/trajectory/record.py [NAME…]

The recipes are the official ones, but for a larger weight decay, which float32 can see, and a schedule that changes within 20 steps.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from checkpoints import registry, synthesize
from parity import official, trajectory_record
from parity.inputs import parse_case

PHOTOS = Path(registry.__file__).parent / "photos"
CASE = f"batch={PHOTOS}/astronaut.png@64x96:3,{PHOTOS}/chelsea.png@75x61:2"
RECIPE = ("SOLVER.WEIGHT_DECAY", 0.05, "SOLVER.WARMUP_FACTOR", 0.1)
OPTIONS = {
    "tiny_panoptic": (
        *("SOLVER.MAX_ITER", 40, "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", (8, 14), "SOLVER.WARMUP_ITERS", 5),
    ),
    "tiny_swin": ("SOLVER.MAX_ITER", 40, "SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.WARMUP_ITERS", 3),
    "tiny_swin_100": ("SOLVER.MAX_ITER", 120, "SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.WARMUP_ITERS", 10),
}
LONG = {"steps": 100, "trainings": ("plain",)}
"""Of ``tiny_swin_100``, which has two float32 trainings beside the reference."""


def main(folder: Path, *names: str) -> None:
    for name in names or OPTIONS:
        entry = registry.entry(name.removesuffix("_100"))
        if name.endswith("_100"):
            trajectory_record.RUNS["float32"] = trajectory_record.RUNS["float32"][:3:2]
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "model_final.pkl"
            synthesize.write_pickle(synthesize.synthesize(entry), source)
            trajectory_record.record_steps(
                official.load(),
                entry.official_config.removeprefix("configs/"),
                source,
                [parse_case(CASE)],
                folder / name,
                options=[*entry.official_options, *RECIPE, *OPTIONS[name]],
                command=["python", "tests/golden/trajectory/record.py"],
                **(LONG if name.endswith("_100") else {}),
            )


if __name__ == "__main__":
    main(Path(__file__).parent, *sys.argv[1:])
