"""What is known of the official checkpoints: entries of the model zoo, their data sets and their exact tensors.

All of it is data in this package (``entries/``, ``datasets/``, ``layouts/``), recorded from facebookresearch/MaskFormer's YAML files,
``MODEL_ZOO.md`` and the official code's own ``state_dict`` by ``python -m parity.record_zoo``. Adding an official model means adding data.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.resources
import json
import math
from typing import Any

import numpy as np

_V2_PREFIX = "sem_seg_head.pixel_decoder."
_V1_PREFIX = "sem_seg_head."


class ZooError(ValueError):
    """A name the zoo does not know, or data it cannot use; the message says what, where and the next step."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint: shape in PyTorch's layout, NumPy dtype name, and ``parameter`` (trained) or ``buffer``."""

    shape: tuple[int, ...]
    dtype: str
    kind: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """The classes of a data set, from Detectron2's and MaskFormer's built-in metadata.

    ``thing_classes`` are contiguous indices; empty where the official metadata names no things (semantic segmentation).
    ``colors`` are RGB, None where the official metadata has none. ``dataset_ids`` are the data set's own class ids in contiguous
    order, None where the ground truth is stored with contiguous ids. ``ignore_label`` None: the ground truth has no such value.
    """

    name: str
    official_name: str
    class_names: tuple[str, ...]
    thing_classes: tuple[int, ...]
    colors: tuple[tuple[int, int, int], ...] | None
    dataset_ids: tuple[int, ...] | None
    ignore_label: int | None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One checkpoint of the official model zoo.

    ``metrics``: published values in percent, by the zoo's column names (``mIoU``, ``mIoU (ms+flip)``, ``PQ``).
    ``file_hash``: the six hex digits in the file's name, which ``MODEL_ZOO.md`` calls a prefix of its MD5.
    ``config``: the fields of ``tfmaskformer.config.MaskFormerConfig``, as plain JSON types.
    ``official_config``: the YAML file in facebookresearch/MaskFormer; ``official_options``: keys and values that change it (Detectron2's
    ``merge_from_list``), empty for all but the test models. ``url`` and ``model_id`` are empty for those.
    ``sha256``: of the file at ``url``, in hex digits; empty where nobody has recorded it.
    """

    name: str
    task: str
    dataset: str
    backbone: str
    official_config: str
    official_options: tuple[Any, ...]
    model_id: str
    metrics: dict[str, float]
    url: str
    file_hash: str
    weights_license: str
    layout: str
    config: dict[str, Any]
    sha256: str = ""

    @property
    def num_parameters(self) -> int:
        """Elements of all trained tensors."""
        return sum(spec.size for spec in layout(self).values() if spec.kind == "parameter")


def entries() -> tuple[Entry, ...]:
    """All official entries that are covered, in the order of the model zoo."""
    return tuple(item for item in _entries().values() if item.url)


def entry(name: str) -> Entry:
    """The entry called ``name``: the official config's file name without ``.yaml``, or a test model's (``tiny_…``, ``shapes_panoptic``).

    >>> entry("maskformer_panoptic_R50_bs64_554k").metrics
    {'PQ': 46.5}

    Raises:
        ZooError: no entry has this name; the message has the nearest ones.
    """
    known = _entries()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or list(known)
        raise ZooError(f"no zoo entry '{name}'\n  nearest: {', '.join(nearest)}\n  all of them: tfmaskformer zoo list")
    return known[name]


def datasets() -> tuple[DatasetInfo, ...]:
    """All data sets of official models."""
    return tuple(_datasets().values())


def dataset(name: str) -> DatasetInfo:
    """The data set called ``name`` in ``Entry.dataset``.

    >>> dataset("coco_panoptic").class_names[:3]
    ('person', 'bicycle', 'car')

    Raises:
        ZooError: unknown name.
    """
    known = _datasets()
    if name not in known:
        raise ZooError(f"no data set '{name}'; known: {', '.join(known)}")
    return known[name]


def layout(of: Entry) -> dict[str, TensorSpec]:
    """Every tensor of the checkpoint by its official v2 key, in the order of the official ``state_dict``.

    >>> layout(entry("maskformer_R50_bs16_160k"))["sem_seg_head.predictor.class_embed.weight"]
    TensorSpec(shape=(151, 256), dtype='float32', kind='parameter')
    """
    symbols = {"classes": of.config["num_classes"], "classes+1": of.config["num_classes"] + 1}
    return {
        key: TensorSpec(tuple(symbols.get(dimension, dimension) for dimension in shape), dtype, kind)
        for key, shape, dtype, kind in _read("layouts", of.layout)["tensors"]
    }


MAX_WINDOW = 48
"""Patches on a side of a window; official models have 7 and 12. The index of all pairs has 8 · window⁴ bytes, which no file may choose."""


def relative_position_index(window_size: int) -> np.ndarray:
    """int64 [window_size², window_size²]: for a query and a key of one window, the row of Swin's table that has their bias.

    Rows count the offset from key to query, first down, then right, each from 1 − window_size. ZooError beyond :data:`MAX_WINDOW`.

    >>> relative_position_index(2).tolist()
    [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    """
    if not 0 < window_size <= MAX_WINDOW:
        raise ZooError(f"windows of {window_size} patches, expected 1 to {MAX_WINDOW}")
    row, column = np.divmod(np.arange(window_size**2), window_size)
    down = row[:, None] - row + window_size - 1
    right = column[:, None] - column + window_size - 1
    return (down * (2 * window_size - 1) + right).astype(np.int64)


def v1_key(key: str) -> str:
    """The name that a plain ``.pkl`` uses for the v2 key: the pixel decoder's tensors lie directly in the head.

    A plain dict carries no version, so the official head takes every file without one for v1 and renames its keys.

    >>> v1_key("sem_seg_head.pixel_decoder.layer_1.weight"), v1_key("sem_seg_head.predictor.query_embed.weight")
    ('sem_seg_head.layer_1.weight', 'sem_seg_head.predictor.query_embed.weight')
    """
    return _V1_PREFIX + key.removeprefix(_V2_PREFIX) if key.startswith(_V2_PREFIX) else key


def _read(folder: str, name: str) -> Any:
    return json.loads((importlib.resources.files("checkpoints") / folder / f"{name}.json").read_text(encoding="utf-8"))


def _names(folder: str) -> list[str]:
    files = (importlib.resources.files("checkpoints") / folder).iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


@functools.cache
def _datasets() -> dict[str, DatasetInfo]:
    def read(name):
        values = {field: _as_tuples(value) for field, value in _read("datasets", name).items() if field != "how_made"}
        return DatasetInfo(name=name, **values)

    return {name: read(name) for name in _names("datasets")}


@functools.cache
def _entries() -> dict[str, Entry]:
    read = [item for name in _names("entries") for item in _read("entries", name)["entries"]]
    return {item["name"]: _entry(item) for item in sorted(read, key=lambda item: item["order"])}


def _entry(item: dict[str, Any]) -> Entry:
    info = dataset(item["dataset"])
    config = item["config"] | {
        "name": item["name"],
        "dataset": info.name,
        "class_names": list(info.class_names),
        "thing_classes": list(info.thing_classes),
    }
    fields = {key: _as_tuples(value) for key, value in item.items() if key not in ("config", "order")}
    return Entry(**fields, config=config)


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value
