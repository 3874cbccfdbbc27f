"""The engine of the rule tables: which source tensor becomes which variable, strict both ways.

A table is data (``converters.tables``); adding a model adds a table and changes nothing here. The engine demands that exactly one
rule fits each source tensor, every variable is filled exactly once, every rule is used, and shape and dtype are right after the
transform. It looks at names, shapes and dtypes only, and reports everything that is wrong at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from converters.errors import ConversionError, quoted
from converters.transforms import IDENTITY, Shape, Transform

_PLACEHOLDER = re.compile(r"\{(\w+)(?::([^{}]+))?\}")
_LISTED = 12


@dataclasses.dataclass(frozen=True)
class Rule:
    """Every tensor whose name fits ``source`` becomes the variable ``target``, in the layout that ``transform`` gives.

    Patterns are names with placeholders: ``{n}`` stands for an index (0, 1, …), ``{param:weight|bias}`` for one of some words. Both
    patterns have the same placeholders, so a rule also leads back.

    >>> rule = Rule("layers.{n}.w", "block{n}.kernel", Transform("LINEAR", (1, 0)))
    >>> rule.target_of("layers.12.w"), rule.source_of("block12.kernel"), rule.target_of("layers.x.w")
    ('block12.kernel', 'layers.12.w', None)
    """

    source: str
    target: str
    transform: Transform = IDENTITY

    def __post_init__(self):
        names = [sorted(name for name, _ in _PLACEHOLDER.findall(pattern)) for pattern in (self.source, self.target)]
        if names[0] != names[1] or len(set(names[0])) != len(names[0]):
            raise ValueError(f"rule {self.source!r} → {self.target!r}: each placeholder must occur once on both sides")

    def target_of(self, name: str) -> str | None:
        """The variable that the tensor ``name`` becomes; None where the rule does not fit."""
        return _translate(name, self.source, self.target)

    def source_of(self, name: str) -> str | None:
        """The tensor that the variable ``name`` comes from; None where the rule does not fit."""
        return _translate(name, self.target, self.source)


@dataclasses.dataclass(frozen=True)
class Drop:
    """The tensor ``source`` has no variable, for ``reason``; its value must be ``expected``."""

    source: str
    reason: str
    expected: np.ndarray


@dataclasses.dataclass(frozen=True)
class Move:
    """One tensor's way: from ``source`` through ``transform`` to ``target``."""

    source: str
    target: str
    transform: Transform


def plan(
    rules: Sequence[Rule],
    drops: Sequence[Drop],
    sources: Mapping[str, np.ndarray],
    targets: Mapping[str, Shape],
    dtype: str = "float32",
) -> list[Move]:
    """What is to be done with each source tensor, in their order; dropped ones are left out.

    Args:
        rules: the table.
        drops: tensors without a variable.
        sources: name → tensor.
        targets: name → shape of every variable of the model.
        dtype: of every source tensor and variable.

    Raises:
        ConversionError: a tensor without a rule or with several, a variable that is not filled or filled twice, an unused rule, a
            wrong rank, shape, dtype or dropped value. All of them are listed, with the nearest names.
    """
    moves, problems, unmatched = [], [], []
    used: Counter[str] = Counter()
    dropped = {drop.source: drop for drop in drops}
    for name, tensor in sources.items():
        fitting = [(rule, target) for rule in rules if (target := rule.target_of(name)) is not None]
        patterns = [rule.source for rule, _ in fitting] + [name] * (name in dropped)
        used.update(patterns)
        if len(patterns) > 1:
            problems.append(f"{len(patterns)} rules for {_told(name, tensor)}: {', '.join(patterns)}")
        elif not patterns:
            unmatched.append(name)
        elif fitting:
            moves.append(Move(name, fitting[0][1], fitting[0][0].transform))
        elif not np.array_equal(tensor, dropped[name].expected):
            problems.append(f"{_told(name, tensor)} is not {_brief(dropped[name].expected)}, which it must be to be dropped")

    filled = Counter(move.target for move in moves)
    for move in moves:
        problems += _check(move, sources[move.source], targets, filled[move.target], dtype)
    missing = [name for name in targets if name not in filled]
    wanted = {name: [source for rule in rules if (source := rule.source_of(name)) is not None] for name in missing}
    problems += _first(_missing(name, targets[name], wanted[name], unmatched) for name in missing)
    problems += _first(_unmatched(name, sources[name], rules, dropped) for name in unmatched)
    covered = {rule.source for rule in rules if any(rule.source_of(name) is not None for name in missing)}
    unused = [pattern for pattern in (*(rule.source for rule in rules), *dropped) if not used[pattern] and pattern not in covered]
    problems += [f"no tensor for the rule '{pattern}'" for pattern in unused]
    if problems:
        raise ConversionError(f"the tensors do not fit the model: {_count(problems, 'problem')}", *_first(problems, 4 * _LISTED))
    return moves


