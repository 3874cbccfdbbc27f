"""The synthetic R50 panoptic checkpoint, converted, and the official code's trace of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints import registry, synthesize

ENTRY = "maskformer_panoptic_R50_bs64_554k"
TRACE = Path(__file__).parents[2] / "parity" / "traces" / ENTRY


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """The synthetic checkpoint in the official layout."""
    path = tmp_path_factory.mktemp("source") / "model_final.pkl"
    tensors = synthesize.synthesize(registry.entry(ENTRY))
    synthesize.write_pickle({registry.v1_key(key): tensor for key, tensor in tensors.items()}, path)
    return path


@pytest.fixture(scope="session")
def checkpoint(source) -> Path:
    """The same as a TensorFlow checkpoint."""
    from converters.convert import convert

    return Path(convert(str(source), str(source.parent / "tf_ckpt")).destination)


@pytest.fixture(scope="session")
def cases() -> dict[str, str]:
    """Names of the smallest cases of one image: "even" has sides that stride 8 divides, "odd" has two odd ones."""
    from parity.trace import Trace

    trace = Trace(TRACE)
    sizes = {name: [image["size_px"] for image in case["images"]] for name, case in trace.manifest["cases"].items()}
    single = sorted((height * width, name, height, width) for name, [(height, width), *more] in sizes.items() if not more)
    even = next(name for _, name, height, width in single if height % 8 == width % 8 == 0)
    odd = next(name for _, name, height, width in single if height % 2 == width % 2 == 1)
    return {"even": even, "odd": odd}
