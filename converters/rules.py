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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from converters.errors import ConversionError, quoted
from converters.tensor import Tensor, is_float
from converters.transforms import IDENTITY, Shape, Transform

_PLACEHOLDER = re.compile(r"\{(\w+)(?::([^{}]+))?\}")
_LISTED = 12
_COMPARED = 1000

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Every tensor whose name fits ``source`` becomes the variable ``target``, in the layout that ``transform`` gives.

    Patterns are names with placeholders: ``{n}`` stands for an index (0, 1, …), ``{param:weight|bias}`` for one of some words, and
    ``{norm:before→1|after→2}`` for words that are others on the other side. Both patterns have the same placeholders, so a rule also
    leads back; where several words become one, to the first.

    >>> rule = Rule("layers.{n}.w", "block{n}.kernel", Transform("LINEAR", (1, 0)))
    >>> rule.target_of("layers.12.w"), rule.source_of("block12.kernel"), rule.target_of("layers.x.w")
    ('block12.kernel', 'layers.12.w', None)
    >>> rule = Rule("stages.{n:0→2|1→3}.w", "res{n}.kernel")
    >>> rule.target_of("stages.1.w"), rule.source_of("res2.kernel"), rule.target_of("stages.2.w")
    ('res3.kernel', 'stages.0.w', None)
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
    """The tensor ``source`` has no variable, for ``reason``; its value must be ``expected``, where that is known."""

    source: str
    reason: str
    expected: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Move:
    """One tensor's way: from ``source`` through ``transform`` to ``target``."""

    source: str
    target: str
    transform: Transform


def plan(
    rules: Sequence[Rule],
    drops: Sequence[Drop],
    sources: Mapping[str, Tensor],
    targets: Mapping[str, Shape],
) -> list[Move]:
    """What is to be done with each source tensor, in their order; dropped ones are left out.

    Args:
        rules: the table.
        drops: tensors without a variable.
        sources: name → tensor.
        targets: name → shape of every variable of the model.

    Raises:
        ConversionError: a tensor without a rule or with several, a variable that is not filled or filled twice, an unused rule, a
            wrong rank or shape, elements that are no floating numbers, or a wrong dropped value. All of them are listed, with the
            nearest names.
    """
    moves, problems, unmatched = [], [], []
    used: Counter[str] = Counter()
    dropped = {drop.source: drop for drop in drops}
    for name, tensor in sources.items():
        fitting = [(rule, target) for rule in rules if (target := rule.target_of(name)) is not None]
        patterns = [rule.source for rule, _ in fitting] + [name] * (name in dropped)
        used.update(patterns)
        if len(patterns) > 1:
            problems.append(f"{len(patterns)} rules for {told(name, tensor)}: {', '.join(patterns)}")
        elif not patterns:
            unmatched.append(name)
        elif fitting:
            moves.append(Move(name, fitting[0][1], fitting[0][0].transform))
        elif (expected := dropped[name].expected) is not None and not _is_expected(np.asarray(tensor), expected):
            problems.append(f"{told(name, tensor)} is not {_brief(expected)}, which it must be to be dropped")

    filled = Counter(move.target for move in moves)
    for move in moves:
        problems += _check(move, sources[move.source], targets, filled[move.target])
    strange = [move for move in moves if move.target not in targets]
    missing = [name for name in targets if name not in filled]
    wanted = {name: [source for rule in rules if (source := rule.source_of(name)) is not None] for name in missing}
    problems += first(strange, lambda move: _strange(move, sources[move.source], targets))
    problems += first(missing, lambda name: _missing(name, targets[name], wanted[name], unmatched))
    problems += first(unmatched, lambda name: no_rule_for(name, sources[name], rules, dropped))
    covered = {rule.source for rule in rules if any(rule.source_of(name) is not None for name in missing)}
    unused = [pattern for pattern in (*(rule.source for rule in rules), *dropped) if not used[pattern] and pattern not in covered]
    problems += [f"no tensor for the rule '{pattern}'" for pattern in unused]
    if problems:
        raise ConversionError(f"the tensors do not fit the model: {counted(problems, 'problem')}", *first(problems, limit=4 * _LISTED))
    return moves


