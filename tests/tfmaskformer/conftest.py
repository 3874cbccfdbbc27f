"""Small models for the tests: the official architecture at small, pairwise distinct widths."""

import numpy as np
import pytest

from tfmaskformer.config import MaskFormerConfig, PixelDecoderConfig, ResNetConfig, TransformerPredictorConfig

_BACKBONE = ResNetConfig(depth=50, stem_out_channels=8, width_per_group=12, res2_out_channels=40)

SMALL = {
    "encoder": MaskFormerConfig(
        name="small_encoder",
        num_classes=7,
        backbone=_BACKBONE,
        pixel_decoder=PixelDecoderConfig("TransformerEncoderPixelDecoder", conv_dim=64, mask_dim=48, transformer_enc_layers=2),
        predictor=TransformerPredictorConfig(
            "transformer_encoder", hidden_dim=64, num_queries=11, nheads=4, dim_feedforward=80, dec_layers=3
        ),
        size_divisibility=0,
    ),
    "base": MaskFormerConfig(
        name="small_base",
        num_classes=5,
        backbone=_BACKBONE,
        pixel_decoder=PixelDecoderConfig(conv_dim=64, mask_dim=56),
        predictor=TransformerPredictorConfig(hidden_dim=96, num_queries=9, nheads=8, dim_feedforward=72, enc_layers=1, dec_layers=2),
        size_divisibility=32,
    ),
}


def random_values(config, seed=0):
    """Non-trivial values for every variable, by official name: no bias, mean or scale is at its initial value."""
    from tfmaskformer.model import MaskFormer
    from tfmaskformer.module import parameter_specs

    rng = np.random.default_rng(seed)
    values = {}
    for name, spec in parameter_specs(MaskFormer(config)).items():
        if name.endswith("running_var") or (name.endswith("weight") and len(spec.shape) == 1):
            value = rng.uniform(0.5, 1.5, spec.shape)
        elif len(spec.shape) == 1:
            value = rng.uniform(-0.3, 0.3, spec.shape)
        else:
            value = rng.standard_normal(spec.shape) / np.sqrt(np.prod(spec.shape[:-1]))
        values[name] = value.astype(np.float32)
    return values


@pytest.fixture(scope="session", params=list(SMALL))
def small(request):
    """(config, float64 model) of each small architecture."""
    from tfmaskformer.model import MaskFormer

    config = SMALL[request.param]
    values = random_values(config)
    model = MaskFormer(config, "float64")
    model.build_parameters(values.__getitem__)
    return config, model
