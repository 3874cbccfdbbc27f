"""The command ``tfmaskformer export``: a model as others take it, without this package (SavedModel, LiteRT), or as Keras saves it.

Of all formats the destination is a directory, which appears whole or not at all. Its ``manifest.json`` tells what it was made of, how, and
what classes there are. :class:`Exported` runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import posixpath
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import tfmaskformer
from tfmaskformer import destination as destinations
from tfmaskformer.cli import BAD_INPUT, COULD_NOT_RUN, OK, failed
from tfmaskformer.config import MaskFormerConfig

if TYPE_CHECKING:
    from tfmaskformer.model import MaskFormer


FORMATS = {
    "saved_model": {"float32": "float32", "float64": "float64", "bfloat16": "mixed_bfloat16"},
    "keras": {"float32": "float32", "float64": "float64", "bfloat16": "mixed_bfloat16"},
    "litert": {"float32": "float32", "float16": "float32", "int8": "float32"},
}
"""Format → dtype that can be asked for → what the model computes in before it is converted."""

MANIFEST, FORMAT, VERSION = "manifest.json", "tfmaskformer-export", 1
KERAS_FILE, LITERT_FILE = "model.keras", "model.tflite"
LOGITS = ("pred_logits", "pred_masks", "sem_seg")
PHOTO = "coffee.png"
"""On which folding is measured; in ``checkpoints/photos``."""


class ExportError(ValueError):
    """An export that cannot be made, or used; the message says what, why and what to do."""


def export(
    checkpoint: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    format: str = "saved_model",  # noqa: A002 as the option is called
    *,
    dtype: str = "float32",
    size: tuple[int, int] | None = None,
    fold_batch_norm: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Exports a checkpoint.

    Args:
        checkpoint: directory written by ``convert`` or by training; local or on any file system of TensorFlow (``gs://…``).
        destination: directory; its parent must exist.
        format: one of :data:`FORMATS`.
        dtype: what is computed in; of LiteRT what weights are stored in.
        size: (height, width) of the canvas that the network sees, px; None: any. LiteRT needs one, Keras takes none.
        fold_batch_norm: whether frozen batch norms become part of the convolutions.
        force: whether an export that is there is replaced.

    Returns:
        the manifest.

    Raises:
        ExportError, CheckpointError: bad input, or an operation that the format does not have. Nothing is written.
    """
    if format not in FORMATS:
        raise ExportError(f"no format {format!r}\n  expected one of {', '.join(FORMATS)}")
    if dtype not in FORMATS[format]:
        raise ExportError(f"--dtype {dtype} is not for {format}\n  expected one of {', '.join(FORMATS[format])}")
    if format == "litert" and size is None:
        raise ExportError("LiteRT has one shape for its input\n  give --size HEIGHT WIDTH, in which your images fit after resizing")
    if format == "keras" and size is not None:
        raise ExportError("a Keras model takes images of any size\n  leave --size out")
    place = _Destination(destination, force)
    with place.staging() as directory:
        from tfmaskformer.checkpoint import load
        from tfmaskformer.checkpoint import read_manifest as read_conversion
        from tfmaskformer.folding import FoldingError, fold

        converted, policy = read_conversion(checkpoint), FORMATS[format][dtype]
        model = load(checkpoint, policy)
        folding = None
        if fold_batch_norm:
            try:
                folding = _folding_errors(checkpoint, model)
                model = fold(model)
            except FoldingError as error:
                raise ExportError(f"{error}\n  leave --fold-batch-norm out") from error
        config, signatures = model.config, None
        if format == "keras":
            with warnings.catch_warnings():  # Keras 3.15 makes arrays of variables in a way that NumPy 2 deprecates
                warnings.simplefilter("ignore", DeprecationWarning)
                model.save(directory / KERAS_FILE)
        else:
            saved_model = directory if format == "saved_model" else directory / "saved_model"
            signatures = _save(*_serving(model, size, format == "litert"), saved_model)
        if format == "litert":
            (directory / LITERT_FILE).write_bytes(_litert(saved_model, dtype, model, size))
            shutil.rmtree(saved_model)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "tool": {"name": "tfmaskformer", "version": tfmaskformer.__version__},
            "source": converted.get("source"),
            "weights_license": converted.get("weights_license"),
            "export": {"format": format, "dtype": dtype, "size": size, "fold_batch_norm": folding, "signatures": signatures},
            "versions": _versions(),
            "config": config.to_dict(),
        }
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        place.commit(directory)
    return manifest


