"""Faults held out of the diagnosis: written when it was done, without a look at it, with the words to be told before the first run.

They are no part of the proof and of its thresholds: ``parity-check selftest --only held-out`` takes them, and none may survive. What
became of them is in docs/selftest.md. The diagnosis is not to be extended for them, nor are they to be changed.
"""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

from parity.faults.fault import ENCODER, OTHER, PANOPTIC, PIXEL, PREDICTOR, SEMANTIC, SWIN, Fault, each, replaced, weight
from tfmaskformer import criterion, inference, layers, matcher, resnet, swin, transformer, transformer_predictor
from tfmaskformer.criterion import SetCriterion
from tfmaskformer.data import preprocessing
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import named_variables
from tfmaskformer.resize import resize_bilinear
from tfmaskformer.training.optimizer import AdamW


def reshaped(values):
    """PyTorch's [out, in, height, width] reshaped "until it fits", not transposed."""
    return values.transpose(3, 2, 0, 1).reshape(values.shape)


def folded_twice(conv):
    """The converter multiplies the kernel by the norm's scale, and the layer does it again."""

    def apply(model):
        variables = named_variables(model)
        scale = variables[f"{conv}.norm.weight"].numpy() / np.sqrt(variables[f"{conv}.norm.running_var"].numpy() + layers.EPSILON)
        return weight(f"{conv}.weight", lambda values: values * scale)(model)

    return apply


def relu_before_the_sum(right):
    def call(self, inputs, sizes=None):
        outputs = tf.nn.relu(self.conv1(inputs))
        outputs = tf.nn.relu(self.conv2(outputs, sizes))
        outputs = tf.nn.relu(self.conv3(outputs))
        return outputs + (inputs if self.shortcut is None else self.shortcut(inputs))

    return call


def eps_beside_the_root(right):
    """1 / (standard deviation + eps)."""

    def call(self, inputs):
        centred = inputs - tf.reduce_mean(inputs, -1, keepdims=True)
        deviation = tf.sqrt(tf.reduce_mean(tf.square(centred), -1, keepdims=True))
        return centred / (deviation + self.eps) * self.weight + self.bias

    return call


def own_frequency(module):
    """Of each channel, where a sine and the cosine behind it have the same."""
    channels = len(module.dim_t)
    return (10000.0 ** (np.arange(channels) / channels)).astype(np.float32)


def shortcut_behind_the_norm(right):
    """Swin's ``shortcut = x`` a line too late."""

    def call(self, inputs, attn_mask=None, sizes=None):
        _, height, width, _ = inputs.shape
        shift, window = self.shift_size, self.window_size
        shortcut = self.norm1(inputs)
        grid = swin.cyclic_shift(swin.pad_to_multiple(shortcut, window), shift, window)
        attended = self.attn(swin.window_partition(grid, window), attn_mask if shift else None)
        grid = swin.cyclic_shift(swin.window_reverse(attended, window), -shift, window)
        outputs = shortcut + self.drop_path(grid[:, :height, :width])
        return outputs + self.drop_path(self.mlp(self.norm2(outputs)))

    return call


def rows_of_a_window(module):
    """Rows of the table taken to be as long as a window, not 2 · window − 1: different offsets read the same entry."""
    window = math.isqrt(len(module.relative_position_index))
    rows, columns = np.divmod(module.relative_position_index, 2 * window - 1)
    return rows * window + columns


def from_0_to_1(right):
    """The mean and deviation are those of 0 to 255."""
    return lambda self, images, *rest: right(self, tf.cast(images, tf.float64) / 255, *rest)


def squared_dice(right):
    """V-Net's dice, with squares in the denominator."""

    def losses(logits, masks, sizes):
        focal, _ = right(logits, masks, sizes)
        probability, inside = tf.sigmoid(resize_bilinear(logits, masks.shape[2:])), tf.cast(masks, logits.dtype)
        both = tf.reduce_sum(tf.square(probability), [2, 3]) + tf.reduce_sum(tf.square(inside), [2, 3])
        return focal, 1 - (2 * tf.reduce_sum(probability * inside, [2, 3]) + 1) / (both + 1)

    return losses


