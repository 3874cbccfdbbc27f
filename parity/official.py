"""The official code as an oracle: facebookresearch/MaskFormer on facebookresearch/detectron2, imported from two source folders.

Nothing of it is copied or changed, and Detectron2's compiled extension is not needed. What the two import but these models never
use, and what is missing here, is replaced by a stand-in (:data:`STAND_INS`) that raises when it is used after all, or, for a few small
functions, works (:data:`WORKING`).

PyTorch is imported when a function here needs it, not before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import logging
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from converters.unpickle import read_model
from tfmaskformer.data import shapes

STAND_INS = {
    "torchvision": "RoI pooling, NMS, deformable convolution: no MaskFormer has them; the loss calls its _is_tracing, which answers False",
    "torchvision.ops": "see torchvision",
    "torchvision.ops.boxes": "see torchvision",
    "timm": "Swin backbones only: DropPath, to_2tuple, trunc_normal_, which have working stand-ins",
    "timm.models": "see timm",
    "timm.models.layers": "see timm",
    "cv2": "colour augmentation of training images (PointRend's ColorAugSSDTransform)",
}
"""Module → what it is imported for. Where it is not installed, a stand-in takes its place while the official code is imported."""

FOLDERS = {"maskformer": "MASKFORMER_SOURCE", "detectron2": "DETECTRON2_SOURCE"}
"""Source folder → environment variable that names it."""


class OfficialError(RuntimeError):
    """The official code, a config or a checkpoint cannot be used; the message says which, why and the next step."""


class OfficialUnavailable(OfficialError):  # noqa: N818 it reads as what it is
    """A package that the official code needs is not installed."""


class StateEntry(NamedTuple):
    """One tensor of the official ``state_dict``; ``kind`` is "parameter" or "buffer"."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Official:
    """The imported official code.

    Attributes:
        maskformer, detectron2: the source folders.
        commits: for each folder its git commit, or "unknown, tree sha256 …" of its Python files; " (modified)" where git sees changes.
        stand_ins: the modules that were replaced.
    """

    maskformer: Path
    detectron2: Path
    commits: dict[str, str]
    stand_ins: tuple[str, ...]

    def config(self, name: str | Path) -> Any:
        """The official ``CfgNode`` of a YAML file, on the CPU and without a weights file.

        Args:
            name: path of the file, or its path below the ``configs`` folder of MaskFormer, with or without ``.yaml``.
        """
        from detectron2.config import get_cfg
        from detectron2.projects.deeplab import add_deeplab_config
        from mask_former import add_mask_former_config

        candidates = [base / f"{name}{suffix}" for base in (self.maskformer / "configs", Path()) for suffix in ("", ".yaml")]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            known = sorted(str(file.relative_to(self.maskformer / "configs")) for file in self.maskformer.glob("configs/*/**/*_bs*.yaml"))
            raise OfficialError(f"no official config '{name}'; known: {', '.join(known)}")
        config = get_cfg()
        add_deeplab_config(config)
        add_mask_former_config(config)
        with _quiet():
            config.merge_from_file(str(path))
        config.MODEL.DEVICE = "cpu"
        config.MODEL.WEIGHTS = ""
        return config

    def model(
        self,
        config: Any,
        checkpoint: str | Path | None = None,
        *,
        dtype: str = "float32",
        channels_last: bool = False,
        training: bool = False,
        seed: int = 0,
    ) -> Any:
        """The official model (``torch.nn.Module``), with random weights unless there is a ``checkpoint``.

        A float64 model is the float32 one, cast: its weights, and the pixel mean and deviation, are float32 numbers. The
        position embedding computes in float32 in any case.

        Args:
            config: from :meth:`config`.
            checkpoint: a ``.pkl`` or ``.pth`` file, read and renamed by the official ``DetectionCheckpointer``; a pickle that could
                run code is refused before.
            dtype: "float32" or "float64".
            channels_last: the memory format of the weights, which the activations follow.
            training: training mode, with dropout.
            seed: of the random weights.

        Raises:
            OfficialError: the checkpoint cannot be read, keys are missing or unexpected in it, or a shape differs.
        """
        import torch
        from detectron2.modeling import build_model

        with _quiet():
            torch.manual_seed(seed)
            model = build_model(config)
            if checkpoint is not None:
                _load_checkpoint(model, Path(checkpoint))
        model.train(training)
        return model.to(getattr(torch, dtype), memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def state_layout(self, name: str | Path) -> list[StateEntry]:
        """Key, shape, dtype and kind of every tensor in the official ``state_dict`` of a config, in its order."""
        model = self.model(self.config(name))
        parameters = {key for key, _ in model.named_parameters()}
        return [
            StateEntry(key, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), "parameter" if key in parameters else "buffer")
            for key, tensor in model.state_dict().items()
        ]

    def trainer(self) -> Any:
        """The class ``Trainer`` of ``train_net.py``, whose class methods build the official optimizer and learning-rate schedule."""
        with _importable(self.maskformer, self.detectron2):
            return importlib.import_module("train_net").Trainer

    def metadata(self, config: Any) -> dict[str, Any]:
        """What Detectron2's catalog knows of a config's training data set: ``dataset``, ``thing_classes``, ``class_names``.

        ``thing_classes`` are the contiguous ids that panoptic inference takes for things; empty for a semantic data set.
        """
        from detectron2.data import MetadataCatalog

        dataset = config.DATASETS.TRAIN[0]
        metadata = MetadataCatalog.get(dataset)
        things = sorted(metadata.get("thing_dataset_id_to_contiguous_id", {}).values())
        return {"dataset": dataset, "thing_classes": things, "class_names": list(metadata.get("stuff_classes", []))}


