"""MaskFormer, whole: images in, class and mask logits of every query out.

Source: MaskFormer ``mask_former/mask_former_model.py`` and, for the per-pixel baselines, Detectron2
``modeling/meta_arch/semantic_seg.py``; paper: Cheng et al., "Per-Pixel Classification is Not All You Need for Semantic
Segmentation", arXiv 2107.06278.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfmaskformer.config import MaskFormerConfig, ResNetConfig, SwinConfig
from tfmaskformer.heads import HEADS
from tfmaskformer.layers import halved, zero_outside
from tfmaskformer.module import Module, assign_official_names, build_parameters, tap
from tfmaskformer.resize import static_shape
from tfmaskformer.resnet import ResNet
from tfmaskformer.swin import D2SwinTransformer

DTYPES = ("float32", "float64", "mixed_bfloat16")
PADDINGS = ("official", "masked")
BACKBONES: dict[type, Callable[[Any], Module]] = {ResNetConfig: ResNet, SwinConfig: D2SwinTransformer}


@keras.saving.register_keras_serializable("tfmaskformer")
class MaskFormer(keras.Model):
    """The model. Its constructor names every module and parameter; :meth:`build_parameters` or ``load`` makes the variables.

    Args:
        config: what to build; kept as ``model.config``.
        dtype: "float32", "float64" or "mixed_bfloat16" (variables, norms and losses in float32).
    """

    def __init__(self, config: MaskFormerConfig, dtype: str = "float32"):
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected one of {DTYPES}")
        super().__init__(name="mask_former", dtype=dtype, autocast=False)
        self.config = config
        with _dtype_policy(dtype):
            self.backbone = BACKBONES[type(config.backbone)](config.backbone)
            self.sem_seg_head = HEADS[config.head](config)
        assign_official_names(self)

    def get_config(self) -> dict[str, Any]:
        """For Keras, which saves it in a ``.keras`` file: the constructor's arguments, as JSON."""
        return {"config": self.config.to_dict(), "dtype": self.dtype_policy.name}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MaskFormer:
        """The inverse of :meth:`get_config`, with variables, without which Keras reads none from the file."""
        model = cls(MaskFormerConfig.from_dict(config["config"]), config["dtype"])
        model.build_parameters()
        return model

    def build_parameters(self, value_of: Callable[[str], Any] | None = None) -> None:
        """Creates all variables, at the official initial distributions or at ``value_of(official name)`` (array or tensor)."""
        build_parameters(self, value_of)
        self.built = True

    def build(self, input_shape: Any = None) -> None:
        if not self.built:
            self.build_parameters()

    def call(
        self,
        images: tf.Tensor,
        image_sizes: tf.Tensor | None = None,
        training: bool | None = None,
        padding: str = "official",
    ) -> dict[str, Any]:
        """Logits for a batch of images on one canvas.

        Args:
            images: ``[batch, height, width, 3]``, RGB, 0 … 255, any integer or float dtype.
            image_sizes: int32 ``[batch, 2]``, height and width in px of each image, which lies in the canvas' top left corner;
                None: every image fills the canvas.
            training: whether dropout is on.
            padding: what the network sees outside an image.
                "official": zeros, which it takes for part of the image, up to the canvas (upstream: the batch's largest height
                and width) rounded up to ``config.size_divisibility``.
                "masked": nothing. Each image gives what it gives alone in the official way (padded with zeros to its own multiple
                of ``config.size_divisibility``), whatever the canvas.

        Returns:
            "pred_logits" ``[batch, queries, classes + 1]``, no-object last; "pred_masks" ``[batch, queries, ceil(padded height
            / 4), ceil(padded width / 4)]``, logits. The per-pixel baselines have instead "sem_seg" ``[batch, classes, ceil(padded
            height / 4), ceil(padded width / 4)]``, logits before upsampling. "aux_outputs", under deep supervision: the same for each
            earlier decoder layer. All in the compute dtype. "padded_size" int32 ``[2]``: height and width in px of the padded canvas,
            on which targets lie. With "masked" also "valid_sizes", int32 ``[batch, 2]``: the size in px that the network saw of each image;
            pixels are 0 outside ``ceil(valid_sizes / 4)``.

        Raises:
            ValueError: an unknown ``padding``, or ``image_sizes`` that do not fit the canvas (if their values are known).
        """
        if padding not in PADDINGS:
            raise ValueError(f"padding is {padding!r}, expected one of {PADDINGS}")
        if image_sizes is not None:
            image_sizes = _checked_sizes(image_sizes, images)
        images = self.preprocess(images, image_sizes)
        sizes = None
        if padding == "masked":
            sizes = self._valid_sizes(images, image_sizes)
        features = self.backbone(images, sizes)
        level_sizes, size = {}, halved(sizes)
        for name in ("res2", "res3", "res4", "res5"):
            level_sizes[name] = size = halved(size)
        outputs = self.sem_seg_head(features, level_sizes)
        outputs["padded_size"] = tf.stack(static_shape(images)[1:3])
        if sizes is not None:
            outputs["valid_sizes"] = sizes
        return outputs

    def preprocess(self, images: tf.Tensor, image_sizes: tf.Tensor | None = None) -> tf.Tensor:
        """Normalises, then pads with zeros to ``config.size_divisibility`` (Detectron2 ``ImageList.from_tensors``).

        Returns ``[batch, padded height, padded width, 3]`` in the compute dtype.
        """
        # As upstream, the constants are float32 numbers even where the model computes in float64.
        dtype = tf.float64 if self.compute_dtype == "float64" else tf.float32
        mean, std = (tf.cast(np.array(values, np.float32), dtype) for values in (self.config.pixel_mean, self.config.pixel_std))
        images = zero_outside((tf.cast(images, dtype) - mean) / std, image_sizes)
        _, height, width, _ = static_shape(images)
        bottom, right = self._round_up(height) - height, self._round_up(width) - width
        images = tf.cast(tf.pad(images, [[0, 0], [0, bottom], [0, right], [0, 0]]), self.compute_dtype)
        return tap("images", images)

    def _round_up(self, size: Any) -> Any:
        divisor = max(self.config.size_divisibility, 1)
        return (size + divisor - 1) // divisor * divisor

    def _valid_sizes(self, images: tf.Tensor, image_sizes: tf.Tensor | None) -> tf.Tensor:
        batch, height, width, _ = static_shape(images)
        if image_sizes is None:
            return tf.broadcast_to(tf.stack([height, width])[None], [batch, 2])
        return self._round_up(image_sizes)


def _checked_sizes(image_sizes: Any, images: tf.Tensor) -> tf.Tensor:
    """``image_sizes`` as int32 ``[batch, 2]``; their values are checked where they are known."""
    sizes = tf.ensure_shape(tf.cast(image_sizes, tf.int32), [images.shape[0], 2])
    values, canvas = tf.get_static_value(sizes), images.shape[1:3]
    if values is not None and canvas.is_fully_defined() and ((values < 1) | (values > canvas.as_list())).any():
        raise ValueError(f"image_sizes are {values.tolist()}, expected heights and widths from 1 to the canvas {canvas.as_list()}")
    return sizes


@contextmanager
def _dtype_policy(dtype: str) -> Iterator[None]:
    """Modules made inside the block compute in ``dtype``."""
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(previous)
