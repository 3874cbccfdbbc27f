"""What all tests share: quiet TensorFlow, and the official code where its place is given."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # results are judged on the CPU


@pytest.fixture(autouse=True)
def forgotten_graphs() -> Iterator[None]:
    """What a test traced ends with it: TensorFlow would keep each graph with a custom gradient, gigabytes in the course of all tests."""
    from parity import compiled

    before = compiled.traced_gradients() if "tensorflow" in sys.modules else set()
    yield
    if "tensorflow" in sys.modules:
        compiled.forget_gradients(compiled.traced_gradients() - before)


@pytest.fixture(scope="module")
def uncompiled() -> Iterator[None]:
    """Trains by plain graphs: compiling takes seconds, and XLA is free to round the sums of another program otherwise."""
    import tensorflow as tf

    from tests.tfmaskformer import training_processes
    from tfmaskformer.training import loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf, "function", tf.function)  # to be put back
        patch.setattr(loop, "LOG_PERIOD", 1)
        training_processes.plain(tf)
        yield
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})


@pytest.fixture(scope="session")
def official_sources() -> tuple[Path, Path]:
    """Folders of the official MaskFormer and Detectron2 code; skips where they or PyTorch are missing (CI has neither)."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs PyTorch for the official code")
    try:
        return Path(os.environ["MASKFORMER_SOURCE"]), Path(os.environ["DETECTRON2_SOURCE"])
    except KeyError as missing:
        pytest.skip(f"needs the official code: set {missing.args[0]}")
