"""Ports of other models: the part of a port's description that conversion needs, and the conversion.

The same strict engine as for MaskFormer (:mod:`converters.rules`), for any model that is a tree of Keras layers. A variable's name is the
path of attributes that leads to it, and its own: ``encoder.blocks.0.attn.kernel``; in functional and sequential models layers go by their
names.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

import tfmaskformer
from converters.destination import Destination
from converters.errors import ConversionError, printable, quoted
from converters.rules import Drop, Move, Rule, first, plan
from converters.source import open_source
from converters.tensor import sha256_of

if TYPE_CHECKING:
    import keras

FORMAT = "tfmaskformer-port"
VERSION = 1
WEIGHTS_FILE = "model.weights.h5"
MANIFEST_FILE = "manifest.json"
ATTRIBUTE = "PORT"
"""What a port's file calls its description."""

_LISTS_OF_KERAS = ("_layers", "_operations", "_operations_by_depth", "_tracked", "_functional", "_tracker")
"""Attributes in which Keras lists layers that are attributes of other names too."""


class Ported(Protocol):
    """What conversion asks of a port; :class:`parity.ports.Port` is one.

    Attributes:
        name: of the model.
        rules: name in the official file → name of the variable, one line a pattern.
        drops: what the official file has and the port does not need.
    """

    @property
    def name(self) -> str: ...
    @property
    def rules(self) -> Sequence[Rule]: ...
    @property
    def drops(self) -> Sequence[Drop]: ...
    def new(self, dtype: str) -> Any:
        """The TensorFlow model with all its variables, at any values."""


def read(place: str) -> Any:
    """The port that a Python file or an importable module describes under the name ``PORT``. The file is run: it must be trusted.

    Modules that lie beside the file can be imported by it.

    Args:
        place: path of a file, or the name of a module.

    Raises:
        ConversionError: there is none.
    """
    path = pathlib.Path(place)
    try:
        if path.suffix != ".py":
            module = importlib.import_module(place)
        else:
            folder = str(path.resolve().parent)
            if folder not in sys.path:
                sys.path.insert(0, folder)
            # Under a name that hides no other module. dataclasses looks for the module of a class there.
            name = f"_port_{path.stem}"
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except BaseException:
                sys.modules.pop(name, None)
                raise
    except (Exception, SystemExit) as error:  # whatever the file does
        raise ConversionError(f"cannot read the port {quoted(place)}: {error!r}", "name a Python file that can be run") from error
    if not hasattr(module, ATTRIBUTE):
        raise ConversionError(f"{quoted(place)} describes no port: it has no {ATTRIBUTE}", f"write {ATTRIBUTE} = Port(…) in it")
    return getattr(module, ATTRIBUTE)


def layers_of(layer: keras.layers.Layer) -> Iterator[tuple[str, keras.layers.Layer]]:
    """The layers just below a layer, by name: of functional and sequential models their own names, else the attributes'."""
    import keras

    if hasattr(layer, "operations") or isinstance(layer, keras.Sequential):
        yield from ((child.name, child) for child in layer.layers)
        return
    for name, value in vars(layer).items():
        if name not in _LISTS_OF_KERAS and not name.startswith("_self_"):  # TensorFlow's lists of the same
            yield from _layers_in(name, value)


