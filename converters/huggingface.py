"""A MaskFormer of Hugging Face's transformers (``facebook/maskformer-…``) → the official tensors. Nothing is read before it is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from converters.errors import ConversionError, quoted
from converters.rules import Rule, counted, first, nearest_of, no_rule_for, told
from converters.tables.huggingface import DROPS, SECTIONS, Part
from converters.tensor import LazyTensor, Tensor

_LINES: list[tuple[Rule, Part]] = [
    (Rule(ours + name, theirs + official), part) for ours, theirs, lines in SECTIONS for name, official, part in lines
]
_DROPS = [(Rule(pattern, pattern), reason) for pattern, reason in DROPS]


def is_huggingface(names: Iterable[str]) -> bool:
    """Whether a file has these names from transformers: those of a MaskFormer, or of one of its relatives.

    >>> is_huggingface(["model.pixel_level_module.encoder.model.layernorm.bias"]), is_huggingface(["backbone.norm0.bias"])
    (True, False)
    """
    return any(name.startswith(("model.pixel_level_module.", "pixel_level_module.")) for name in names)


def official_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """Official v2 name → tensor in the official PyTorch layout; and name and reason of what has no official counterpart.

    Tensors that become part of an official one (query, key, value) are joined along the first axis when their elements are asked for;
    all others are passed on as they are.

    Args:
        tensors: name → tensor of ``MaskFormerForInstanceSegmentation``, as transformers saves it.

    Raises:
        ConversionError: a tensor without a rule or with several, a part that is missing or differs from the others in shape or dtype, two
            tensors for the same. All of them are listed, with the nearest names.
    """
    found: dict[str, dict[Part, list[str]]] = {}
    dropped, unmatched, problems = [], [], []
    for name, tensor in tensors.items():
        fitting = [(rule, part, target) for rule, part in _LINES if (target := rule.target_of(name)) is not None]
        dropping = [(rule, reason) for rule, reason in _DROPS if rule.target_of(name) is not None]
        patterns = [rule.source for rule, _, _ in fitting] + [rule.source for rule, _ in dropping]
        if len(patterns) > 1:
            problems.append(f"{len(patterns)} rules for {told(name, tensor)}: {', '.join(patterns)}")
        elif fitting:
            _, part, target = fitting[0]
            found.setdefault(target, {}).setdefault(part, []).append(name)
        elif dropping:
            dropped.append((name, dropping[0][1]))
        else:
            unmatched.append(name)

    wrong = [target for target, parts in found.items() if not _fit(parts, tensors)]
    problems += first(wrong, lambda target: _misfit(target, found[target], tensors, unmatched))
    patterns = [rule.source for rule, _ in _DROPS]
    problems += first(unmatched, lambda name: no_rule_for(name, tensors[name], [rule for rule, _ in _LINES], patterns))
    if problems:
        what = f"the tensors are not those of transformers' MaskFormerForInstanceSegmentation: {counted(problems, 'problem')}"
        raise ConversionError(what, *first(problems, limit=48), "expected a file such as those of facebook/maskformer-swin-base-coco")
    return {target: _joined([tensors[name] for _, (name,) in sorted(parts.items())]) for target, parts in found.items()}, dropped


def _fit(found: Mapping[Part, Sequence[str]], tensors: Mapping[str, Tensor]) -> bool:
    """Whether every part is there, once, and all of them are alike."""
    (_, count), *_ = found
    kinds = {(tensors[name].shape, tensors[name].dtype) for names in found.values() for name in names}
    once = len(found) == count and all(len(names) == 1 for names in found.values())
    return once and len(kinds) == 1 and (count == 1 or all(shape for shape, _ in kinds))


def _misfit(target: str, found: Mapping[Part, Sequence[str]], tensors: Mapping[str, Tensor], unmatched: Sequence[str]) -> str:
    """What prevents the tensors from becoming ``target``."""
    (_, count), *_ = found
    what = f"the official {quoted(target)}"
    twice = [" and ".join(map(quoted, names)) for names in found.values() if len(names) > 1]
    if twice:
        return f"{', '.join(twice)} are both {what}"
    lacking = {(index, count) for index in range(count)} - found.keys()
    missing = [name for rule, part in _LINES if part in lacking and (name := rule.source_of(target)) is not None]
    if missing:
        return f"missing: {', '.join(map(quoted, missing))}, for {what}{nearest_of(missing[0], unmatched)}"
    parts = ", ".join(f"{told(name, tensors[name])} {tensors[name].dtype}" for _, (name,) in sorted(found.items()))
    return f"cannot be joined to {what}: {parts}"


def _joined(parts: Sequence[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    length, *others = parts[0].shape
    return LazyTensor((len(parts) * length, *others), parts[0].dtype, lambda: np.concatenate([np.asarray(part) for part in parts]))
