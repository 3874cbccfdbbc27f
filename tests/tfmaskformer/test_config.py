"""Configs: what they refuse, and that they survive JSON."""

import json

import pytest

from tfmaskformer.config import (
    ConfigError,
    MaskFormerConfig,
    PixelDecoderConfig,
    ResNetConfig,
    TransformerPredictorConfig,
)


def test_round_trip_through_json():
    config = MaskFormerConfig(
        name="mine",
        num_classes=3,
        backbone=ResNetConfig(depth=101),
        pixel_decoder=PixelDecoderConfig("TransformerEncoderPixelDecoder", transformer_enc_layers=2),
        predictor=TransformerPredictorConfig("transformer_encoder", num_queries=7),
        size_divisibility=0,
        class_names=("a", "b", "ç"),
        thing_classes=(0, 2),
    )
    assert MaskFormerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 0}, "'num_classes' is 0"),
        ({"num_classes": "3"}, "'num_classes' must be int, got '3'"),
        ({"num_classes": True}, "'num_classes' must be int, got True"),
        ({"classes": 3}, "unknown field 'classes'"),
        ({"backbone": {"depth": 18}}, r"'backbone.depth' is 18, expected one of \[50, 101\]"),
        ({"backbone": {"deep": 18}}, "unknown field 'backbone.deep'"),
        ({"backbone": 50}, "'backbone.' must be a mapping"),
        ({"pixel_decoder": {"conv_dim": 100}}, "'pixel_decoder.conv_dim' is 100"),
        ({"pixel_decoder": {"transformer_enc_layers": 6}}, "'pixel_decoder.transformer_enc_layers' is 6"),
        ({"predictor": {"transformer_in_feature": "transformer_encoder"}}, "unless the pixel decoder"),
        ({"predictor": {"hidden_dim": 100}}, "a multiple of 2 · nheads"),
        ({"predictor": {"dropout": 1.0}}, "'predictor.dropout' is 1.0"),
        ({"class_names": ["one"]}, "'class_names' is '1 names', expected 0 or 3 names"),
        ({"thing_classes": [3]}, "indices below 3"),
        ({"pixel_mean": [1.0, 2.0]}, "'pixel_mean' must be"),
        ({"size_divisibility": -1}, "'size_divisibility' is -1"),
    ],
)
def test_what_no_model_can_have_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        MaskFormerConfig.from_dict({"name": "mine", "num_classes": 3, **changes})


def test_missing_field_is_named():
    with pytest.raises(ConfigError, match="missing field 'num_classes'"):
        MaskFormerConfig.from_dict({"name": "mine"})


def test_input_proj_is_there_where_upstream_makes_one():
    encoder = MaskFormerConfig(
        name="encoder",
        num_classes=3,
        pixel_decoder=PixelDecoderConfig("TransformerEncoderPixelDecoder", transformer_enc_layers=6),
        predictor=TransformerPredictorConfig("transformer_encoder"),
    )
    assert encoder.predictor_in_channels == 256
    assert not encoder.predictor_has_input_proj
    assert MaskFormerConfig(name="res5", num_classes=3).predictor_in_channels == 2048
    assert MaskFormerConfig(name="res5", num_classes=3).predictor_has_input_proj