def _layers_in(name: str, value: Any) -> Iterator[tuple[str, keras.layers.Layer]]:
    import keras

    if isinstance(value, keras.layers.Layer):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _layers_in(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _layers_in(f"{name}.{index}", item)


def named_layers(root: keras.layers.Layer) -> dict[str, keras.layers.Layer]:
    """Path → layer of all that lie below ``root``, each once, and ``root`` itself as ""."""
    named: dict[str, keras.layers.Layer] = {}
    seen: set[int] = set()

    def visit(path: str, layer: keras.layers.Layer) -> None:
        if id(layer) in seen:
            return
        seen.add(id(layer))
        named[path] = layer
        for name, child in layers_of(layer):
            visit(f"{path}.{name}" if path else name, child)

    visit("", root)
    return named


def named_variables(root: keras.layers.Layer) -> dict[str, keras.Variable]:
    """Name → weight of a model that is built.

    Raises:
        ConversionError: two have one name, or a weight belongs to no layer that can be named.
    """
    named: dict[str, keras.Variable] = {}
    for path, layer in named_layers(root).items():
        below = {id(variable) for child in layer._flatten_layers(include_self=False) for variable in child.weights}
        for variable in layer.weights:
            if id(variable) in below:
                continue
            name = f"{path}.{variable.name}" if path else variable.name
            if name in named:
                raise ConversionError(f"two variables are called {quoted(name)}", "give the layers other names")
            named[name] = variable
    ids = {id(variable) for variable in named.values()}
    if lost := [variable.path for variable in root.weights if id(variable) not in ids]:
        raise ConversionError(f"no attribute leads to {', '.join(map(quoted, lost[:3]))}", "make their layers attributes of the model")
    return named


def moves(port: Ported, names: Sequence[str]) -> dict[str, Move]:
    """Variable → where it comes from.

    Raises:
        ConversionError: a variable without a rule, or with several.
    """
    found: dict[str, Move] = {}
    problems = []
    for name in names:
        fitting = [(rule, source) for rule in port.rules if (source := rule.source_of(name)) is not None]
        if len(fitting) == 1:
            [(rule, source)] = fitting
            found[name] = Move(source, name, rule.transform)
        else:
            problems.append(f"{len(fitting) or 'no'} rules fill {quoted(name)}")
    if problems:
        raise ConversionError(f"the rules of port {quoted(port.name)} do not fit its TensorFlow model", *first(problems))
    return found


def convert(port: Ported, source: str | pathlib.Path, destination: str | pathlib.Path | None, *, force: bool = False) -> dict[str, Any]:
    """Converts an official checkpoint; returns the manifest.

    Args:
        port: the model.
        source: any file that :func:`converters.source.open_source` reads. float32, or a type that float32 holds exactly.
        destination: a directory with ``model.weights.h5``, which Keras loads, and ``manifest.json``. It appears whole, after it was re-read
            and every variable found equal, or not at all. None: a dry run.
        force: whether to replace what an earlier conversion wrote there.

    Raises:
        ConversionError: the file does not fit the rules or the model, or cannot be read; nothing was written.
    """
    place = destination and Destination(destination, force, (WEIGHTS_FILE, MANIFEST_FILE))
    model = port.new("float32")
    variables = named_variables(model)
    shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
    with open_source(pathlib.Path(source)) as file:
        todo = plan(port.rules, port.drops, file.tensors, shapes)
        values, problems = {}, []
        for move in todo:
            tensor = np.asarray(file.tensors[move.source])
            value = move.transform.apply(tensor).astype(np.float32)
            values[move.target] = value
            if not np.isfinite(tensor).all():
                problems.append(f"{quoted(move.source)} {tensor.shape} has values that are not finite")
            elif not np.array_equal(value.astype(tensor.dtype), move.transform.apply(tensor)):
                problems.append(f"{quoted(move.source)} is {tensor.dtype.name}, which float32 does not hold exactly")
        if problems:
            raise ConversionError(f"{quoted(source)} cannot be converted", *first(problems), "use an earlier file, or round the weights")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "tool": {"name": "tfmaskformer", "version": tfmaskformer.__version__},
            "port": port.name,
            "source": {"file": file.path.name, "bytes": file.size_bytes, "sha256": file.sha256()},
            "tensors": [
                {
                    "source": move.source,
                    "target": move.target,
                    "transform": move.transform.name,
                    "source_shape": list(file.tensors[move.source].shape),
                    "target_shape": list(shapes[move.target]),
                    "sha256": sha256_of(values[move.target]),
                }
                for move in todo
            ],
            "dropped": [{"source": drop.source, "reason": drop.reason} for drop in port.drops],
        }
    if place is None or not place:
        return manifest
    for name, variable in variables.items():
        variable.assign(values[name])
    with place.staging() as directory:
        _saved(model).save_weights(str(directory / WEIGHTS_FILE))
        (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        again = named_variables(load(port, directory, "float32"))
        if wrong := [name for name, value in values.items() if again[name].numpy().tobytes() != value.tobytes()]:
            raise ConversionError("the checkpoint just written holds other values than intended", *wrong[:10], "the disk may be failing")
        place.commit(directory)
    return manifest


def load(port: Ported, directory: str | pathlib.Path, dtype: str) -> Any:
    """The TensorFlow model with the weights of a directory that :func:`convert` wrote, in "float32" or "float64".

    Raises:
        ConversionError: the directory holds no such checkpoint, or that of another port.
    """
    path = pathlib.Path(directory)
    if (found := read_manifest(path).get("port")) != port.name:
        raise ConversionError(f"{quoted(directory)} is a checkpoint of {quoted(found)}, not of {quoted(port.name)}", "name its own port")
    model = port.new(dtype)
    try:
        _saved(model).load_weights(str(path / WEIGHTS_FILE))
    except (OSError, ValueError, KeyError) as error:
        raise ConversionError(f"{quoted(path / WEIGHTS_FILE)} does not fit the model of port {quoted(port.name)}: {error}") from error
    return model


def summary(manifest: Mapping[str, Any], destination: str | None) -> str:
    """A manifest in words."""
    source, tensors = manifest["source"], manifest["tensors"]
    elements = sum(math.prod(tensor["target_shape"]) for tensor in tensors)
    reasons: dict[str, list[str]] = {}
    for drop in manifest["dropped"]:
        reasons.setdefault(drop["reason"], []).append(drop["source"])
    done = "re-read, every variable equal" if destination else "a dry run, nothing was written"
    lines = [
        f"{source['file']} → {destination or 'nothing'}",
        f"  source     {source['file']}, {source['bytes'] / 1e6:.1f} MB, SHA-256 {source['sha256']}",
        f"  port       {manifest['port']}",
        f"  weights    {len(tensors)} tensors, {elements / 1e6:.2f} M elements, float32; {done}",
        *(f"  no weight  {', '.join(names[:2])}{' …' * (len(names) > 2)}: {len(names)} ({reason})" for reason, names in reasons.items()),
    ]
    return "\n".join(printable(line, 2000) for line in lines)


def read_manifest(directory: pathlib.Path) -> dict[str, Any]:
    """What :func:`convert` wrote beside the weights.

    Raises:
        ConversionError: there is none.
    """
    try:
        manifest = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{quoted(directory)} holds no converted checkpoint: {error}", "convert it with --port") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ConversionError(f"{quoted(directory)} holds no checkpoint of a port", "convert it with --port")
    return manifest


def _saved(model: Any) -> Any:
    """What Keras saves: the model itself, or a model around a bare layer."""
    import keras

    if isinstance(model, keras.Model):
        return model
    around = keras.Model()
    around.model = model
    around.built = True
    return around
