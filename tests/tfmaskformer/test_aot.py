"""The network and its losses compile for a TPU; what does not is refused with a reason.

Needs JAX and the TPU compiler (extra ``aot``), which exist for Linux on x86-64 and Python 3.11 or later.
"""

from __future__ import annotations

import importlib.util
import sys

import pytest
import tensorflow as tf

from checkpoints import registry
from tfmaskformer.aot import AotError, TargetError, check_target, compile_for_tpu
from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.criterion import SetCriterion
from tfmaskformer.model import MaskFormer

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs the extra 'aot'")
VECTOR = tf.TensorSpec([128])


@needs_compiler
def test_forward_and_losses_compile_for_v5e():
    """R50 panoptic on a padded canvas, matcher included: static shapes, no host callback, fits into one core's 16 GB."""
    entry = registry.entry("maskformer_panoptic_R50_bs64_554k")
    config = MaskFormerConfig.from_dict(entry.config)
    model = MaskFormer(config, "mixed_bfloat16")
    model.build_parameters()
    criterion = SetCriterion(config)

    def step(images, image_sizes, labels, masks, num_objects):
        outputs = model(images, image_sizes, padding="masked")
        losses, assignment = criterion(outputs, {"labels": labels, "masks": masks, "num_objects": num_objects})
        return losses, assignment

    stats = compile_for_tpu(
        step,
        tf.TensorSpec([1, 640, 640, 3], tf.uint8),
        tf.TensorSpec([1, 2], tf.int32),
        tf.TensorSpec([1, 20], tf.int32),
        tf.TensorSpec([1, 20, 640, 640], tf.bool),
        tf.TensorSpec([1], tf.int32),
    )
    assert stats.argument_bytes >= 4 * entry.num_parameters
    assert stats.argument_bytes < stats.peak_hbm_bytes < 2**30
    # Convolutions of ResNet-50 and the pixel decoder alone are 1.4e11 at this size: nothing was optimised away.
    assert 1.4e11 < stats.flops < 2.5e11


@needs_compiler
@pytest.mark.parametrize("name", ["tiny_swin", "tiny_deeplab"])
def test_other_backbones_compile_with_masked_padding(name):
    """Windows of the true size of every image, and dilated convolutions, at static shapes and with stochastic depth."""
    model = MaskFormer(MaskFormerConfig.from_dict(registry.entry(name).config), "mixed_bfloat16")
    model.build_parameters()
    stats = compile_for_tpu(
        lambda images, sizes: model.backbone(images, sizes, training=True),
        tf.TensorSpec([2, 101, 139, 3], tf.bfloat16),
        tf.TensorSpec([2, 2], tf.int32),
    )
    backbone = sum(variable.numpy().nbytes for variable in model.backbone.variables)
    assert backbone <= stats.argument_bytes < stats.peak_hbm_bytes < 2**28


@needs_compiler
def test_variables_may_be_updated():
    variable = tf.Variable(tf.zeros([128]))
    stats = compile_for_tpu(lambda x: variable.assign_add(x) + 1, VECTOR)
    assert stats.argument_bytes >= 2 * 128 * 4


@needs_compiler
@pytest.mark.parametrize(
    ("fn", "spec", "message"),
    [
        (lambda x: tf.boolean_mask(x, x > 0), VECTOR, r"shape of an output depends on data.*f32\[<=128\]"),
        (lambda x: tf.numpy_function(lambda a: a, [x], tf.float32), VECTOR, r"operation PyFunc .*test_aot.py:\d+\) has no XLA kernel"),
        (
            lambda x: x @ tf.transpose(x),
            tf.TensorSpec([80_000, 80_000]),
            r"compiler for v5e:2x2 refuses the program.*memory on HBM.*\n.*smaller --batch",
        ),
    ],
    ids=["data-dependent shape", "host callback", "too large"],
)
def test_refused(fn, spec, message):
    with pytest.raises(AotError, match=message):
        compile_for_tpu(fn, spec)


@needs_compiler
def test_unknown_topology():
    with pytest.raises(AotError, match="no topology 'v99:2x2'"):
        compile_for_tpu(tf.identity, VECTOR, topology="v99:2x2")


@needs_compiler
def test_what_has_a_shape_by_data_inside_is_padded():
    assert compile_for_tpu(lambda x: tf.reduce_sum(tf.boolean_mask(x, x > 0)), VECTOR).flops > 0


@pytest.mark.parametrize("topology", ["", "v5e", "v5e:", "v5e:2", "v5e:2x2\n", "2x2"])
def test_no_topology_is_taken_for_a_default(topology):
    with pytest.raises(TargetError, match=r"no topology .*\n  expected one like 'v5e:2x2'"):
        check_target(topology)


def test_dynamic_argument():
    with pytest.raises(AotError, match=r"shape=\(None,\).* has no static shape"):
        compile_for_tpu(tf.identity, tf.TensorSpec([None]))


def test_without_jax(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(AotError, match=r"install the extra: pip install 'tfmaskformer\[aot\]'"):
        compile_for_tpu(tf.identity, VECTOR)
