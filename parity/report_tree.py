"""The items of a case as a tree of the model, the worst first inside each level: what the reports for people show."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from parity.check import Item

SEPARATORS = dict.fromkeys(("preprocessing", "matcher", "inference", "metrics"), "/")
"""Between the parts of a name, by group; "." elsewhere."""


@dataclasses.dataclass(frozen=True)
class Node:
    """A module, or anything else that names have in common.

    Attributes:
        label: what it adds to the name of the node above.
        items: all below it, in the order of computation.
        children: the worst first; none for a single item.
    """

    label: str
    items: tuple[Item, ...]
    children: tuple[Node, ...] = ()

    @property
    def failed(self) -> int:
        """Items that fail."""
        return sum(not item.passed for item in self.items)

    @property
    def worst(self) -> Item:
        """The item that is furthest beyond, or nearest to, its tolerance."""
        return max(self.items, key=severity)

    @property
    def local(self) -> float:
        """The largest local error; nan where none is known."""
        return max((item.local for item in self.items if not math.isnan(item.local)), default=math.nan)


def severity(item: Item) -> tuple[bool, bool, float, float]:
    """Orders items: what fails by itself is worse than what inherits its error, and that is worse than what passes; then by
    error / tolerance, then (without a limit) by error / floor."""
    return not item.passed and not item.inherited, not item.passed, share(item), -1 if math.isnan(item.ratio) else item.ratio


def share(item: Item) -> float:
    """error / tolerance; without an error -1 for what passes, and inf for what fails."""
    if math.isnan(item.error) or math.isnan(item.tolerance):
        return -1 if item.passed else math.inf
    return item.error / item.tolerance if item.tolerance else math.inf if item.error else 0.0


def grow(group: str, items: Sequence[Item]) -> Node:
    """The tree of the items of one group, of which there is one at least.

    >>> errors = {"a.b.c#0": 0.1, "a.b.d#0": 0.2, "e#0": 0.3}
    >>> root = grow("taps", [Item("taps", name, True, error, tolerance=1) for name, error in errors.items()])
    >>> [(node.label, [child.label for child in node.children]) for node in root.children]
    [('e#0', []), ('a.b', ['.d#0', '.c#0'])]
    """
    return _node(group, [(_parts(item), item) for item in items])


def _node(label: str, named: Sequence[tuple[tuple[str, ...], Item]]) -> Node:
    """``named``: the parts of each name that are left below this node, and its item."""
    items = tuple(item for _, item in named)
    below: dict[str, list[tuple[tuple[str, ...], Item]]] = {}
    for parts, item in named:
        if parts:
            below.setdefault(parts[0], []).append((parts[1:], item))
    children = [_merged(_node(part, inner)) for part, inner in below.items()]
    return Node(label, items, tuple(sorted(children, key=lambda node: severity(node.worst), reverse=True)))


def _merged(node: Node) -> Node:
    """A node with a single one below it becomes one with it."""
    if len(node.children) != 1 or len(node.items) != len(node.children[0].items):
        return node
    [child] = node.children
    return Node(node.label + child.label, child.items, child.children)


def _parts(item: Item) -> tuple[str, ...]:
    """A name in parts that together are the name: a tap is its module's path, and the call and the item of its output."""
    module, mark, call = item.name.partition("#")
    parts = tuple(re.findall(rf"^[^{SEPARATORS.get(item.group, '.')}]*|.[^{SEPARATORS.get(item.group, '.')}]*", module))
    return (*parts, mark + call) if mark else parts


def block(item: Item) -> str:
    """The module that an item is counted with where single items would be too many: up to the last numbered part of its path, else its
    parent.

    >>> [block(Item("taps", name, True)) for name in ("backbone.res2.0.conv1.norm#0", "backbone.stem.conv1#0", "images#0")]
    ['backbone.res2.0', 'backbone.stem', 'images']
    """
    if item.group in SEPARATORS:
        return item.name.rpartition("/")[0]
    if item.group in ("outputs", "losses"):
        return item.group
    parts = item.name.partition("#")[0].split(".")
    numbered = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[-1] + 1] if numbered else parts[:-1] or parts)
