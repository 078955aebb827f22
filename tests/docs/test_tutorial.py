"""The tutorial prints what the page says, except for digits, digests and times."""

import re

import pytest

from tests.docs.tutorial import PAGE, run


@pytest.mark.slow
def test_the_tutorial_prints_what_the_page_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert fixed_part(run(page)) == fixed_part(page)


def fixed_part(page: str) -> list[str]:
    """The words of the page; numbers, digests and widths differ between machines."""
    return re.findall(r"[A-Za-z]{3,}", re.sub(r"\b[0-9a-f]{12,}\b", "", page))
