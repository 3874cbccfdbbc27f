"""The rule engine: every kind of strictness, on a table of four lines."""

from __future__ import annotations

import numpy as np
import pytest

from converters.errors import ConversionError
from converters.rules import Drop, Move, Rule, first, plan
from converters.transforms import CONV2D, IDENTITY, LINEAR, Transform

RULES = [
    Rule("stem.weight", "stem.kernel", CONV2D),
    Rule("layers.{n}.weight", "blocks.{n}.kernel", LINEAR),
    Rule("layers.{n}.{stat:mean|var}", "blocks.{n}.{stat}"),
]
DROPS = [Drop("count", "not needed", np.ones(2, np.float32))]
TARGETS = {"stem.kernel": (7, 5, 3, 8), "blocks.0.kernel": (3, 4), "blocks.0.mean": (4,), "blocks.0.var": (4,)}
SHAPES = {"stem.weight": (8, 3, 7, 5), "layers.0.weight": (4, 3), "layers.0.mean": (4,), "layers.0.var": (4,)}


def sources(**changes):
    tensors = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()} | {"count": np.ones(2, np.float32)}
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def problems(tensors, rules=RULES, drops=DROPS, targets=TARGETS):
    with pytest.raises(ConversionError) as raised:
        plan(rules, drops, tensors, targets)
    head, *lines = str(raised.value).split("\n  ")
    assert head == f"the tensors do not fit the model: {len(lines)} problem{'s' * (len(lines) > 1)}"
    return lines


def test_a_plan_has_every_tensor_once_in_the_order_of_the_file():
    assert plan(RULES, DROPS, sources(), TARGETS) == [
        Move("stem.weight", "stem.kernel", CONV2D),
        Move("layers.0.weight", "blocks.0.kernel", LINEAR),
        Move("layers.0.mean", "blocks.0.mean", IDENTITY),
        Move("layers.0.var", "blocks.0.var", IDENTITY),
    ]


def test_missing_tensor():
    assert problems(sources(layers__0__mean=None)) == ["missing: 'layers.0.mean', for the variable (4,)"]


def test_extra_tensor_is_told_with_the_nearest_rule():
    assert problems(sources(layers__0__weigth=np.zeros(3))) == ["no rule for 'layers.0.weigth' (3,); nearest rule: 'layers.{n}.weight'"]


def test_renamed_tensor_is_told_from_both_sides():
    missing, extra = problems(sources(layers__0__mean=None, layers__0__means=np.zeros(4, np.float32)))
    assert missing == "missing: 'layers.0.mean', for the variable (4,); nearest in the file: 'layers.0.means'"
    assert extra.startswith("no rule for 'layers.0.means' (4,)")


def test_tensor_for_a_variable_that_the_model_does_not_have():
    assert problems(sources(layers__1__mean=np.zeros(4, np.float32))) == [
        "'layers.1.mean' (4,) would become 'blocks.1.mean', which the model does not have; nearest: 'blocks.0.mean'"
    ]


def test_index_is_a_number_without_leading_zeros():
    for name in ("layers.00.mean", "layers..mean", "layers.x.mean", "layers.0.0.mean", "xlayers.0.mean", "layers.0.mean\n"):
        assert any(line.startswith("no rule for") for line in problems(sources() | {name: np.zeros(4, np.float32)})), name


def test_two_rules_for_one_tensor():
    assert problems(sources(), [*RULES, Rule("layers.{n}.mean", "other.{n}")])[0] == (
        "2 rules for 'layers.0.mean' (4,): layers.{n}.{stat:mean|var}, layers.{n}.mean"
    )
    assert "2 rules for 'count' (2,): count, count" in problems(sources(), [*RULES, Rule("count", "stem.count")])


def test_two_tensors_for_one_variable():
    rules = [*RULES, Rule("copy", "stem.kernel", CONV2D)]
    lines = problems(sources(copy=np.zeros((8, 3, 7, 5), np.float32)), rules)
    assert lines == [
        "'stem.weight' (8, 3, 7, 5) is one of 2 tensors for the variable 'stem.kernel'",
        "'copy' (8, 3, 7, 5) is one of 2 tensors for the variable 'stem.kernel'",
    ]


def test_unused_rule():
    assert problems(sources(), [*RULES, Rule("head.weight", "head.kernel")]) == ["no tensor for the rule 'head.weight'"]


