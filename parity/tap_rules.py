"""Which axis is which, and what has no partner: data, one line a pattern.

A tap is an output of a module by its official name and call, ``<module>#<call>[<item>]``. Every tap is matched by exactly one line of
:data:`TAPS`, whose :class:`Layout` names the axes in TensorFlow and in PyTorch. Layouts are declared, never searched for.

Axes: B image of the batch, H and W rows and columns, S = H · W flattened (T: a second one), C channels, Q queries or, of a per-pixel
baseline, classes (R: a second one), N decoder layers; Y and X rows and columns of Swin's windows, P positions in a window (O: a
second one), A attention heads.
Parentheses: PyTorch has these axes in one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from converters.rules import Rule
from converters.tables import maskformer
from converters.transforms import Transform
from tfmaskformer.config import MaskFormerConfig

T = TypeVar("T")


class TapRuleError(ValueError):
    """A name that no line fits, or several do: the tables have to be completed."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of a tensor in TensorFlow (``actual``) and in PyTorch (``expected``): the same letters.

    ``stride``: px behind one position of S, T, Y and X (of a window, behind one of its patches); that of H and W shows in their length.
    """

    actual: str
    expected: str
    stride: int = 0


@dataclasses.dataclass(frozen=True)
class View:
    """One image of a batch with masked padding.

    Attributes:
        image: its index in the batch.
        canvas_px, valid_px: (height, width) of the padded canvas, and of what the network saw of the image.
    """

    image: int
    canvas_px: tuple[int, int]
    valid_px: tuple[int, int]


MAP = Layout("BHWC", "BCHW")
TOKENS = Layout("BHWC", "B(HW)C")
MEMORY = Layout("BSC", "SBC", stride=32)
QUERIES = Layout("BQC", "QBC")
QUERY_STACK = Layout("NBQC", "NQBC")  # the decoder's own output; the transformer transposes it
STATES = Layout("NBQC", "NBQC")
LOGITS = Layout("BQC", "BQC")
MASKS = Layout("BQHW", "BQHW")
QUERY_WEIGHTS = Layout("BQR", "BQR")
CROSS_WEIGHTS = Layout("BQS", "BQS", stride=32)
MEMORY_WEIGHTS = Layout("BST", "BST", stride=32)
WINDOWS = [Layout("BYXPC", "(BYX)PC", stride) for stride in (4, 8, 16, 32)]
ATTENTIONS = [Layout("BYXAPO", "(BYX)APO", stride) for stride in (4, 8, 16, 32)]

# fmt: off
TAPS: tuple[tuple[str, Layout], ...] = (
    ("images#{call}", MAP),
    ("backbone.stem#{call}", MAP),
    ("backbone.stem.conv{i:1|2|3}{norm:|.norm}#{call}", MAP),
    ("backbone.{stage:res2|res3|res4|res5}#{call}", MAP),
    ("backbone.{stage:res2|res3|res4|res5}.{block}#{call}", MAP),
    ("backbone.{stage:res2|res3|res4|res5}.{block}.{conv:conv1|conv2|conv3|shortcut}{norm:|.norm}#{call}", MAP),
    ("backbone#{call}[{stage:res2|res3|res4|res5}]", MAP),
    ("backbone.patch_embed{module:|.proj}#{call}", MAP),
    ("backbone.{module:patch_embed.norm|pos_drop|norm0|norm1|norm2|norm3}#{call}", TOKENS),
    ("backbone.layers.{stage}#{call}[{item:0|3}]", TOKENS),
    ("backbone.layers.{stage}.downsample{module:|.norm|.reduction}#{call}", TOKENS),
    ("backbone.layers.{stage}.blocks.{block}{module:|.norm1|.drop_path|.norm2|.mlp|.mlp.fc1|.mlp.act|.mlp.drop|.mlp.fc2}#{call}", TOKENS),
    *((f"backbone.layers.{stage}.blocks.{{block}}.attn{{module:|.qkv|.proj|.proj_drop}}#{{call}}", WINDOWS[stage]) for stage in range(4)),
    *((f"backbone.layers.{stage}.blocks.{{block}}.attn.{{weights:softmax|attn_drop}}#{{call}}", ATTENTIONS[stage]) for stage in range(4)),
    ("sem_seg_head.pixel_decoder.{conv:adapter|layer}_{level}{norm:|.norm}#{call}", MAP),
    ("sem_seg_head.pixel_decoder.{module:input_proj|pe_layer|mask_features|transformer}#{call}", MAP),
    ("sem_seg_head.{part:pixel_decoder|predictor}.transformer.encoder#{call}", MEMORY),
    ("sem_seg_head.{part:pixel_decoder|predictor}.transformer.encoder.layers.{n}#{call}", MEMORY),
    ("sem_seg_head.{part:pixel_decoder|predictor}.transformer.encoder.layers.{n}.{module:linear|dropout|norm}{i:|1|2}#{call}", MEMORY),
    ("sem_seg_head.{part:pixel_decoder|predictor}.transformer.encoder.layers.{n}.self_attn#{call}[0]", MEMORY),
    ("sem_seg_head.{part:pixel_decoder|predictor}.transformer.encoder.layers.{n}.self_attn#{call}[1]", MEMORY_WEIGHTS),
    ("sem_seg_head.predictor.{module:input_proj|pe_layer}#{call}", MAP),
    ("sem_seg_head.predictor.transformer#{call}[0]", STATES),
    ("sem_seg_head.predictor.transformer#{call}[1]", MAP),
    ("sem_seg_head.predictor.transformer.decoder#{call}", QUERY_STACK),
    ("sem_seg_head.predictor.transformer.decoder.norm#{call}", QUERIES),
    ("sem_seg_head.predictor.transformer.decoder.layers.{n}#{call}", QUERIES),
    ("sem_seg_head.predictor.transformer.decoder.layers.{n}.{module:linear|dropout|norm}{i:|1|2|3}#{call}", QUERIES),
    ("sem_seg_head.predictor.transformer.decoder.layers.{n}.{attention:self_attn|multihead_attn}#{call}[0]", QUERIES),
    ("sem_seg_head.predictor.transformer.decoder.layers.{n}.self_attn#{call}[1]", QUERY_WEIGHTS),
    ("sem_seg_head.predictor.transformer.decoder.layers.{n}.multihead_attn#{call}[1]", CROSS_WEIGHTS),
    ("sem_seg_head.predictor.{module:class_embed|mask_embed}#{call}", STATES),
    ("sem_seg_head.predictor.mask_embed.layers.{n}#{call}", STATES),
    ("{module:sem_seg_head|sem_seg_head.predictor}#{call}[pred_logits]", LOGITS),
    ("{module:sem_seg_head|sem_seg_head.predictor}#{call}[pred_masks]", MASKS),
    ("{module:sem_seg_head|sem_seg_head.predictor}#{call}[aux_outputs][{layer}][pred_logits]", LOGITS),
    ("{module:sem_seg_head|sem_seg_head.predictor}#{call}[aux_outputs][{layer}][pred_masks]", MASKS),
    ("sem_seg_head.predictor#{call}", MAP),
    ("sem_seg_head#{call}[sem_seg]", MASKS),
    ("sem_seg_head#{call}[aux_outputs][{layer}][sem_seg]", MASKS),
)
OUTPUTS: tuple[tuple[str, Layout], ...] = (
    ("pred_logits", LOGITS),
    ("pred_masks", MASKS),
    ("aux_outputs.{layer}.pred_logits", LOGITS),
    ("aux_outputs.{layer}.pred_masks", MASKS),
    ("sem_seg", MASKS),
    ("aux_outputs.{layer}.sem_seg", MASKS),
)
# fmt: on

EXEMPT: dict[tuple[str, str], str] = {}
"""(group, exact name) → reason, for what one side alone may have. So far all that is recorded has a partner."""


def partners(config: MaskFormerConfig) -> dict[str, tuple[str, str]]:
    """Official taps whose partner in TensorFlow has another name: official tap → (TensorFlow tap, reason)."""
    layers = config.predictor.dec_layers
    norm = "sem_seg_head.predictor.transformer.decoder.norm"
    if not config.predictor.deep_supervision:
        return {}
    reason = "upstream norms the last layer's output a second time, to the same result; TensorFlow does it once"
    return {f"{norm}#{layers}": (f"{norm}#{layers - 1}", reason)}


@dataclasses.dataclass(frozen=True)
class Names:
    """What is known of a model's names.

    Attributes:
        layout_of: (group "taps" or "outputs", name) → layout; raises :class:`TapRuleError` where no line fits, or several do.
        partners: official tap → (tap of TensorFlow that is compared with it, reason), where the names differ.
        exempt: as :data:`EXEMPT`. What a tap is exempted for, its gradient is too.
    """

    layout_of: Callable[[str, str], Layout]
    partners: Mapping[str, tuple[str, str]]
    exempt: Mapping[tuple[str, str], str]


def names(config: MaskFormerConfig) -> Names:
    """Those of MaskFormer."""
    return Names(layout_of, partners(config), EXEMPT)


def layout_of(group: str, name: str) -> Layout:
    """The layout of a tap (group "taps") or a model output (group "outputs").

    >>> layout_of("taps", "backbone#0[res3]")
    Layout(actual='BHWC', expected='BCHW', stride=0)

    Raises:
        TapRuleError: no line fits, or several do.
    """
    return _only(TAPS if group == "taps" else OUTPUTS, name)


def official_layout(array: np.ndarray, layout: Layout, view: View | None = None) -> np.ndarray:
    """A tensor of TensorFlow as PyTorch lays it out: a view of ``array`` where that is possible.

    Args:
        array: in ``layout.actual``.
        view: of masked padding, which image to take and what of it is true; None: everything.
    """
    if array.ndim != len(layout.actual):
        raise TapRuleError(f"a tensor of shape {array.shape} does not have the axes {layout.actual}")
    if view is not None:
        array = cropped(array, layout, view)
    groups = re.findall(r"\((\w+)\)|(\w)", layout.expected)
    array = array.transpose([layout.actual.index(axis) for group in groups for axis in "".join(group)])
    ends = np.cumsum([len("".join(group)) for group in groups])
    return array.reshape([math.prod(array.shape[start:end]) for start, end in zip([0, *ends], ends, strict=False)])


def tensorflow_layout(expected: np.ndarray, layout: Layout, actual: np.ndarray, view: View | None = None) -> np.ndarray:
    """The inverse of :func:`official_layout`: a copy of ``actual`` in which ``expected`` stands wherever that function would show it.

    Args:
        expected: official layout.
        actual: in ``layout.actual``; its dtype is kept, and what ``view`` leaves out of it.

    Raises:
        TapRuleError: ``actual`` has another shape.
    """
    places = official_layout(np.arange(actual.size).reshape(actual.shape), layout, view)
    if places.shape != expected.shape:
        raise TapRuleError(f"a tensor of shape {places.shape} has no place for one of shape {expected.shape}")
    tensor = actual.copy()
    tensor.flat[places.ravel()] = expected.ravel()
    return tensor


def cropped(array: np.ndarray, layout: Layout, view: View) -> np.ndarray:
    """The image's part of ``array``, all axes kept."""
    axes = layout.actual
    for position, axis in enumerate(axes):
        if axis == "B":
            array = array.take([view.image], position)
        elif axis in "HW":
            side = "HW".index(axis)
            stride = _stride(view.canvas_px[side], array.shape[position])
            array = array.take(range(math.ceil(view.valid_px[side] / stride)), position)
        elif axis in "ST":
            canvas, valid = ([math.ceil(side / layout.stride) for side in size] for size in (view.canvas_px, view.valid_px))
            positions = np.arange(math.prod(canvas)).reshape(canvas)[: valid[0], : valid[1]]
            array = array.take(positions.ravel(), position)
        elif axis in "YX":
            window = math.isqrt(array.shape[axes.index("P")])
            patches = math.ceil(view.valid_px["YX".index(axis)] / layout.stride)
            array = array.take(range(math.ceil(patches / window)), position)
    return array


