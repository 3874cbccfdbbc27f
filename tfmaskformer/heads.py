"""The heads: pixel decoder and predictor, from the backbone's features to logits.

Source: MaskFormer ``mask_former/modeling/heads/mask_former_head.py`` and ``per_pixel_baseline.py`` (the per-pixel classification
baselines of the paper's section 4.1). Upstream's per-pixel heads also upsample their logits and take the loss; here that is done by
:func:`tfmaskformer.semantic_inference` and :class:`tfmaskformer.PerPixelCriterion`.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.layers import Conv2d, c2_msra_fill, zero_outside
from tfmaskformer.module import Module
from tfmaskformer.pixel_decoder import PIXEL_DECODERS
from tfmaskformer.transformer_predictor import TransformerPredictor

Sizes = dict[str, "tf.Tensor | None"]
"""The true size of each feature (int32 ``[batch, 2]``), or None where the whole map is true."""


class MaskFormerHead(Module):
    """Pixel decoder and transformer predictor."""

    mask_classification = True

    def __init__(self, config: MaskFormerConfig, **kwargs: Any):
        super().__init__(**kwargs)
        self.transformer_in_feature = config.predictor.transformer_in_feature
        self.pixel_decoder = PIXEL_DECODERS[config.pixel_decoder.name](config)
        self.predictor = TransformerPredictor(config, self.mask_classification)

    def call(self, features: dict[str, tf.Tensor], sizes: Sizes) -> dict[str, Any]:
        """``pred_logits``, ``pred_masks`` and, under deep supervision, ``aux_outputs``."""
        mask_features, encoder_features = self.pixel_decoder.forward_features(features, sizes)
        memory = encoder_features if self.transformer_in_feature == "transformer_encoder" else features["res5"]
        return self.predictor(memory, mask_features, sizes["res5"], sizes["res2"])


class PerPixelBaselineHead(Module):
    """Pixel decoder and a 1×1 convolution that classifies each pixel."""

    def __init__(self, config: MaskFormerConfig, **kwargs: Any):
        super().__init__(**kwargs)
        self.pixel_decoder = PIXEL_DECODERS[config.pixel_decoder.name](config)
        self.predictor = Conv2d(config.pixel_decoder.mask_dim, config.num_classes, 1, initializer=c2_msra_fill)

    def call(self, features: dict[str, tf.Tensor], sizes: Sizes) -> dict[str, Any]:
        """``sem_seg``: logits ``[batch, classes, height, width]`` at stride 4, 0 outside the true size."""
        mask_features, _ = self.pixel_decoder.forward_features(features, sizes)
        logits = zero_outside(self.predictor(mask_features), sizes["res2"])
        return {"sem_seg": tf.transpose(logits, [0, 3, 1, 2])}


class PerPixelBaselinePlusHead(MaskFormerHead):
    """A :class:`MaskFormerHead` with one query for each class, whose mask logits are that class's logits, and no classification."""

    mask_classification = False

    def call(self, features: dict[str, tf.Tensor], sizes: Sizes) -> dict[str, Any]:
        """``sem_seg`` as of :class:`PerPixelBaselineHead` and, under deep supervision, ``aux_outputs``."""
        predictions = super().call(features, sizes)
        outputs: dict[str, Any] = {"sem_seg": predictions["pred_masks"]}
        if "aux_outputs" in predictions:
            outputs["aux_outputs"] = [{"sem_seg": layer["pred_masks"]} for layer in predictions["aux_outputs"]]
        return outputs


HEADS = {cls.__name__: cls for cls in (MaskFormerHead, PerPixelBaselineHead, PerPixelBaselinePlusHead)}