def _check(move: Move, tensor: np.ndarray, targets: Mapping[str, Shape], times: int, dtype: str) -> Iterable[str]:
    told = _told(move.source, tensor)
    if tensor.dtype != np.dtype(dtype):
        yield f"{told} is {tensor.dtype.str}, expected {np.dtype(dtype).str} ({dtype}); convert it before pickling: array.astype('{dtype}')"
    if times > 1:
        yield f"{told} is one of {times} tensors for the variable '{move.target}'"
    if move.target not in targets:
        nearest = difflib.get_close_matches(move.target, targets, n=1, cutoff=0.0)
        yield f"{told} would become '{move.target}', which the model does not have; nearest: {', '.join(map(repr, nearest))}"
    elif not move.transform.fits(tensor.shape):
        yield f"{told} has {tensor.ndim} axes, {move.transform.name} needs {len(move.transform.permutation or ())}"
    elif (shape := move.transform.shape(tensor.shape)) != tuple(targets[move.target]):
        yield f"{told} becomes {shape} through {move.transform.name}, but '{move.target}' is {tuple(targets[move.target])}"


def _missing(name: str, shape: Shape, sources: list[str], unmatched: list[str]) -> str:
    if not sources:
        return f"no rule fills the variable '{name}' {shape}"
    nearest = difflib.get_close_matches(sources[0], unmatched, n=1, cutoff=0.8)
    return f"missing: '{sources[0]}', for the variable {shape}" + (f"; nearest in the file: {quoted(nearest[0])}" if nearest else "")


def _unmatched(name: str, tensor: np.ndarray, rules: Sequence[Rule], dropped: Iterable[str]) -> str:
    indexed = re.sub(r"(?<=[.])\d+(?=[.])", "0", name[:200])
    examples = {_PLACEHOLDER.sub(lambda match: (match[2] or "0").split("|")[0], rule.source): rule.source for rule in rules}
    examples |= {name: name for name in dropped}
    nearest = difflib.get_close_matches(indexed, examples, n=1, cutoff=0.0)
    return f"no rule for {_told(name, tensor)}; nearest rule: {', '.join(repr(examples[name]) for name in nearest)}"


def _first(items: Iterable[str], limit: int = _LISTED) -> list[str]:
    """The first items; the others, which need not be made, are only counted."""
    listed, count = [], 0
    for count, item in enumerate(items, 1):
        if count <= limit:
            listed.append(item)
    return listed + [f"… and {count - limit} more of this kind"] * (count > limit)


def _told(name: str, tensor: np.ndarray) -> str:
    return f"{quoted(name)} {tensor.shape}"


def _brief(values: np.ndarray) -> str:
    flat = values.ravel()
    return f"[{', '.join(f'{value:g}' for value in flat[:2])}, …, {flat[-1]:g}] {values.shape}"


def _count(items: Sequence[str], noun: str) -> str:
    return f"{len(items)} {noun}{'s' * (len(items) != 1)}"


@functools.cache
def _compiled(pattern: str, other: str) -> re.Pattern[str]:
    """``pattern`` as a regular expression; the words of a placeholder may be written in ``other``, the rule's other side."""
    choices = {name: "|".join(map(re.escape, words.split("|"))) for name, words in _PLACEHOLDER.findall(pattern + other) if words}
    expression, end = "", 0
    for match in _PLACEHOLDER.finditer(pattern):
        choice = choices.get(match[1], "0|[1-9][0-9]*")
        expression += f"{re.escape(pattern[end : match.start()])}(?P<{match[1]}>{choice})"
        end = match.end()
    return re.compile(expression + re.escape(pattern[end:]))


def _translate(name: str, pattern: str, into: str) -> str | None:
    match = _compiled(pattern, into).fullmatch(name)
    return match and _PLACEHOLDER.sub(lambda placeholder: match[placeholder[1]], into)
