"""Forward pass, losses and gradients of R50 panoptic on a GPU, as :mod:`bench.train` has them of a CPU; nothing where there is no GPU."""

from __future__ import annotations

import subprocess
import sys

from bench.common import progress, section
from bench.train import ENTRY, OBJECTS, PASSES, SIZE_PX, measured

BATCHES = (1, 8)
"""The second is an official GPU's part of a step."""


def main() -> int:
    """Measures and prints the section."""
    gpu = _gpu()
    if gpu is None:
        progress("no GPU here: nothing is measured on one")
        return 0
    text = (
        f"`python -m bench.gpu`, on {gpu}: {ENTRY}, photographs of {SIZE_PX}×{SIZE_PX} px with {OBJECTS} objects each, float32 (no TF32): "
        f"forward pass, matcher, losses and gradients of all parameters, with dropout; {PASSES} passes "
        "each, taken in turns. Ratio: of the medians, to the official code for the same batch."
    )
    print(section("Gradients on a GPU", text, ["", "median", "fastest", "ratio"], measured(BATCHES, gpu=True)))
    return 0


def _gpu() -> str | None:
    """Name of the first NVIDIA GPU of this machine."""
    try:
        found = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.partition("\n")[0].strip() or None


if __name__ == "__main__":
    sys.exit(main())