def _stride(canvas_px: int, length: int) -> int:
    """The stride, a power of two up to 32, at which a canvas has this length."""
    strides = [stride for stride in (1, 2, 4, 8, 16, 32) if math.ceil(canvas_px / stride) == length]
    if len(strides) != 1:
        raise TapRuleError(f"{length} positions for {canvas_px} px fit the strides {strides}, not one; take a larger canvas")
    return strides[0]


def official_gradients(gradients: Mapping[str, np.ndarray], config: MaskFormerConfig) -> dict[str, np.ndarray]:
    """Gradients by official parameter name, in the official layout: the weights' own rules, backwards."""
    lines = [(rule.target, rule) for rule in maskformer.rules(config, "v2")]
    transforms: dict[str, Transform] = {name: _only(lines, name).transform for name in gradients}
    return {name: transforms[name].invert(gradient) for name, gradient in gradients.items()}


def _only(lines: Sequence[tuple[str, T]], name: str) -> T:
    found = [value for pattern, value in lines if _matcher(pattern)(name) is not None]
    if len(found) != 1:
        raise TapRuleError(f"{len(found) or 'no'} lines for '{name}' in the tables; parity/tap_rules.py must have exactly one")
    return found[0]


@functools.cache
def _matcher(pattern: str) -> Callable[[str], str | None]:
    return Rule(pattern, pattern).target_of
