"""Gradients that go missing or are others, while every result is right."""

from __future__ import annotations

import tensorflow as tf

from parity.faults.fault import DECODER, DEEPLAB, PANOPTIC, PREDICTOR, SEMANTIC, SWIN, Fault, replaced
from tfmaskformer import criterion, layers, resnet, swin, transformer, transformer_predictor


def no_mask_gradient(right):
    def cut(layer):
        return {**layer, "pred_masks": tf.stop_gradient(layer["pred_masks"])}

    def losses(outputs, *rest):
        return right({**cut(outputs), "aux_outputs": [cut(layer) for layer in outputs["aux_outputs"]]}, *rest)

    return losses


def no_dice_gradient(right):
    def losses(logits, masks, sizes):
        focal, dice = right(logits, masks, sizes)
        return focal, tf.stop_gradient(dice) + 0 * tf.reduce_sum(logits, [2, 3])  # connected, but by nothing

    return losses


def no_gradient_of_memory(right):
    return lambda self, tgt, memory, *rest: right(self, tgt, tf.stop_gradient(memory), *rest)


def straight_through(right):
    """A ReLU whose gradient is 1 everywhere."""

    def call(self, inputs):
        *hidden, last = self.layers
        for layer in hidden:
            outputs = layer(inputs)
            inputs = outputs + tf.stop_gradient(tf.nn.relu(outputs) - outputs)
        return last(inputs)

    return call


def constant_statistics(right):
    """Mean and variance taken for constants."""

    def call(self, inputs):
        centred = inputs - tf.stop_gradient(tf.reduce_mean(inputs, -1, keepdims=True))
        variance = tf.stop_gradient(tf.reduce_mean(tf.square(centred), -1, keepdims=True))
        return centred * tf.math.rsqrt(variance + self.eps) * self.weight + self.bias

    return call


def last_one_counts(right):
    """Where an entry of the table is read several times, one of its gradients overwrites the others."""

    def bias(self):
        index = tf.constant(self.relative_position_index.ravel())

        @tf.custom_gradient
        def gathered(table):
            def backward(upstream):
                by_pair = tf.reshape(tf.transpose(upstream, [1, 2, 0]), [-1, self.num_heads])
                return tf.tensor_scatter_nd_update(tf.zeros_like(table), index[:, tf.newaxis], by_pair)

            pairs = tf.reshape(tf.gather(table, index), [*self.relative_position_index.shape, self.num_heads])
            return tf.transpose(pairs, [2, 0, 1]), backward

        return gathered(self.relative_position_bias_table.value)

    return bias


def frozen(stage):
    """As Detectron2's ``FREEZE_AT``, which is 0 in every official config."""

    def make(right):
        def call(self, inputs, sizes=None):
            outputs = right(self, inputs, sizes)
            return tf.stop_gradient(outputs) if self.official_name == stage else outputs

        return call

    return replaced(resnet.Stage, "call", make)


def detached_scores(right):
    """The weights of the attention taken for constants."""

    def call(self, query, key, value, valid_keys=None, training=None):
        outputs, weights = right(self, query, key, value, valid_keys, training)
        # What the output owes to the query and key alone has no gradient: they are constants here, the parameters of all three stay.
        constant, _ = right(self, tf.stop_gradient(query), tf.stop_gradient(key), value, valid_keys, training)
        return constant + tf.stop_gradient(outputs - constant), weights

    return call


# fmt: off
FAULTS = (
    Fault("masks cut off from the gradient", "gradients", PANOPTIC, "even", "gradients", f"{PREDICTOR}.mask_embed.layers.2", "missing term",
          replaced(criterion, "_losses_masks", no_mask_gradient), first=True),
    Fault("dice loss without a gradient", "gradients", PANOPTIC, "odd", "gradients", "sem_seg_head", "missing term",
          replaced(criterion, "_mask_losses", no_dice_gradient)),
    Fault("memory without a gradient", "gradients", SEMANTIC, "odd", "gradients", f"{PREDICTOR}.input_proj", "missing term",
          replaced(transformer.TransformerDecoder, "call", no_gradient_of_memory)),
    Fault("ReLU with a gradient everywhere", "gradients", PANOPTIC, "odd", "gradients", f"{PREDICTOR}.mask_embed.layers.1", "derivative",
          replaced(transformer_predictor.MLP, "call", straight_through)),
    Fault("a norm's statistics without a gradient", "gradients", SEMANTIC, "odd", "gradients", f"{DECODER}.layers.2", "missing term",
          replaced(layers.LayerNorm, "call", constant_statistics)),
    Fault("gradients of a table overwrite one another", "gradients", SWIN, "odd", "gradients", "backbone.layers.3.blocks.1.attn",
          "derivative",
          replaced(swin.WindowAttention, "relative_position_bias", last_one_counts)),
    Fault("backbone frozen up to res2", "gradients", DEEPLAB, "odd", "gradients", "backbone.res2.2.conv3", "missing term",
          frozen("backbone.res2")),
    Fault("inputs of the scores without a gradient", "gradients", SEMANTIC, "odd", "gradients", f"{PREDICTOR}.query_embed",
          "missing term",
          replaced(layers.MultiheadAttention, "call", detached_scores)),
)
# fmt: on
