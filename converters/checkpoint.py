"""Reads, writes and re-reads the TensorFlow checkpoint of a model that never exists: arrays and official names are enough.

What is written is what ``tf.train.Checkpoint(model=model).save`` writes for the Keras model: the same keys, the same object graph. No
variable is made, and arrays with aligned memory are written without a copy. TensorFlow is imported when it is first needed, so that bad
files are told without it.
"""

from __future__ import annotations

import dataclasses
import glob
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.errors import ConversionError, quoted
from converters.tensor import BFLOAT16, LazyTensor
from converters.transforms import Shape
from tfmaskformer.destination import system_error

if TYPE_CHECKING:
    import tensorflow as tf
    from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

PREFIX = "ckpt"
FILES = ("checkpoint", f"{PREFIX}.index", f"{PREFIX}.data-00000-of-00001")
"""What :func:`write` writes."""

CONFIG_FILE = "config.json"
"""As ``tfmaskformer.checkpoint`` reads it; repeated here because that module imports TensorFlow."""
MANIFEST_FILE = "manifest.json"

_GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VALUE = "VARIABLE_VALUE"
_SAVE_COUNTER = "save_counter"  # tf.train.Checkpoint.restore expects it
_SAVE_COUNTER_KEY = f"{_SAVE_COUNTER}/.ATTRIBUTES/{_VALUE}"
_ALIGNMENT_BYTES = 64


@dataclasses.dataclass(frozen=True)
class Contents:
    """A checkpoint of TensorFlow: name → variable in TensorFlow's layout, the kinds of other things in it, and its files."""

    tensors: dict[str, LazyTensor]
    others: tuple[str, ...]
    files: tuple[pathlib.Path, ...]


def is_checkpoint(directory: pathlib.Path) -> bool:
    """Whether a directory looks like that of a TensorFlow checkpoint; needs no TensorFlow."""
    return (directory / "checkpoint").is_file() or any(directory.glob("*.index"))


def read(directory: pathlib.Path) -> Contents:
    """The variables of the newest checkpoint in a directory: what ``convert`` or ``tf.train.CheckpointManager`` wrote there.

    Raises:
        ConversionError: there is none, it is damaged, or it holds no MaskFormer.
    """
    import tensorflow as tf

    from tfmaskformer.checkpoint import stored_variables

    name = quoted(directory)
    try:
        prefix = tf.train.latest_checkpoint(str(directory))
        if prefix is None:
            raise ConversionError(
                f"{name}: no TensorFlow checkpoint is complete in it",
                "copy the directory again, with the files 'checkpoint', *.index and *.data-*",
            )
        reader = tf.train.load_checkpoint(prefix)
        shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
        keys = {found: key for found, key in stored_variables(reader).items() if key in shapes}
        files = [directory / "checkpoint", *pathlib.Path(prefix).parent.glob(f"{glob.escape(pathlib.Path(prefix).name)}.*")]
    except ConversionError:
        raise
    except (tf.errors.OpError, RuntimeError, ValueError, IndexError, OSError) as error:
        raise ConversionError(f"{name}: the TensorFlow checkpoint cannot be read: {error}", "copy the directory again") from None

    def lazy(key: str) -> LazyTensor:
        return LazyTensor(tuple(shapes[key]), np.dtype(dtypes[key].as_numpy_dtype), lambda: _get(reader, key, name))

    tensors = {found: lazy(key) for found, key in sorted(keys.items())}
    others = {key.split("/")[0] for key in shapes.keys() - keys.values()} - {_SAVE_COUNTER, _GRAPH_KEY, "model"}
    if not tensors:
        raise ConversionError(f"{name}: the TensorFlow checkpoint has no variables under 'model/'", "save tf.train.Checkpoint(model=model)")
    return Contents(tensors, tuple(sorted(others)), tuple(sorted(files)))


def _get(reader: Any, key: str, name: str) -> np.ndarray:
    import tensorflow as tf

    try:
        return reader.get_tensor(key)
    except (tf.errors.OpError, RuntimeError, ValueError, IndexError) as error:  # IndexError: the data end too soon
        raise ConversionError(f"{name}: {quoted(key)} cannot be read: {error}", "copy the directory again") from None