def _is_expected(found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal values; of another floating type, the same after rounding."""
    return np.array_equal(found, expected.astype(found.dtype) if is_float(found.dtype) and is_float(expected.dtype) else expected)


def _check(move: Move, tensor: Tensor, targets: Mapping[str, Shape], times: int) -> Iterable[str]:
    what = told(move.source, tensor)
    if not is_float(tensor.dtype):
        yield f"{what} is {tensor.dtype.name}, expected floating numbers"
    if times > 1:
        yield f"{what} is one of {times} tensors for the variable '{move.target}'"
    if move.target not in targets:
        return
    if not move.transform.fits(tensor.shape):
        yield f"{what} has {tensor.ndim} axes, {move.transform.name} needs {len(move.transform.permutation or ())}"
    elif (shape := move.transform.shape(tensor.shape)) != tuple(targets[move.target]):
        yield f"{what} becomes {shape} through {move.transform.name}, but '{move.target}' is {tuple(targets[move.target])}"


def _strange(move: Move, tensor: Tensor, targets: Mapping[str, Shape]) -> str:
    nearest = difflib.get_close_matches(move.target, targets, n=1, cutoff=0.0)
    return (
        f"{told(move.source, tensor)} would become {quoted(move.target)}, which the model does not have; "
        f"nearest: {', '.join(map(repr, nearest))}"
    )


def _missing(name: str, shape: Shape, sources: list[str], unmatched: Sequence[str]) -> str:
    if not sources:
        return f"no rule fills the variable '{name}' {shape}"
    return f"missing: '{sources[0]}', for the variable {shape}{nearest_of(sources[0], unmatched)}"


def no_rule_for(name: str, tensor: Tensor, rules: Sequence[Rule], dropped: Iterable[str]) -> str:
    """A line for a tensor that no rule fits, with the nearest rule."""
    indexed = re.sub(r"(?<=[.])\d+(?=[.])", "0", name[:200])
    examples = {_example(pattern): pattern for pattern in (*(rule.source for rule in rules), *dropped)}
    nearest = difflib.get_close_matches(indexed, examples, n=1, cutoff=0.0)
    return f"no rule for {told(name, tensor)}; nearest rule: {', '.join(repr(examples[name]) for name in nearest)}"


def _example(pattern: str) -> str:
    """A name that fits: every placeholder's first word."""
    return _PLACEHOLDER.sub(lambda match: re.split("[|→]", match[2] or "0")[0], pattern)


def nearest_of(name: str, unmatched: Sequence[str]) -> str:
    """What the file has instead of ``name``, where it is much alike; an addition to a line."""
    nearest = difflib.get_close_matches(name, unmatched[:_COMPARED], n=1, cutoff=0.8)
    return f"; nearest in the file: {quoted(nearest[0])}" if nearest else ""


def first(items: Sequence[T], line: Callable[[T], str] = str, limit: int = _LISTED) -> list[str]:
    """A line for each of the first items; the others are only counted."""
    return [*map(line, items[:limit]), *[f"… and {len(items) - limit} more of this kind"] * (len(items) > limit)]


def told(name: str, tensor: Tensor) -> str:
    """A tensor by name and shape."""
    return f"{quoted(name)} {tensor.shape}"


def _brief(values: np.ndarray) -> str:
    flat = values.ravel()
    return f"[{', '.join(f'{value:g}' for value in flat[:2])}, …, {flat[-1]:g}] {values.shape}"


def counted(items: Sequence[str], noun: str) -> str:
    """How many: "1 problem", "2 problems"."""
    return f"{len(items)} {noun}{'s' * (len(items) != 1)}"


@functools.cache
def _compiled(pattern: str, other: str) -> tuple[re.Pattern[str], dict[str, dict[str, str]]]:
    """``pattern`` as a regular expression, and placeholder → word in it → word in ``other``, the rule's other side.

    The words may be written on either side.
    """
    words: dict[str, dict[str, str]] = {}
    for side, step in ((other, -1), (pattern, 1)):
        for name, listed in _PLACEHOLDER.findall(side):
            if listed:
                pairs = [tuple(word.split("→"))[::step] for word in listed.split("|")]
                words[name] = {pair[0]: pair[-1] for pair in reversed(pairs)}
    expression, end = "", 0
    for match in _PLACEHOLDER.finditer(pattern):
        choice = "|".join(map(re.escape, words[match[1]])) if match[1] in words else "0|[1-9][0-9]*"
        expression += f"{re.escape(pattern[end : match.start()])}(?P<{match[1]}>{choice})"
        end = match.end()
    return re.compile(expression + re.escape(pattern[end:])), words


def _translate(name: str, pattern: str, into: str) -> str | None:
    expression, words = _compiled(pattern, into)
    if (match := expression.fullmatch(name)) is None:
        return None
    found = {placeholder: words.get(placeholder, {}).get(word, word) for placeholder, word in match.groupdict().items()}
    return _PLACEHOLDER.sub(lambda placeholder: found[placeholder[1]], into)
