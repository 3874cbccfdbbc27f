"""Records the traces ``tiny_…`` beside this file: official architectures at small widths.

MASKFORMER_SOURCE=… DETECTRON2_SOURCE=… python tests/golden/record_tiny.py [NAME…]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from checkpoints import registry, synthesize
from parity import official, record
from parity.inputs import parse_case

PHOTOS = Path(registry.__file__).parent / "photos"
CASES = {
    "tiny_swin": ("even=astronaut.png@96x128:3", "odd=chelsea.png@75x101:3"),
    "tiny_deeplab": ("even=astronaut.png@128x160:3", "odd=chelsea.png@101x139:3"),
    "tiny_per_pixel": ("odd=chelsea.png@75x93:5",),
    "tiny_per_pixel_plus": ("odd=chelsea.png@75x93:5", "batch=astronaut.png@67x90:4,coffee.png@81x70:0"),
}
"""Of each model. Odd ones are no multiples of 4; one image has no objects."""


def main(folder: Path, *names: str) -> None:
    for name in names or CASES:
        entry = registry.entry(name)
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "model_final.pkl"
            synthesize.write_pickle(synthesize.synthesize(entry), source)
            record.record(
                official.load(),
                entry.official_config.removeprefix("configs/"),
                source,
                [parse_case(case.replace("=", f"={PHOTOS}/").replace(",", f",{PHOTOS}/")) for case in CASES[name]],
                folder / name,
                options=entry.official_options,
                samples=32,
                command=["python", "tests/golden/record_tiny.py"],
            )


if __name__ == "__main__":
    main(Path(__file__).parent, *sys.argv[1:])
