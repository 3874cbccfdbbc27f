"""Records what the official loader does with files of backbone weights, and small files as PyTorch writes them.

    MASKFORMER_SOURCE=… DETECTRON2_SOURCE=… python -m parity.record_init tests/golden

``init_checkpoints.json``: for each entry of the zoo, what Detectron2's matching by suffix fills from a file in the layout of the published
backbone weights (:func:`init_layout`). ``torch/``: the same few tensors in every kind of file that PyTorch and ``pickle`` make of them.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import pickle
from typing import Any

from checkpoints import registry
from parity import official

PRETRAIN_SIZE_PX = {7: 224, 12: 384}
"""Swin's window → the size of its training images; other windows occur in test models only."""


def init_layout(entry: registry.Entry) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor in the file that a model of this entry starts from.

    ResNets: the backbone's tensors without ``backbone.``, and the classifier ``stem.fc``, as Detectron2's
    ``tools/convert-torchvision-to-d2.py`` writes them. Swin: the names of its authors' files, which have one norm in front of the
    classifier instead of one for each level, and the masks of shifted windows.
    """
    shapes = {name: spec.shape for name, spec in registry.layout(entry).items() if name.startswith("backbone.")}
    shapes = {name.removeprefix("backbone."): shape for name, shape in shapes.items()}
    backbone = entry.config["backbone"]
    if backbone["name"] == "ResNet":
        channels = shapes["res5.0.conv3.weight"][0]
        return shapes | {"stem.fc.weight": (1000, channels), "stem.fc.bias": (1000,)}
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("norm")}
    window, channels = backbone["window_size"], 8 * backbone["embed_dim"]
    grid = PRETRAIN_SIZE_PX.get(window, 32 * window) // 4
    for stage, depth in enumerate(backbone["depths"]):
        if grid > window:
            masks = range(1, depth, 2)
            shapes |= {f"layers.{stage}.blocks.{block}.attn_mask": ((grid // window) ** 2, window**2, window**2) for block in masks}
        grid //= 2
    classes = 21841 if window == 12 else 1000
    return shapes | {"norm.weight": (channels,), "norm.bias": (channels,), "head.weight": (classes, channels), "head.bias": (classes,)}


def loaded(entry: registry.Entry) -> dict[str, list[str]]:
    """What Detectron2 fills from such a file: by names and shapes only, no value exists."""
    import torch
    from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts

    model = {name: torch.empty(spec.shape, device="meta") for name, spec in registry.layout(entry).items()}
    file = {name: torch.empty(shape, device="meta") for name, shape in init_layout(entry).items()}
    with official._quiet():
        result = align_and_update_state_dicts(model, dict(file), c2_conversion=False)
    return {
        "backbone_not_filled": sorted(name for name in model if name.startswith("backbone.") and name not in result),
        "filled_elsewhere": sorted(name for name in model if not name.startswith("backbone.") and name in result),
        "other_name_than_backbone": sorted(
            name for name in file if f"backbone.{name}" in result and result[f"backbone.{name}"] is not file[name]
        ),
        "not_used": sorted(name for name in result if name not in model),
    }


def torch_tensors() -> dict[str, Any]:
    """Tensors of every element type that NumPy has, and of every kind of storage: shared, strided, empty."""
    import torch

    values = torch.arange(24, dtype=torch.float32)
    return {
        "matrix": values.reshape(4, 6),
        "transposed": values.reshape(4, 6).T,
        "channels_last": torch.arange(48.0).reshape(2, 2, 3, 4).to(memory_format=torch.channels_last),
        "tail": values[20:],
        "parameter": torch.nn.Parameter(torch.tensor([1.5, -2.0])),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "double": torch.tensor([0.1, 0.2], dtype=torch.float64),
        "half": torch.tensor([1.5], dtype=torch.float16),
        "long": torch.tensor([[1, -2]]),
        "bool": torch.tensor([True, False]),
    }


def main(argv: list[str] | None = None) -> int:
    """Writes the files into the folder given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", type=pathlib.Path, help="tests/golden")
    destination = parser.parse_args(argv).destination
    code = official.load()
    import torch

    how_made = f"python -m parity.record_init tests/golden, at facebookresearch/detectron2 {code.commits['detectron2']}"
    entries = {name: loaded(registry.entry(name)) for name in [*(entry.name for entry in registry.entries()), *TINY]}
    text = json.dumps({"how_made": how_made, "entries": entries}, indent=1)
    (destination / "init_checkpoints.json").write_text(text + "\n", encoding="utf-8")
    folder = destination / "torch"
    folder.mkdir(exist_ok=True)
    tensors = torch_tensors()
    state = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}
    torch.save(tensors, folder / "state_dict.pth")
    torch.save({"model": tensors, "optimizer": state, "iteration": 5}, folder / "checkpoint.pth")
    torch.save(tensors, folder / "old.pth", _use_new_zipfile_serialization=False)
    for protocol in range(6):
        contents = {"model": tensors, "__author__": "third_party", "matching_heuristics": True}
        (folder / f"tensors_protocol{protocol}.pkl").write_bytes(pickle.dumps(contents, protocol))
    return 0


TINY = ("tiny_panoptic", "tiny_deeplab", "tiny_swin", "tiny_per_pixel")

if __name__ == "__main__":
    raise SystemExit(main())
