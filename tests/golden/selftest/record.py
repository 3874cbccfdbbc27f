"""Records the traces beside this file, on which ``parity-check selftest`` runs: the official code on small models and images.

    MASKFORMER_SOURCE=… DETECTRON2_SOURCE=… python tests/golden/selftest/record.py [NAME…]

Each folder is called after a test model and the seed of its synthetic weights.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from checkpoints import registry
from parity import official, record, selftest
from parity.inputs import parse_case

PHOTOS = Path(registry.__file__).parent / "photos"
CASES = {
    "tiny_panoptic_0": (
        "even=astronaut.png@64x96:3",
        "odd=astronaut.png@75x101:14",
        "batch=astronaut.png@67x90:4,coffee.png@81x70:0",
    ),
    "tiny_semantic_0": ("odd=chelsea.png@75x101:5",),
    "tiny_panoptic_9": ("batch=astronaut.png@49x71:2,chelsea.png@49x71:5",),
    "tiny_panoptic_1": ("one=chelsea.png@58x83:1",),
    "tiny_semantic_2": ("tall=astronaut.png@102x47:2",),
    "tiny_deeplab_3": ("wide=coffee.png@39x111:7",),
    "tiny_swin_4": ("one=chelsea.png@61x87:1",),
    "tiny_swin_5": ("none=coffee.png@85x66:0",),
    "tiny_per_pixel_6": ("even=astronaut.png@64x80:3",),
    "tiny_per_pixel_plus_7": ("tall=chelsea.png@95x43:2",),
    "tiny_panoptic_8": ("even=coffee.png@96x64:20",),
}
"""Folder → cases."""

SAMPLES = 2


def main(folder: Path, *names: str) -> None:
    code = official.load()
    for name in names or CASES:
        entry, seed = selftest.entry_and_seed(name)
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "model_final.pkl"
            selftest.write_source(entry, seed, source)
            record.record(
                code,
                entry.official_config.removeprefix("configs/"),
                source,
                [parse_case(case.replace("=", f"={PHOTOS}/").replace(",", f",{PHOTOS}/")) for case in CASES[name]],
                folder / name,
                options=entry.official_options,
                samples=SAMPLES,
                command=["python", "tests/golden/selftest/record.py", name],
            )


if __name__ == "__main__":
    main(Path(__file__).parent, *sys.argv[1:])
