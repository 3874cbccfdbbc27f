"""What is generated into pages, and that the rest of a page is never lost."""

from __future__ import annotations

import pytest

from parity.page import replaced_between


def test_only_what_is_between_the_marks_changes():
    assert replaced_between("a\n<b>\nold\n<e>\nz <e>\n", "<b>\n", "<e>", "new\n") == "a\n<b>\nnew\n<e>\nz <e>\n"


@pytest.mark.parametrize("page", ["", "a <b> z", "a <e> z", "a <e> <b> z"])
def test_a_page_without_both_marks_is_refused(page):
    with pytest.raises(ValueError, match="no lines '<b>' and '<e>', between which the table goes"):
        replaced_between(page, "<b>", "<e>", "new")
