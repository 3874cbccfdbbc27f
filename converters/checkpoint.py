"""Writes and re-reads the TensorFlow checkpoint of a model that never exists: arrays and official names are enough.

The result is what ``tf.train.Checkpoint(model=model).save`` writes for the Keras model: the same keys, the same object graph. No
variable is made, and arrays with aligned memory are written without a copy. TensorFlow is imported when it is first needed, so that bad
files are told without it.
"""

from __future__ import annotations

import errno
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from converters.errors import ConversionError
from converters.transforms import Shape

if TYPE_CHECKING:
    from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

PREFIX = "ckpt"
FILES = ("checkpoint", f"{PREFIX}.index", f"{PREFIX}.data-00000-of-00001")
"""What :func:`write` writes."""

_GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VALUE = "VARIABLE_VALUE"
_SAVE_COUNTER = "save_counter"  # tf.train.Checkpoint.restore expects it
_SAVE_COUNTER_KEY = f"{_SAVE_COUNTER}/.ATTRIBUTES/{_VALUE}"
_ALIGNMENT_BYTES = 64


def aligned_empty(shape: Shape) -> np.ndarray:
    """float32 of this shape, uninitialised, at an address that TensorFlow takes over without a copy."""
    count = int(np.prod(shape, dtype=np.int64))
    buffer = np.empty(4 * count + _ALIGNMENT_BYTES, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT_BYTES
    return buffer[start : start + 4 * count].view(np.float32).reshape(shape)


def write(directory: pathlib.Path, variables: Mapping[str, np.ndarray]) -> None:
    """Writes ``variables`` (official name → float32 array in TensorFlow's layout) as the checkpoint of ``directory``.

    Raises:
        OSError: TensorFlow could not write.
    """
    import tensorflow as tf

    from tfmaskformer.checkpoint import checkpoint_key

    # DLPack shares the arrays' memory; tf.constant would copy it twice.
    tensors = {checkpoint_key(name): tf.experimental.dlpack.from_dlpack(value.__dlpack__()) for name, value in variables.items()}
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
        code = next((code for code in errno.errorcode if os.strerror(code) in error.message), 0)
        raise (OSError(code, os.strerror(code)) if code else OSError(f"TensorFlow says: {error.message}")) from None
    # As tf.train.update_checkpoint_state writes it, without the time.
    (directory / "checkpoint").write_text(f'model_checkpoint_path: "{PREFIX}"\nall_model_checkpoint_paths: "{PREFIX}"\n')


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
            if value.dtype != np.float32 or value.shape != expected[key].shape or not _same_bytes(value, expected[key]):
                wrong.append(key)
    except (tf.errors.OpError, RuntimeError) as error:
        raise ConversionError(f"the checkpoint just written cannot be read: {error}", "the disk may be full or failing") from None
    if wrong:
        raise ConversionError("the checkpoint just written holds other values than intended", *wrong[:10], "the disk may be failing")


def _same_bytes(first: np.ndarray, second: np.ndarray) -> bool:
    return bool(np.array_equal(first.reshape(-1).view(np.uint32), second.reshape(-1).view(np.uint32)))


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
