"""Pages that have a generated part between two marks."""

from __future__ import annotations


def replaced_between(text: str, first: str, last: str, content: str) -> str:
    """A page with other content between two marks, which stay; what is before and behind them stays as it is.

    >>> replaced_between("before <b>old</b> behind", "<b>", "</b>", "new")
    'before <b>new</b> behind'

    Raises:
        ValueError: the page does not have both marks, in this order.
    """
    before, _, rest = text.partition(first)
    _, end, behind = rest.partition(last)
    if not end:
        raise ValueError(f"the page has no lines '{first.strip()}' and '{last.strip()}', between which the table goes")
    return f"{before}{first}{content}{last}{behind}"