def under_the_last_assignment(right):
    """Auxiliary outputs are not matched for themselves."""
    return lambda self, outputs, targets, assignment: right(self, outputs, targets, tf.broadcast_to(assignment[:1], assignment.shape))


def decay_without_lr(right):
    """As TensorFlow Addons' AdamW: the weight is multiplied by 1 − decay."""

    def update(self, parameter, variable, gradient, **scalars):
        right(self, parameter._replace(weight_decay=parameter.weight_decay / scalars["lr"]), variable, gradient, **scalars)

    return update


def certain(right):
    """Whatever is kept has a score of 1 when the masks compete for pixels."""

    def softmax(logits):
        probabilities = right(logits)
        return np.where(probabilities > 0.8, 1.0, probabilities)

    return softmax


# fmt: off
FAULTS = (
    Fault("kernel reshaped, not transposed", "weights", PANOPTIC, "odd", "taps", "backbone.res3.0.conv2", "axis order",
          weight("backbone.res3.0.conv2.weight", reshaped)),
    Fault("norm folded into the kernel and applied too", "weights", PANOPTIC, "odd", "taps", "backbone.res4.1.conv2", "scale",
          folded_twice("backbone.res4.1.conv2")),
    Fault("ReLU before the shortcut is added", "layers", PANOPTIC, "odd", "taps", "backbone.res2.0", "layer order",
          replaced(resnet.BottleneckBlock, "call", relu_before_the_sum)),
    Fault("ReLU behind the last layer of the mask embedding", "layers", SEMANTIC, "odd", "taps", f"{PREDICTOR}.mask_embed", "extra term",
          replaced(transformer_predictor.MLP, "call", lambda right: lambda self, inputs: tf.nn.relu(right(self, inputs)))),
    Fault("eps added to the deviation, not to the variance", "layers", PANOPTIC, "odd", "taps", f"{ENCODER}.layers.0.norm1", "eps",
          replaced(layers.LayerNorm, "call", eps_beside_the_root)),
    Fault("cosines with frequencies of their own", "layers", PANOPTIC, "odd", "taps", f"{PIXEL}.pe_layer", "exponent",
          each(transformer.PositionEmbeddingSine, "dim_t", own_frequency)),
    Fault("Swin's shortcut from behind the norm", "layers", SWIN, "odd", "taps", "backbone.layers.0.blocks.0.norm2", "layer order",
          replaced(swin.SwinTransformerBlock, "call", shortcut_behind_the_norm)),
    Fault("offsets counted in rows of a window", "layers", SWIN, "odd", "taps", "backbone.layers.0.blocks.0.attn.softmax", OTHER,
          each(swin.WindowAttention, "relative_position_index", rows_of_a_window)),
    Fault("images from 0 to 1", "preprocessing", SEMANTIC, "odd", "taps", "images", "scale",
          replaced(MaskFormer, "preprocess", from_0_to_1)),
    Fault("width taken for height", "preprocessing", PANOPTIC, "odd", "preprocessing", "resized", "axis order",
          replaced(preprocessing, "resized_shape", lambda right: lambda *sizes: right(*sizes)[::-1])),
    Fault("class cost of log-probabilities", "matcher", SEMANTIC, "odd", "matcher", "final/0/cost_class", "extra term",
          replaced(matcher, "_cost_class", lambda right: lambda logits, labels: -tf.math.log(-right(logits, labels)))),
    Fault("dice loss with squares", "losses", PANOPTIC, "odd", "losses", "loss_dice", "exponent",
          replaced(criterion, "_mask_losses", squared_dice)),
    Fault("auxiliary losses under the last layer's assignment", "losses", PANOPTIC, "odd", "losses", "loss_ce_0", "assignment",
          replaced(SetCriterion, "losses", under_the_last_assignment)),
    Fault("decay not multiplied by the learning rate", "optimizer", SWIN, "plain", "steps", "weights", "weight decay",
          replaced(AdamW, "_update", decay_without_lr)),
    Fault("masks compete without their scores", "post-processing", PANOPTIC, "odd", "inference", "0/panoptic_seg", "missing term",
          replaced(inference, "_softmax", certain)),
)
# fmt: on
