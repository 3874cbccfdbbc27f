"""The stages of a check, from the machine to the metric: each has a verdict of its own, and behind a broken one nothing can be judged."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parity.check import CaseCheck
    from parity.judge import Item

STAGES = (
    "environment self-test",
    "image reading and resize",
    "normalise and pad",
    "backbone",
    "pixel decoder",
    "transformer",
    "heads",
    "cost terms",
    "assignment",
    "losses",
    "gradients",
    "clipped gradients",
    "optimizer step",
    "post-processing",
    "evaluation metric",
)
"""In the order of computation."""

MODULES = "taps|calls|variables|sources"
"""Groups whose names begin with a module."""

# fmt: off
PLACES: tuple[tuple[str, str, str], ...] = (
    ("preprocessing", r".*/canvas", "normalise and pad"),
    ("preprocessing", r".*", "image reading and resize"),
    ("images", r".*", "normalise and pad"),
    (MODULES, r"images#.*", "normalise and pad"),
    (MODULES, r"backbone\b.*", "backbone"),
    (MODULES, r"sem_seg_head\.pixel_decoder\b.*", "pixel decoder"),
    (MODULES, r"sem_seg_head\.predictor\.(transformer|query_embed|input_proj|pe_layer)\b.*", "transformer"),
    (MODULES, r".*", "heads"),
    ("outputs", r".*", "heads"),
    ("matcher", r"(.*/assignment|probe/.*)", "assignment"),
    ("matcher", r".*", "cost terms"),
    ("losses", r".*", "losses"),
    ("gradients|tap_gradients", r".*", "gradients"),
    ("steps", r"\d+/assignment", "assignment"),
    ("steps", r"\d+/losses/.*", "losses"),
    ("steps", r"\d+/gradient_norm", "gradients"),
    ("clipped", r".*", "clipped gradients"),
    ("steps", r"\d+/clipped/.*", "clipped gradients"),
    ("steps", r".*", "optimizer step"),
    ("inference", r".*", "post-processing"),
    ("metrics", r".*", "evaluation metric"),
)
"""Groups, names and the stage to which they belong: the first line that fits."""
# fmt: on

MAY_BE_ABSENT = ("transformer", "cost terms", "assignment")
"""What a model, a per-pixel baseline, may not have."""

PASSED, BROKEN, INHERITS = "passed", "broken", "inherits"
NOT_JUDGED, NOT_RECORDED, EMPTY = "not judged", "not recorded", "nothing to judge"
"""Verdicts."""

MEANINGS = {
    INHERITS: "what fails is right by itself, and computed from something that is not",
    NOT_JUDGED: "an earlier stage is broken, the check was asked to leave it out, or there is no limit to its errors in this dtype",
    NOT_RECORDED: "the reference has nothing to judge it by",
    EMPTY: "the model has no such thing",
}
"""Of verdicts that do not speak for themselves."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The stages of one model.

    Attributes:
        stages: in the order of computation.
        places: as :data:`PLACES`.
        may_be_absent: stages that the model may not have.
    """

    stages: tuple[str, ...]
    places: tuple[tuple[str, str, str], ...]
    may_be_absent: tuple[str, ...] = ()

    @functools.cache  # noqa: B019 there is one plan for each model
    def stage_of(self, group: str, name: str) -> str:
        """The stage in which something is computed.

        Raises:
            ValueError: no line of :attr:`places` fits.
        """
        for groups, names, stage in self.places:
            if re.fullmatch(groups, group) and re.fullmatch(names, name):
                return stage
        raise ValueError(f"no stage for {group} '{name}'; parity/stages.py must have a line for the group")

    def place(self, item: Item) -> int:
        """Which stage an item belongs to, from 0."""
        return self.stages.index(self.stage_of(item.group, item.name))

    def first(self, group: str) -> int:
        """The first stage that may have something of a group."""
        return min(self.stages.index(stage) for groups, _, stage in self.places if re.fullmatch(groups, group))

    def broken(self, items: Iterable[Item]) -> int | None:
        """The first stage in which something fails that is not known to be inherited."""
        return min((self.place(item) for item in items if not item.passed and not item.inherited), default=None)


MASKFORMER = Plan(STAGES, PLACES, MAY_BE_ABSENT)


def stage_of(group: str, name: str) -> str:
    """The stage of a MaskFormer in which something is computed.

    >>> stage_of("taps", "sem_seg_head.predictor.transformer.decoder.norm#3")
    'transformer'
    """
    return MASKFORMER.stage_of(group, name)


def plan_of(modules: Mapping[str, Sequence[str]]) -> Plan:
    """The plan of another model.

    Args:
        modules: stage → beginnings of the official names of its modules, in the order of computation; what fits none is in the last one.
    """
    names = tuple(modules) or ("model",)
    lines = [(MODULES, rf"({'|'.join(map(re.escape, starts))})([.#\[].*)?", stage) for stage, starts in modules.items() if starts]
    last = [
        (MODULES, ".*", names[-1]),
        ("outputs", ".*", "outputs"),
        ("losses", ".*", "losses"),
        ("(tap_)?gradients", ".*", "gradients"),
    ]
    return Plan((STAGES[0], *names, "outputs", "losses", "gradients"), (*lines, *last), (*names, "outputs", "losses"))


@dataclasses.dataclass(frozen=True)
class Stage:
    """The verdict on one stage, over all cases of a check.

    Attributes:
        name: one of :data:`STAGES`.
        verdict: "passed", "broken", "inherits", "not judged", "not recorded" or "nothing to judge".
        judged, failed: how many names were, of all cases; to the error of a judged one there is a limit.
        first: the first failure, as "group 'name'"; "" without one.
        not_judged: the cases that stopped before it.
    """

    name: str
    verdict: str
    judged: int
    failed: int
    first: str
    not_judged: tuple[str, ...]


LEFT_OUT = ("gradients", "clipped gradients", "optimizer step")
"""What a check without gradients does not judge."""


def verdicts(plan: Plan, cases: Sequence[CaseCheck], probes: int, left_out: Collection[str] = ()) -> tuple[Stage, ...]:
    """A verdict for each stage.

    Args:
        probes: of the environment, all of which passed, or nothing would have been judged.
        left_out: stages that the check was asked to leave out.
    """
    found = [Stage(plan.stages[0], PASSED, probes, 0, "", ())]
    for place, name in enumerate(plan.stages[1:], start=1):
        items = [item for case in cases for item in case.items if plan.place(item) == place]
        failures = [item for case in cases for item in case.failures if plan.place(item) == place]
        own = [item for item in failures if not item.inherited]
        stopped = tuple(f"{case.case}, {case.dtype}" for case in cases if case.stopped and plan.stages.index(case.stopped) < place)
        judged = sum(item.judged or not item.passed for item in items)
        if judged:
            verdict = BROKEN if own else INHERITS if failures else PASSED
        elif items or stopped or name in left_out:
            verdict = NOT_JUDGED
        else:
            verdict = EMPTY if name in plan.may_be_absent else NOT_RECORDED
        first = next(iter(own or failures), None)
        found.append(Stage(name, verdict, judged, len(failures), f"{first.group} '{first.name}'" if first else "", stopped))
    return tuple(found)
