"""What the training in TensorFlow starts from."""

from __future__ import annotations

import numpy as np

from checkpoints import registry
from parity import train_shapes, train_shapes_tensorflow
from tfmaskformer.data import shapes


def test_frozen_norms_normalise_from_the_first_step(tmp_path):
    import tensorflow as tf

    import tfmaskformer
    from tfmaskformer.config import MaskFormerConfig
    from tfmaskformer.layers import FrozenBatchNorm2d
    from tfmaskformer.module import named_modules, record_taps

    config = MaskFormerConfig.from_dict(registry.entry(train_shapes.NAME).config)
    image = shapes.sample("train", 0).image
    train_shapes_tensorflow.write_initial(config, [image], 3, tmp_path / "initial")
    model = tfmaskformer.load(tmp_path / "initial")
    norms = {name for name, module in named_modules(model) if isinstance(module, FrozenBatchNorm2d)}
    seen = set()

    def check(tap, outputs):
        if (name := tap.partition("#")[0]) in norms:
            seen.add(name)
            np.testing.assert_allclose(np.mean(outputs, (0, 1, 2)), 0, atol=1e-3)
            np.testing.assert_allclose(np.var(outputs, (0, 1, 2), ddof=1), 1, atol=0.02)
        return outputs

    with record_taps(check):
        model.backbone(model.preprocess(tf.constant(image[np.newaxis]), tf.constant([image.shape[:2]], tf.int32)))
    assert seen == norms
    assert len(norms) == 53
