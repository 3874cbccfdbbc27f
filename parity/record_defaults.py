"""Records the official defaults and what the official YAML files make of them, so that both are known without the official code.

    MASKFORMER_SOURCE=… DETECTRON2_SOURCE=… python -m parity.record_defaults \\
        tfmaskformer/official_defaults.json tfmaskformer/official_configs.json

The first file has every key of ``get_cfg``, ``add_deeplab_config`` and ``add_mask_former_config``; the second has, for each YAML file in
MaskFormer's ``configs/``, the keys to which ``merge_from_file`` gives another value. JSON has no tuples: they are text, as in YAML files.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
from typing import Any

from parity import official
from tfmaskformer.official_yaml import decode


def tree(cfg: Any) -> dict[str, Any]:
    """An official config node as nested dicts."""
    return {key: tree(value) if isinstance(value, dict) else value for key, value in cfg.items()}


def changes(values: dict[str, Any], defaults: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Dotted key → value, where it is another than the default."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= changes(value, defaults[key], f"{where}{key}.")
        elif value != defaults[key]:
            found[where + key] = value
    return found


def encode(value: Any) -> Any:
    """JSON types; :func:`tfmaskformer.official_yaml.decode` leads back."""
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    encoded = repr(value) if isinstance(value, tuple) else value
    assert decode(encoded) == value
    assert type(decode(encoded)) is type(value)
    return encoded


def official_defaults() -> Any:
    """The official config node with nothing but defaults; :func:`parity.official.load` was called before."""
    from detectron2.config import get_cfg
    from detectron2.projects.deeplab import add_deeplab_config
    from mask_former import add_mask_former_config

    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_mask_former_config(cfg)
    return cfg


def main(argv: list[str] | None = None) -> int:
    """Writes the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("defaults", type=pathlib.Path)
    parser.add_argument("configs", type=pathlib.Path)
    arguments = parser.parse_args(argv)
    code = official.load()
    how_made = "python -m parity.record_defaults tfmaskformer/official_defaults.json tfmaskformer/official_configs.json, " + ", ".join(
        f"{name} {commit}" for name, commit in code.commits.items()
    )
    defaults = tree(official_defaults())
    _write(arguments.defaults, {"how_made": how_made, "defaults": encode(defaults)})
    configs = {}
    for path in sorted(code.maskformer.glob("configs/**/*.yaml")):
        cfg = official_defaults()
        cfg.merge_from_file(str(path))
        configs[str(path.relative_to(code.maskformer))] = encode(changes(tree(cfg), defaults))
    _write(arguments.configs, {"how_made": how_made, "configs": configs})
    return 0


def _write(path: pathlib.Path, value: dict[str, Any]) -> None:
    """JSON whose innermost lists take one line."""
    text = json.dumps(value, indent=1, sort_keys=True)
    path.write_text(_joined(text) + "\n", encoding="utf-8")


def _joined(text: str) -> str:
    return re.sub(r"\[[^][{}]*\]", lambda match: re.sub(r"\s+", " ", match[0]).replace("[ ", "[").replace(" ]", "]"), text)


if __name__ == "__main__":
    raise SystemExit(main())
