"""Records the traces ``whole/…`` beside this file: official architectures at small widths, on one small image each. Of the float64 file the
taps are whole, so that modules can be replayed alone, and, but for Swin's, which are many, their gradients; of everything else there are
samples.

MASKFORMER_SOURCE=… DETECTRON2_SOURCE=… python tests/golden/record_whole.py [NAME…]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np

from checkpoints import registry, synthesize
from parity import official, record
from parity.inputs import parse_case
from parity.trace import TraceFileWriter

PHOTOS = Path(registry.__file__).parent / "photos"
CASES = {
    "tiny_panoptic": "odd=chelsea.png@33x45:2",
    "tiny_swin": "odd=chelsea.png@24x33:2",
    "tiny_deeplab": "odd=chelsea.png@17x26:1",
    "tiny_per_pixel": "odd=chelsea.png@17x26:1",
}


class WholeTaps(TraceFileWriter):
    """Samples everything but the taps of the float64 file and their gradients."""

    whole = ("taps", "tap_gradients")

    def _samples_of(self, group: str, name: str, array: np.ndarray) -> int | None:
        is_whole = self.dtype == "float64" and group in self.whole
        return None if is_whole else super()._samples_of(group, name, array)


def main(folder: Path, *names: str) -> None:
    for name in names or CASES:
        entry = registry.entry(name)
        WholeTaps.whole = ("taps",) if name == "tiny_swin" else ("taps", "tap_gradients")
        with tempfile.TemporaryDirectory() as scratch, mock.patch.object(record, "TraceFileWriter", WholeTaps):
            source = Path(scratch) / "model_final.pkl"
            synthesize.write_pickle(synthesize.synthesize(entry), source)
            record.record(
                official.load(),
                entry.official_config.removeprefix("configs/"),
                source,
                [parse_case(CASES[name].replace("=", f"={PHOTOS}/"))],
                folder / name,
                options=entry.official_options,
                samples=32,
                command=["python", "tests/golden/record_whole.py"],
            )


if __name__ == "__main__":
    main(Path(__file__).parent / "whole", *sys.argv[1:])
