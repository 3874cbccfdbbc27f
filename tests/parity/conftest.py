"""The synthetic R50 panoptic checkpoint, converted, and the official code's trace of it on small images."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from checkpoints import registry, synthesize

ENTRY = "maskformer_panoptic_R50_bs64_554k"
TRACE = Path(__file__).parents[1] / "golden" / "small_R50"


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

    return Path(convert(source, source.parent / "tf_ckpt").destination)


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """Name of a test model → its synthetic checkpoint, as a TensorFlow checkpoint."""
    from converters.convert import convert

    folder = tmp_path_factory.mktemp("converted")

    @functools.cache
    def make(name: str) -> Path:
        synthesize.write_pickle(synthesize.synthesize(registry.entry(name)), folder / f"{name}.pkl")
        return Path(convert(folder / f"{name}.pkl", folder / name, config=name).destination)

    return make