def load(maskformer: str | Path | None = None, detectron2: str | Path | None = None) -> Official:
    """Imports the official code, once in a process.

    Args:
        maskformer: folder of facebookresearch/MaskFormer; default: environment variable ``MASKFORMER_SOURCE``.
        detectron2: folder of facebookresearch/detectron2; default: ``DETECTRON2_SOURCE``.

    Raises:
        OfficialError: a folder is not given or not what it should be, a needed package is not installed, or the official code was
            imported from elsewhere before.
    """
    folders = {}
    for (name, variable), given in zip(FOLDERS.items(), (maskformer, detectron2), strict=True):
        value = given or os.environ.get(variable)
        package = "mask_former" if name == "maskformer" else "detectron2"
        if not value:
            raise OfficialError(
                f"no folder given for the official code: clone facebookresearch/{'MaskFormer' if name == 'maskformer' else name} "
                f"and give its path as --{name} or in {variable}"
            )
        if not (Path(value) / package / "__init__.py").is_file():
            raise OfficialError(f"'{value}' is no source folder of {name}: it has no {package}/__init__.py")
        folders[name] = Path(value).resolve()
    return _load(folders["maskformer"], folders["detectron2"])


def state_layout(config_path: str | Path) -> list[StateEntry]:
    """:meth:`Official.state_layout` of the code that the environment variables name."""
    return load().state_layout(config_path)


@functools.cache
def _load(maskformer: Path, detectron2: Path) -> Official:
    if importlib.util.find_spec("torch") is None:
        raise OfficialUnavailable("the official code needs PyTorch: pip install 'tfmaskformer[torch]'")
    with _importable(maskformer, detectron2) as stand_ins:
        for name, folder in (("detectron2", detectron2), ("mask_former", maskformer), ("detectron2.projects.deeplab", detectron2)):
            module = importlib.import_module(name)
            if not Path(str(module.__file__)).resolve().is_relative_to(folder):
                raise OfficialError(f"'{name}' was imported from '{module.__file__}' before; give that folder, or start a new process")
    _register_shapes()
    commits = {"maskformer": _commit(maskformer), "detectron2": _commit(detectron2)}
    return Official(maskformer, detectron2, commits, stand_ins)


def _register_shapes() -> None:
    """Tells Detectron2's catalog of the generated data set, as it knows COCO's classes."""
    from detectron2.data import MetadataCatalog

    names, colors = ([getattr(category, field) for category in shapes.CATEGORIES] for field in ("name", "color"))
    ids = {category.id: index for index, category in enumerate(shapes.CATEGORIES)}
    things = {category.id: ids[category.id] for category in shapes.CATEGORIES if category.isthing}
    MetadataCatalog.get("shapes_train").set(
        thing_classes=names,
        stuff_classes=names,
        thing_colors=colors,
        stuff_colors=colors,
        thing_dataset_id_to_contiguous_id=things,
        stuff_dataset_id_to_contiguous_id={key: index for key, index in ids.items() if key not in things},
        ignore_label=255,
    )


