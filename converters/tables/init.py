"""Rules for files that a backbone's training starts from: weights of an ImageNet classifier.

ResNets: Detectron2's layout (``tools/convert-torchvision-to-d2.py``; R-50.pkl, R-101.pkl, R-103.pkl). Swin: the layout of its authors'
files. A line is the name in the file and its transform; the variable is called the same behind ``backbone.``. What a file has more is
dropped for the reason given; what it has less, and everything behind the backbone, stays at its initial value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from checkpoints.registry import relative_position_index
from converters.rules import Drop, Rule
from converters.transforms import CONV2D, IDENTITY, LINEAR, Transform
from tfmaskformer.config import MaskFormerConfig, SwinConfig

TABLE = "init/1"
"""Name and version; the version grows with every change of what a rule does."""

Lines = tuple[tuple[str, Transform], ...]
Reasons = tuple[tuple[str, str], ...]

# fmt: off
RESNET: Lines = (
    ("stem.conv{i:1|2|3}.weight", CONV2D),
    ("stem.conv{i:1|2|3}.norm.{stat:weight|bias|running_mean|running_var}", IDENTITY),
    ("res{stage}.{block}.{conv:conv1|conv2|conv3|shortcut}.weight", CONV2D),
    ("res{stage}.{block}.{conv:conv1|conv2|conv3|shortcut}.norm.{stat:weight|bias|running_mean|running_var}", IDENTITY),
)
RESNET_DROPS: Reasons = (
    ("stem.fc.{param:weight|bias}", "the ImageNet classifier"),
    ("stem.conv{i:1|2|3}.norm.num_batches_tracked", "of no use to frozen batch norm"),
    ("res{stage}.{block}.{conv:conv1|conv2|conv3|shortcut}.norm.num_batches_tracked", "of no use to frozen batch norm"),
)
SWIN: Lines = (
    ("patch_embed.proj.weight", CONV2D),
    ("patch_embed.proj.bias", IDENTITY),
    ("patch_embed.norm.{param:weight|bias}", IDENTITY),
    ("layers.{stage}.blocks.{block}.norm{i:1|2}.{param:weight|bias}", IDENTITY),
    ("layers.{stage}.blocks.{block}.attn.relative_position_bias_table", IDENTITY),
    ("layers.{stage}.blocks.{block}.attn.{linear:qkv|proj}.weight", LINEAR),
    ("layers.{stage}.blocks.{block}.attn.{linear:qkv|proj}.bias", IDENTITY),
    ("layers.{stage}.blocks.{block}.mlp.{linear:fc1|fc2}.weight", LINEAR),
    ("layers.{stage}.blocks.{block}.mlp.{linear:fc1|fc2}.bias", IDENTITY),
    ("layers.{stage}.downsample.norm.{param:weight|bias}", IDENTITY),
    ("layers.{stage}.downsample.reduction.weight", LINEAR),
)
SWIN_POSITION_INDEX = "layers.{stage}.blocks.{block}.attn.relative_position_index"
SWIN_DROPS: Reasons = (
    (SWIN_POSITION_INDEX, "follows from the window; checked to be equal"),
    ("layers.{stage}.blocks.{block}.attn_mask", "follows from the size of the image; that of the training images is in the file"),
    ("norm.{param:weight|bias}", "the norm in front of the ImageNet classifier; MaskFormer has one for each level, norm0 … norm3"),
    ("head.{param:weight|bias}", "the ImageNet classifier"),
)
SWIN_INITIAL: Reasons = (
    ("backbone.norm{level}.{param:weight|bias}", "the norm of a level, which a classifier does not have"),
)
# fmt: on


def rules(config: MaskFormerConfig) -> list[Rule]:
    """The rules of the backbone of ``config``."""
    lines = SWIN if isinstance(config.backbone, SwinConfig) else RESNET
    return [Rule(name, f"backbone.{name}", transform) for name, transform in lines]


def drops(config: MaskFormerConfig, names: Iterable[str]) -> list[Drop]:
    """The tensors of the file without a variable. Only the position index has a value that is known."""
    known = {SWIN_POSITION_INDEX: relative_position_index(config.backbone.window_size)} if isinstance(config.backbone, SwinConfig) else {}
    patterns = SWIN_DROPS if isinstance(config.backbone, SwinConfig) else RESNET_DROPS
    return [
        Drop(name, reason, known.get(pattern))
        for name in names
        for pattern, reason in patterns
        if Rule(pattern, pattern).target_of(name) is not None
    ]


def filled(config: MaskFormerConfig, names: Mapping[str, object]) -> list[str]:
    """The variables that a file must fill: those of the backbone, except the few that no classifier has."""
    initial = [Rule(pattern, pattern) for pattern, _ in SWIN_INITIAL] if isinstance(config.backbone, SwinConfig) else []
    return [name for name in names if name.startswith("backbone.") and all(rule.target_of(name) is None for rule in initial)]