def test_unused_drop():
    assert problems(sources(count=None)) == ["no tensor for the rule 'count'"]


def test_variable_without_a_rule():
    assert problems(sources(), targets=TARGETS | {"head.kernel": (2, 3)}) == ["no rule fills the variable 'head.kernel' (2, 3)"]


def test_wrong_shape_is_told_after_the_transform():
    assert problems(sources(layers__0__weight=np.zeros((3, 4), np.float32))) == [
        "'layers.0.weight' (3, 4) becomes (4, 3) through LINEAR, but 'blocks.0.kernel' is (3, 4)"
    ]


def test_wrong_number_of_axes():
    assert problems(sources(stem__weight=np.zeros((8, 3), np.float32))) == ["'stem.weight' (8, 3) has 2 axes, CONV2D needs 4"]


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_wrong_dtype(dtype):
    assert problems(sources(layers__0__mean=np.zeros(4, dtype))) == [f"'layers.0.mean' (4,) is {dtype}, expected floating numbers"]


def test_dropped_tensor_must_have_the_expected_value():
    for wrong in (np.array([1, 2], np.float32), np.ones(3, np.float32)):
        (line,) = problems(sources(count=wrong))
        assert line == f"'count' {wrong.shape} is not [1, 1, …, 1] (2,), which it must be to be dropped"


def test_everything_is_told_at_once():
    lines = problems(sources(layers__0__mean=None, stem__weight=np.zeros((8, 3), np.int8), other=np.zeros(1), count=np.zeros(2)))
    assert len(lines) == 5


def test_long_lists_are_shortened():
    lines = problems(sources() | {f"more.{n}": np.zeros(1) for n in range(100)})
    assert len(lines) == 13
    assert lines[-1] == "… and 88 more of this kind"


def test_lines_that_are_not_listed_are_not_made():
    made = []
    lines = first(list(range(10**6)), lambda item: made.append(item) or str(item))
    assert made == list(range(12))
    assert lines[-1] == "… and 999988 more of this kind"


@pytest.mark.parametrize(("source", "target"), [("a.{n}", "b"), ("a", "b.{n}"), ("a.{n}", "b.{m}"), ("a.{n}.{n}", "b.{n}.{n}")])
def test_a_rule_that_does_not_lead_back_cannot_be_made(source, target):
    with pytest.raises(ValueError, match="each placeholder must occur once on both sides"):
        Rule(source, target)


def test_words_may_be_others_on_the_other_side():
    rule = Rule("res{stage:0→2|1→3}.{kind:w→weight|kernel→weight|bias}", "stages.{stage}.{kind}")
    assert [rule.target_of(f"res{stage}.{kind}") for stage, kind in (("0", "w"), ("1", "kernel"), ("0", "bias"))] == [
        "stages.2.weight",
        "stages.3.weight",
        "stages.2.bias",
    ]
    assert [rule.target_of(name) for name in ("res2.w", "res3.bias", "res0.weight", "res00.w", "res0→2.w")] == [None] * 5
    assert (rule.source_of("stages.3.weight"), rule.source_of("stages.1.bias")) == ("res1.w", None)
    # The side on which they are written comes before the arrow.
    assert Rule("res{stage}", "stages.{stage:2→0|3→1}").target_of("res1") == "stages.3"


@pytest.mark.parametrize(
    ("transform", "shape"), [(IDENTITY, (2, 3, 4)), (LINEAR, (40, 70)), (CONV2D, (40, 33, 3, 2)), (CONV2D, (5, 3, 1, 1))]
)
def test_transforms_lead_back_to_equal_bytes(transform, shape):
    source = np.random.default_rng(0).standard_normal(shape, np.float32)
    target = np.full(transform.shape(shape), np.nan, np.float32)
    transform.copy(source, target)
    assert target.tobytes() == transform.apply(source).tobytes()
    assert transform.invert(target).tobytes() == source.tobytes()


def test_transforms_place_each_axis():
    kernel = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)  # [output, input, height, width]
    assert CONV2D.apply(kernel)[4, 6, 2, 1] == kernel[1, 2, 4, 6]
    assert LINEAR.apply(kernel[0, 0])[6, 4] == kernel[0, 0, 4, 6]


def test_copying_refuses_another_dtype():
    with pytest.raises(TypeError):
        Transform("t", (1, 0)).copy(np.zeros((2, 3)), np.zeros((3, 2), np.float32))