@contextlib.contextmanager
def _importable(maskformer: Path, detectron2: Path) -> Iterator[tuple[str, ...]]:
    """Puts the two folders on the path, and stand-ins in place of what is missing; gives the names of these."""
    missing = [name for name in STAND_INS if importlib.util.find_spec(name.partition(".")[0]) is None]
    stand_ins = {name: _StandIn(name) for name in missing}
    for name, stand_in in stand_ins.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(stand_ins[parent], child, stand_in)
    write_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the folders stay as they are
    sys.path[:0] = [str(maskformer), str(detectron2)]
    sys.modules.update(stand_ins)
    try:
        with _quiet():
            yield tuple(missing)
    except ModuleNotFoundError as error:
        raise OfficialUnavailable(f"the official code needs '{error.name}': pip install 'tfmaskformer[torch]'") from error
    finally:
        sys.dont_write_bytecode = write_bytecode
        sys.path.remove(str(maskformer))
        sys.path.remove(str(detectron2))
        for name in stand_ins:
            del sys.modules[name]


class _StandIn(types.ModuleType):
    """A module whose attributes exist, so that they can be imported, and raise when they are called."""

    __version__ = "0"  # Detectron2 asks OpenCV for it

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__: list[str] = []  # a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if make := WORKING.get((self.__name__, name)):
            return make()
        return _StandInAttribute(f"{self.__name__}.{name}")


def _drop_path() -> type:
    """Stochastic depth: in training, each sample of the batch is dropped as a whole, and what remains scaled up."""
    import torch

    class DropPath(torch.nn.Module):
        def __init__(self, drop_prob: float = 0.0):
            super().__init__()
            self.drop_prob = drop_prob

        def forward(self, inputs: Any) -> Any:
            if not self.training or self.drop_prob == 0:
                return inputs
            kept = inputs.new_empty(inputs.shape[:1] + (1,) * (inputs.ndim - 1)).bernoulli_(1 - self.drop_prob)
            return inputs * kept / (1 - self.drop_prob)

    return DropPath


def _trunc_normal() -> Any:
    import torch

    return torch.nn.init.trunc_normal_


WORKING = {
    ("torchvision", "_is_tracing"): lambda: lambda: False,
    ("timm.models.layers", "DropPath"): _drop_path,
    ("timm.models.layers", "to_2tuple"): lambda: lambda value: value if isinstance(value, tuple) else (value, value),
    ("timm.models.layers", "trunc_normal_"): _trunc_normal,
}
"""(module, attribute) → what makes a stand-in that works, for the few that the official code does call."""


class _StandInAttribute:
    def __init__(self, name: str):
        self._name = name

    def __call__(self, *_: Any, **__: Any) -> Any:
        module = self._name.rpartition(".")[0]
        raise OfficialError(
            f"the official code called {self._name}, which is a stand-in ({STAND_INS[module]}); install {module.partition('.')[0]}"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps deprecation warnings, and what the official code logs of its YAML reader and of renaming old keys, to itself."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _load_checkpoint(model: Any, path: Path) -> None:
    from detectron2.checkpoint import DetectionCheckpointer

    class StrictCheckpointer(DetectionCheckpointer):
        """The official loader, except that what it only warns of raises."""

        def _log_incompatible_keys(self, incompatible: Any) -> None:
            faults = {
                "missing": incompatible.missing_keys,
                "unexpected": incompatible.unexpected_keys,
                "misshapen": incompatible.incorrect_shapes,
            }
            found = "; ".join(f"{len(keys)} {fault}: {', '.join(map(str, keys[:3]))}" for fault, keys in faults.items() if keys)
            if found:
                raise OfficialError(f"'{path}' does not fit the official model ({found}); is it the checkpoint of this config?")

    if not path.is_file():
        raise OfficialError(f"no checkpoint '{path}'")
    try:
        if path.suffix == ".pkl":
            read_model(path.read_bytes())  # refuses what is more than arrays; the official loader would run it
        StrictCheckpointer(model, save_to_disk=False).load(str(path))
    except OfficialError:
        raise
    except Exception as error:  # whatever pickle, PyTorch and the official loader raise
        raise OfficialError(f"the official loader cannot load '{path}': {error}") from error


def _commit(folder: Path) -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() == folder:
            return git("rev-parse", "HEAD") + (" (modified)" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder).as_posix()}\n".encode() + file.read_bytes())
    return f"unknown, tree sha256 {digest.hexdigest()}"