def _versions() -> dict[str, str]:
    import keras
    import PIL
    import tensorflow as tf

    # Pillow's, because which of its two passes comes first depends on it, and the graph does as it does.
    return {"tensorflow": tf.__version__, "keras": keras.__version__, "pillow": PIL.__version__}


def _folding_errors(checkpoint: str | os.PathLike[str], model: MaskFormer) -> dict[str, Any]:
    import checkpoints
    from tfmaskformer.checkpoint import load
    from tfmaskformer.data.preprocessing import decode_image, resize_shortest_edge
    from tfmaskformer.folding import folding_errors

    photo = resize_shortest_edge(decode_image((Path(checkpoints.__file__).parent / "photos" / PHOTO).read_bytes()), 128, 256)
    exact = load(checkpoint, "float64")
    dtypes = {"float64": exact, model.dtype_policy.name: model}
    return {dtype: folding_errors(original, exact, photo) for dtype, original in dtypes.items()}


def _serving(model: MaskFormer, size: tuple[int, int] | None, is_litert: bool) -> tuple[Any, dict[str, Any]]:
    """A ``tf.Module`` of the model's variables, and a concrete function for each signature; LiteRT has "logits" alone, of one image."""
    import tensorflow as tf

    from tfmaskformer.data.orientation import exif_orientation_tf, upright_tf
    from tfmaskformer.data.preprocessing import decode_image_tf, resize_shortest_edge_tf
    from tfmaskformer.module import named_variables
    from tfmaskformer.static_inference import static_panoptic_inference, static_semantic_inference

    config = model.config
    height, width = size or (None, None)

    def logits(images: tf.Tensor, image_sizes: tf.Tensor) -> dict[str, tf.Tensor]:
        if not is_litert:
            canvas = tf.shape(images)[1:3]
            fit = tf.reduce_all((image_sizes >= 1) & (image_sizes <= canvas))
            with tf.control_dependencies([tf.debugging.Assert(fit, ["image_sizes are", image_sizes, "px, the canvas is", canvas])]):
                image_sizes = tf.identity(image_sizes)
        outputs = model(images, image_sizes, padding="masked")
        told = {name: outputs[name] for name in LOGITS if name in outputs}
        if model.compute_dtype == "bfloat16":
            told = {name: tf.cast(tensor, tf.float32) for name, tensor in told.items()}
        return told | {"valid_sizes": outputs["valid_sizes"]}

    batch = 1 if is_litert else None
    from_images = [tf.TensorSpec([batch, height, width, 3], tf.uint8, "images"), tf.TensorSpec([batch, 2], tf.int32, "image_sizes")]
    network = tf.function(logits, input_signature=from_images, autograph=False)  # traced once, for all signatures

    def segmented(image_bytes: tf.Tensor) -> tuple[dict[str, tf.Tensor], tf.Tensor, list[tf.Tensor]]:
        """The model's outputs, the size of its input, both as batches of one, and the size of the image."""
        is_png = tf.strings.substr(image_bytes, 0, 4) == b"\x89PNG"
        known = is_png | (tf.strings.substr(image_bytes, 0, 3) == b"\xff\xd8\xff")
        with tf.control_dependencies([tf.debugging.Assert(known, ["image_bytes is neither a JPEG nor a PNG file"])]):
            image_bytes = tf.identity(image_bytes)
        image = upright_tf(decode_image_tf(image_bytes, tf.where(is_png, "png", "jpeg")), exif_orientation_tf(image_bytes))
        resized = resize_shortest_edge_tf(image, config.test.min_size, config.test.max_size)
        sizes = tf.shape(resized)[tf.newaxis, :2]
        if size is not None:
            told = ["height and width after resizing are", sizes, "px, the export's canvas is", size]
            with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(sizes <= size), told)]):
                sizes = tf.identity(sizes)
            margins = tf.constant(size) - sizes[0]
            resized = tf.ensure_shape(tf.pad(resized, [[0, margins[0]], [0, margins[1]], [0, 0]]), [*size, 3])
        outputs = network(resized[tf.newaxis], sizes)
        for tensor in outputs.values():
            tensor.set_shape([1, *tensor.shape[1:]])
        return outputs, sizes, tf.unstack(tf.shape(image)[:2])

    def panoptic(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs, sizes, output = segmented(image_bytes)
        found = static_panoptic_inference(outputs, config, sizes, tf.stack(output)[tf.newaxis], output)
        count = found.count[0]
        return {
            "panoptic_seg": found.panoptic_seg[0],
            "id": tf.range(1, count + 1),
            "category_id": found.category_id[0, :count],
            "isthing": found.isthing[0, :count],
            "score": found.score[0, :count],
        }

    def semantic(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs, sizes, output = segmented(image_bytes)
        scores = static_semantic_inference(outputs, config, sizes, tf.stack(output)[tf.newaxis], output)
        return {"sem_seg": tf.argmax(scores[0], 0, tf.int32)}

    serving = tf.Module()
    serving.parameters = {name: variable.value for name, variable in named_variables(model).items()}
    from_bytes = [tf.TensorSpec([], tf.string, "image_bytes")]
    functions = {} if is_litert else {"panoptic": panoptic, "semantic": semantic} if config.test.panoptic_on else {"semantic": semantic}
    signatures = {name: tf.function(of, autograph=False).get_concrete_function(*from_bytes) for name, of in functions.items()}
    return serving, signatures | {"logits": network.get_concrete_function()}


def _save(serving: Any, signatures: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Writes a SavedModel; returns its signatures: name → inputs and outputs, with dtype and shape.

    Raises:
        OSError: it cannot be written.
    """
    import tensorflow as tf

    try:
        tf.saved_model.save(serving, str(directory), {**signatures, "serving_default": next(iter(signatures.values()))})
    except tf.errors.OpError as error:
        found = destinations.system_error(error)
        if isinstance(error, tf.errors.ResourceExhaustedError) and not found.errno:
            raise  # out of memory
        raise found from error

    def told(specs: Mapping[str, Any]) -> dict[str, str]:
        return {name: f"{spec.dtype.name} {spec.shape}" for name, spec in specs.items()}

    return {
        name: {"inputs": told(_by_name(function)), "outputs": told(function.structured_outputs)} for name, function in signatures.items()
    }


def _by_name(function: Any) -> dict[str, Any]:
    return {spec.name: spec for spec in function.structured_input_signature[0]}


def _litert(saved_model: Path, dtype: str, model: MaskFormer, size: Sequence[int] | None) -> bytes:
    """A LiteRT model of the signature "logits".

    Raises:
        ExportError: an operation has no counterpart there.
    """
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(str(saved_model), signature_keys=["logits"])
    if dtype != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if dtype == "float16":
        converter.target_spec.supported_types = [tf.float16]
    with _quiet() as log:
        try:
            return converter.convert()
        except Exception as error:  # the converter's own class is private
            raise _no_counterpart(error, log(), model, size) from error


def _no_counterpart(error: Exception, log: str, model: MaskFormer, size: Sequence[int] | None) -> ExportError:
    """Operations are told by the error; the names of nodes, which tell their layers, stand in the log alone."""
    operations = sorted(set(re.findall(r"'tf\.(\w+)' op is neither", str(error))))
    if not operations:
        return ExportError(f"LiteRT cannot convert the model: {str(error).splitlines()[0][:500]}")
    scopes = _scopes(model, size)
    found = re.findall(r'"([\w./]+)/\w+@', log)
    layers = list(dict.fromkeys(layer for scope in found if (layer := _layer(scope, scopes))))
    where = f" in '{layers[0]}'" + f" and {len(layers) - 1} more layers" * (len(layers) > 1) if layers else ""
    return ExportError(
        f"LiteRT has no operation for {' and '.join(operations)}{where} of {model.config.name}\n  export it with --format saved_model"
    )


def _layer(scope: str, scopes: Mapping[str, str]) -> str:
    """The module of a scope: what the names of the modules in it begin with."""
    inside = [name.replace(".", "/") for known, name in scopes.items() if f"{known}/".startswith(f"{scope}/")]
    return posixpath.commonpath(inside).replace("/", ".") if inside else ""


def _scopes(model: MaskFormer, size: Sequence[int] | None) -> dict[str, str]:
    """Scope of the names of nodes, of a graph in which the model alone was traced → official name of the module."""
    import tensorflow as tf

    from tfmaskformer.module import record_taps

    found: dict[str, str] = {}

    def trace(images: tf.Tensor, image_sizes: tf.Tensor) -> tf.Tensor:
        with record_taps() as taps:
            outputs = model(images, image_sizes, padding="masked")
        for tap, tensor in taps.items():
            found.setdefault(tensor.op.name.rpartition("/")[0], tap.partition("#")[0])
        return outputs["valid_sizes"]

    specs = tf.TensorSpec([1, *(size or (None, None)), 3], tf.uint8), tf.TensorSpec([1, 2], tf.int32)
    tf.function(trace, autograph=False).get_concrete_function(*specs)
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[Callable[[], str]]:
    """Inside, nothing comes to stderr, where LiteRT's C++ writes hundreds of lines; gives what tells them."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield lambda: os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0).decode(errors="replace")
        finally:
            os.dup2(kept, 2)
            os.close(kept)


class Exported:
    """An export, reloaded: called like a :class:`~tfmaskformer.model.MaskFormer` it gives the final outputs of a batch.

    Attributes:
        manifest: what :func:`export` returned.
        config: of the model.
        dtype: what was asked for.
        canvas: (height, width) of the network's, px; None: any.

    Raises:
        ExportError: it is none, or damaged, or its runtime is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        try:
            how = self.manifest["export"]
            self.config = MaskFormerConfig.from_dict(self.manifest["config"])
            self.dtype: str = how["dtype"]
            self.canvas: tuple[int, int] | None = how["size"] and tuple(how["size"])
            loaders = {"saved_model": self._saved_model, "keras": self._keras, "litert": self._litert}
            self._logits: Callable[..., Mapping[str, Any]] = loaders[how["format"]]()
        except ExportError:
            raise
        except Exception as error:  # of the manifest, or any of three runtimes
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:500] if str(error).strip() else ''}"
            raise ExportError(f"cannot load '{directory}': {reason}\n  if it is damaged, export the checkpoint again") from error

    def check_size(self, size: Sequence[int]) -> None:
        """Raises ExportError where the canvas has no room for an image of ``size``: height and width, px."""
        if self.canvas and (size[0] > self.canvas[0] or size[1] > self.canvas[1]):
            canvas = "×".join(map(str, self.canvas))
            raise ExportError(
                f"an image has {size[0]}×{size[1]} px, the canvas of '{self.directory}' {canvas}\n  export it with a larger --size"
            )

    def __call__(self, images: np.ndarray, image_sizes: np.ndarray | None = None) -> dict[str, Any]:
        """Final outputs of ``images``, uint8 [batch, height, width, 3], and ``valid_sizes``, as with masked padding.

        A canvas of fixed size is filled up with zeros.

        Raises:
            ExportError: larger than this canvas.
        """
        import tensorflow as tf

        batch, *size = images.shape[:3]
        sizes: np.ndarray = np.array([size] * batch, np.int32) if image_sizes is None else np.asarray(image_sizes, np.int32)
        self.check_size(size)
        canvas = self.canvas or size
        images = np.pad(images, [(0, 0), (0, canvas[0] - size[0]), (0, canvas[1] - size[1]), (0, 0)])
        return {name: tf.convert_to_tensor(tensor) for name, tensor in self._logits(images, sizes).items()}

    def _saved_model(self) -> Callable[..., Mapping[str, Any]]:
        import tensorflow as tf

        self._loaded = tf.saved_model.load(str(self.directory))
        return lambda images, sizes: self._loaded.signatures["logits"](images=tf.constant(images), image_sizes=tf.constant(sizes))

    def _keras(self) -> Callable[..., Mapping[str, Any]]:
        import keras

        import tfmaskformer.folding  # noqa: F401 registers what Keras is to make

        model = keras.models.load_model(self.directory / KERAS_FILE, compile=False)

        def logits(images, sizes):
            outputs = model(images, sizes, padding="masked")
            return {name: outputs[name] for name in (*LOGITS, "valid_sizes") if name in outputs}

        return logits

    def _litert(self) -> Callable[..., Mapping[str, Any]]:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise ExportError(f"cannot import {error.name}: {error}\n  pip install 'tfmaskformer[litert]'") from error
        with _quiet():
            run = Interpreter(model_path=str(self.directory / LITERT_FILE)).get_signature_runner("logits")

        def logits(images, sizes):
            found = [run(images=images[index : index + 1], image_sizes=sizes[index : index + 1]) for index in range(len(images))]
            return {name: np.concatenate([one[name] for one in found]) for name in found[0]}

        return logits


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of an export.

    Raises:
        ExportError: the directory is none.
    """
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"cannot read '{path}': {error}\n  expected a directory written by 'tfmaskformer export'") from error
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise ExportError(f"'{directory}' is no export of version {VERSION}\n  expected a directory written by 'tfmaskformer export'")
    return manifest


class _Destination(destinations.Destination):
    """A directory; where a link is named, what it leads to."""

    writing, run = "exporting", "export"

    def __init__(self, path: str | os.PathLike[str], force: bool):
        super().__init__(Path(os.path.realpath(path)), force, is_directory=True)

    def error(self, what: str, *details: str) -> ExportError:
        return ExportError("\n  ".join((what, *details)))

    def check(self) -> None:
        if not self.exists:
            return
        try:
            read_manifest(self.path)
        except ExportError:
            what, remedy = "exists and is no export", "choose another --dst; --force replaces only what 'export' wrote"
            raise self.error(f"'{self.path}' {what}", remedy) from None
        if not self.force:
            raise self.error(f"'{self.path}' exists", "choose another --dst, or add --force to replace it")


def main(argv: Sequence[str] | None = None) -> int:
    """Export a checkpoint as SavedModel, LiteRT or Keras model, to run without this package.

    Returns 0; 2 for usage or bad input; 3 where it could not run.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if min(arguments.size or (1,)) < 1:
        parser.error("--size takes positive numbers")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as tf

        from tfmaskformer.checkpoint import CheckpointError
        from tfmaskformer.evaluation.devices import multiply_in_float32
    except ImportError as error:
        return failed(f"cannot import {error.name}: {error}\n  pip install 'tfmaskformer[cpu]'", COULD_NOT_RUN)
    multiply_in_float32()  # what folding costs is measured
    try:
        manifest = export(
            arguments.ckpt,
            arguments.dst,
            arguments.format,
            dtype=arguments.dtype,
            size=tuple(arguments.size) if arguments.size else None,
            fold_batch_norm=arguments.fold_batch_norm,
            force=arguments.force,
        )
    except (ExportError, CheckpointError) as error:
        return failed(str(error), BAD_INPUT)
    except (MemoryError, tf.errors.ResourceExhaustedError):
        return failed("out of memory; nothing was written", COULD_NOT_RUN)
    except KeyboardInterrupt:
        return failed("interrupted; nothing was written", COULD_NOT_RUN)
    print(json.dumps(manifest, indent=1) if arguments.json else "\n".join(_lines(manifest, arguments.dst)))
    return OK


def _lines(manifest: Mapping[str, Any], destination: str) -> Iterator[str]:
    how = manifest["export"]
    size = f"{how['size'][0]}×{how['size'][1]} px" if how["size"] else "any size"
    yield f"{manifest['config']['name']}, {how['format']}, {how['dtype']}, {size}: {destination}"
    for name, signature in (how["signatures"] or {}).items():
        inputs, outputs = (", ".join(f"{key} {spec}" for key, spec in signature[side].items()) for side in ("inputs", "outputs"))
        yield f"  {name}: {inputs} → {outputs}"
    for dtype, errors in (how["fold_batch_norm"] or {}).items():
        yield f"  folded, {dtype}, relative error (unfolded: {_told(errors['unfolded'])}): {_told(errors)}"


def _told(errors: Mapping[str, Any]) -> str:
    outputs = ", ".join(f"{name} {error:.1e}" for name, error in errors["outputs"].items())
    return f"{outputs}, worst tap {errors['worst_tap']['error']:.1e} '{errors['worst_tap']['name']}'"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tfmaskformer export",
        description="Writes a converted checkpoint as a SavedModel, which serves image files and tensors without this package, as a LiteRT "
        "model, or as a Keras model.",
        epilog="docs/export.md tells the signatures. exit codes: 0 exported, 2 usage or bad input (nothing written), 3 could not run",
    )
    parser.add_argument("--ckpt", required=True, metavar="DIR", help="directory written by 'convert' or 'train'; may be gs://…")
    parser.add_argument("--dst", required=True, metavar="DIR", help="new directory; appears whole or not at all")
    parser.add_argument("--format", choices=tuple(FORMATS), default="saved_model", help="(default: %(default)s)")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="canvas of the network, px, which holds smaller images (default: any size)"
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(dict.fromkeys(dtype for dtypes in FORMATS.values() for dtype in dtypes)),
        default="float32",
        help="what is computed in; float16 and int8 are for LiteRT's weights (default: %(default)s)",
    )
    parser.add_argument("--fold-batch-norm", action="store_true", help="fold frozen batch norms into convolutions, and tell the error")
    parser.add_argument("--force", action="store_true", help="replace an export that is there")
    parser.add_argument("--json", action="store_true", help="print the manifest")
    return parser


if __name__ == "__main__":
    sys.exit(main())
