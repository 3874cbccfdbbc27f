"""The small trained model, with the official code: what it starts from, and that the committed file is as good as it says."""

from __future__ import annotations

import importlib.resources
import json

import numpy as np
import pytest

from parity import official, record_zoo, train_shapes


@pytest.fixture(scope="module")
def config(official_sources):
    code = official.load()
    path, options = record_zoo.TINY[train_shapes.NAME]
    config = code.config(code.maskformer / path)
    config.merge_from_list([*options, *train_shapes.SOLVER])
    return config


def test_frozen_norms_normalise_from_the_first_step(config):
    import torch
    from detectron2.layers import FrozenBatchNorm2d

    model = official.load().model(config, training=True)
    inputs = [train_shapes.official_inputs("train", index, training=True) for index in range(2)]
    train_shapes.calibrate_frozen_norms(model, inputs)
    seen = []

    def check(norm, arguments, output):
        seen.append(norm)
        variance, mean = torch.var_mean(output, dim=(0, 2, 3))
        assert mean.abs().max() < 1e-3
        np.testing.assert_allclose(variance.numpy(), 1, atol=0.02)

    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.register_forward_hook(check)
    with torch.no_grad():
        model(inputs)
    assert len(seen) == 53


def test_training_is_official(config):
    code = official.load()
    model = code.model(config, training=True)
    optimizer = code.trainer().build_optimizer(config, model)
    assert type(optimizer).__name__ == "FullModelGradientClippingOptimizer"
    decay = {name: group["weight_decay"] for (name, _), group in zip(_parameters(model), optimizer.param_groups, strict=True)}
    assert decay["sem_seg_head.predictor.query_embed.weight"] == decay["sem_seg_head.pixel_decoder.adapter_1.norm.weight"] == 0
    assert decay["backbone.res2.0.conv1.weight"] == 1e-4
    assert config.SOLVER.CLIP_GRADIENTS.CLIP_VALUE == 0.01


def _parameters(model):
    """In the order of modules, in which the official code makes a group of each."""
    return [
        (f"{prefix}.{name}", value) for prefix, module in model.named_modules() for name, value in module.named_parameters(recurse=False)
    ]


def test_committed_quality(config, monkeypatch):
    folder = importlib.resources.files("checkpoints") / "small"
    monkeypatch.setattr(train_shapes, "PARTS", (50,))
    found = train_shapes.evaluate(official.load().model(config, str(folder / f"{train_shapes.NAME}.pkl")))["first_50_images"]
    recorded = json.loads((folder / f"{train_shapes.NAME}.json").read_text(encoding="utf-8"))["validation"]["first_50_images"]
    for counts in ("true_positives", "false_positives", "false_negatives"):
        assert found[counts] == recorded[counts]
    np.testing.assert_allclose(found["iou"], recorded["iou"], rtol=1e-3)