def aligned_empty(shape: Shape, dtype: np.dtype = np.dtype("float32")) -> np.ndarray:  # noqa: B008
    """An uninitialised array at an address that TensorFlow takes over without a copy."""
    size_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(size_bytes + _ALIGNMENT_BYTES, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT_BYTES
    return buffer[start : start + size_bytes].view(dtype).reshape(shape)


def write(directory: pathlib.Path, variables: Mapping[str, np.ndarray]) -> None:
    """Writes ``variables`` (official name → float array in TensorFlow's layout) as the checkpoint of ``directory``.

    Raises:
        OSError: TensorFlow could not write.
    """
    import tensorflow as tf

    from tfmaskformer.checkpoint import checkpoint_key

    tensors = {checkpoint_key(name): _shared(value) for name, value in variables.items()}
    tensors[_SAVE_COUNTER_KEY] = tf.constant(1, tf.int64)
    tensors[_GRAPH_KEY] = tf.constant(_object_graph(variables).SerializeToString())
    try:
        with tf.device("CPU"):
            tf.raw_ops.SaveV2(
                prefix=str(directory / PREFIX),
                tensor_names=list(tensors),
                shape_and_slices=[""] * len(tensors),
                tensors=list(tensors.values()),
            )
    except tf.errors.OpError as error:
        raise system_error(error) from None
    # As tf.train.update_checkpoint_state writes it, without the time.
    (directory / "checkpoint").write_text(f'model_checkpoint_path: "{PREFIX}"\nall_model_checkpoint_paths: "{PREFIX}"\n')


def _shared(value: np.ndarray) -> tf.Tensor:
    """A tensor of TensorFlow in the array's memory; tf.constant would copy it twice. DLPack has no bfloat16, which goes through as bits."""
    import tensorflow as tf

    if value.dtype == BFLOAT16:
        return tf.bitcast(tf.experimental.dlpack.from_dlpack(value.view(np.uint16).__dlpack__()), tf.bfloat16)
    return tf.experimental.dlpack.from_dlpack(value.__dlpack__())


def verify(directory: pathlib.Path, variables: Mapping[str, np.ndarray], progress: Callable[[float], None]) -> None:
    """Reads the checkpoint again through TensorFlow's own reader and compares every variable, byte by byte.

    Raises:
        ConversionError: something differs.
    """
    import tensorflow as tf

    from tfmaskformer.checkpoint import checkpoint_key

    total_bytes = max(sum(value.nbytes for value in variables.values()), 1)
    done_bytes = 0
    try:
        reader = tf.train.load_checkpoint(str(directory))
        expected = {checkpoint_key(name): value for name, value in variables.items()}
        found = set(reader.get_variable_to_shape_map()) - {_SAVE_COUNTER_KEY, _GRAPH_KEY}
        wrong = sorted(found ^ expected.keys())
        for key in expected.keys() & found:
            value = reader.get_tensor(key)
            done_bytes += value.nbytes
            progress(done_bytes / total_bytes)
            if value.dtype != expected[key].dtype or value.shape != expected[key].shape or not same_bytes(value, expected[key]):
                wrong.append(key)
    except (tf.errors.OpError, RuntimeError, IndexError) as error:
        raise ConversionError(f"the checkpoint just written cannot be read: {error}", "the disk may be full or failing") from None
    if wrong:
        raise ConversionError("the checkpoint just written holds other values than intended", *wrong[:10], "the disk may be failing")


def same_bytes(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two contiguous arrays of one dtype and shape have the same bits: −0 is not 0, and a NaN is itself."""
    bits = np.dtype(f"u{first.dtype.itemsize}")
    return bool(np.array_equal(first.reshape(-1).view(bits), second.reshape(-1).view(bits)))


def _object_graph(names: Mapping[str, object]) -> TrackableObjectGraph:
    """The tree of names as TensorFlow stores it: nodes with named children; variables have an attribute that names their key."""
    from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

    from tfmaskformer.checkpoint import checkpoint_key

    graph = TrackableObjectGraph()
    graph.nodes.add()
    nodes: dict[tuple[str, ...], int] = {(): 0}
    keys = {("model", *name.split(".")): checkpoint_key(name) for name in names}
    keys[(_SAVE_COUNTER,)] = _SAVE_COUNTER_KEY
    for path, key in keys.items():
        for depth, name in enumerate(path):
            parent, node = path[:depth], path[: depth + 1]
            if node not in nodes:
                nodes[node] = len(graph.nodes)
                graph.nodes.add().has_checkpoint_values.value = True
                graph.nodes[nodes[parent]].children.add(node_id=nodes[node], local_name=name)
        graph.nodes[nodes[path]].attributes.add(name=_VALUE, full_name="/".join(path), checkpoint_key=key)
    graph.nodes[0].has_checkpoint_values.value = True
    return graph
