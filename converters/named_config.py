"""The config that ``--config`` names: a zoo entry, an official YAML file, or a ``config.json``."""

from __future__ import annotations

import json
import pathlib

from checkpoints import registry
from converters.errors import ConversionError, quoted
from tfmaskformer.config import ConfigError, MaskFormerConfig
from tfmaskformer.official_config import read_config


def named_config(name: str) -> MaskFormerConfig:
    """The config called ``name``: of a zoo entry, in an official YAML file (``….yaml``) or in a JSON file (``….json``).

    Raises:
        ConversionError: no such entry, or a file that is no config.
    """
    try:
        if name.endswith((".yaml", ".yml")):
            return read_config(name)
        if name.endswith(".json"):
            return MaskFormerConfig.from_dict(json.loads(pathlib.Path(name).read_text(encoding="utf-8")))
        return MaskFormerConfig.from_dict(registry.entry(name).config)
    except registry.ZooError as error:
        raise ConversionError(str(error)) from None
    except OSError as error:
        raise ConversionError(f"cannot read the config {quoted(name)}: {error.strerror}") from None
    except (ConfigError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        if name.endswith(".json"):
            raise ConversionError(f"{quoted(name)} is no config: {error}", "expected what MaskFormerConfig.to_dict() gives") from None
        raise ConversionError(str(error)) from None
