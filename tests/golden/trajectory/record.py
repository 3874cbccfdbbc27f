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
RECIPE = ("SOLVER.WEIGHT_DECAY", 0.05, "SOLVER.MAX_ITER", 40, "SOLVER.WARMUP_FACTOR", 0.1)
OPTIONS = {
    "tiny_panoptic": ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", (8, 14), "SOLVER.WARMUP_ITERS", 5),
    "tiny_swin": ("SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.WARMUP_ITERS", 3),
}


def main(folder: Path, *names: str) -> None:
    for name in names or OPTIONS:
        entry = registry.entry(name)
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
            )


if __name__ == "__main__":
    main(Path(__file__).parent, *sys.argv[1:])
