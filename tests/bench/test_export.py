"""The table of docs/export.md goes into its place, and nowhere else."""

import pytest

from bench import export


def test_the_page_keeps_what_is_around_the_table():
    page = export.PAGE.read_text(encoding="utf-8") + "behind\n"
    changed = export.page_of(page, ["| a |", "|---|"])
    before, _, rest = page.partition(export.BEGIN)
    assert changed == f"{before}{export.BEGIN}| a |\n|---|\n{export.END}{rest.partition(export.END)[2]}"
    assert changed.endswith("behind\n")


@pytest.mark.parametrize("mark", [export.BEGIN, export.END])
def test_a_page_without_a_mark_is_refused(mark):
    with pytest.raises(ValueError, match="between which the table goes"):
        export.page_of(export.PAGE.read_text(encoding="utf-8").replace(mark, ""), [])
