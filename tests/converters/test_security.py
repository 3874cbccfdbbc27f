"""docs/security.md says what is true: the names that a pickle may have, and how many malicious files there are of each kind."""

from __future__ import annotations

import re
from pathlib import Path

from converters.unpickle import ALLOWED
from tests.converters.corpus import PICKLES
from tests.converters.fuzz import KINDS
from tests.converters.test_safetensors_file import REFUSED as SAFETENSORS
from tests.converters.test_safetensors_file import STRICTER
from tests.converters.test_torch_files import REFUSED as TORCH

PAGE = (Path(__file__).parent.parent.parent / "docs" / "security.md").read_text(encoding="utf-8")


def table(head):
    """The rows below the line ``head``."""
    rows = PAGE.split(f"{head}\n", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def test_the_allow_list_is_whole():
    names = [name for row in table("| Name | Stands for |") for name in re.findall(r"`([^`]+)`", row[0])]
    assert sorted(names) == sorted(ALLOWED)


def test_the_corpus_is_whole():
    expected = {group: len(kinds) for group, kinds in PICKLES.items()}
    expected |= {"files of torch.save": len(TORCH), "safetensors": len(SAFETENSORS) + len(STRICTER)}
    assert {group: int(count) for group, count in table("| Malicious files | Kinds |")} == expected


def test_every_kind_was_damaged():
    rows = table("| kind | files | read | refused | kinds of errors | memory ≤ 128 KiB + | longest |")
    assert [row[0] for row in rows] == [kind.name for kind in KINDS]
