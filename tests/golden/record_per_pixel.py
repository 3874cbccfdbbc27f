"""Records ``tiny_per_pixel`` and ``tiny_per_pixel_plus`` beside this file: the official per-pixel baselines at small widths.

MASKFORMER_SOURCE=… DETECTRON2_SOURCE=… python tests/golden/record_per_pixel.py [FOLDER]
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
    "tiny_per_pixel": ("odd=chelsea.png@75x93:5",),
    "tiny_per_pixel_plus": ("odd=chelsea.png@75x93:5", "batch=astronaut.png@67x90:4,coffee.png@81x70:0"),
}
"""Heights and widths that are no multiples of 4, and one image without objects."""


def main(folder: Path) -> None:
    for name, cases in CASES.items():
        entry = registry.entry(name)
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "model_final.pkl"
            synthesize.write_pickle(synthesize.synthesize(entry), source)
            record.record(
                official.load(),
                entry.official_config.removeprefix("configs/"),
                source,
                [parse_case(case.replace("=", f"={PHOTOS}/").replace(",", f",{PHOTOS}/")) for case in cases],
                folder / name,
                options=entry.official_options,
                samples=32,
                command=["python", "tests/golden/record_per_pixel.py"],
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent)
