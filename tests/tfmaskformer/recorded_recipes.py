"""What the tests of training share: official configs as trees, and what the official Trainer made of them."""

from __future__ import annotations

import json
from pathlib import Path

from checkpoints import registry
from tfmaskformer.official_yaml import decode, defaults

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS = json.loads((Path(__file__).parents[2] / "tfmaskformer" / "official_configs.json").read_text())["configs"]
RECORDED = json.loads((GOLDEN / "training" / "recipes.json").read_text())
TINY = ("tiny_panoptic", "tiny_semantic", "tiny_deeplab", "tiny_swin", "tiny_per_pixel", "tiny_per_pixel_plus")
ENTRIES = [*registry.entries(), *map(registry.entry, TINY)]


def official_tree(path, changes=()):
    tree = defaults()
    for key, value in {**CONFIGS[path], **dict(changes)}.items():
        *parents, last = key.split(".")
        inner = tree
        for parent in parents:
            inner = inner[parent]
        assert last in inner, key
        inner[last] = decode(value)
    return tree


def flat(tree, where=""):
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
    return found
