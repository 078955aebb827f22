"""Hostile rows and images are read as `datasets` reads them, or refused with an explanation."""

import signal

import pytest
from hypothesis import given, settings

from tests.stress.fuzz import READERS, fuzz
from tests.stress.hostile_images import ImageFile, check_image, images
from tests.stress.hostile_rows import TableFile, check_table, tables


@settings(max_examples=200)
@given(tables())
def test_any_table_is_refused_or_means_what_its_author_meant(file: TableFile) -> None:
    check_table(file)


@settings(max_examples=200)
@given(images())
def test_any_image_is_refused_or_seen_as_a_viewer_shows_it(file: ImageFile) -> None:
    check_image(file)


# Found by the fuzzer: a carriage return in a text without quotes ended the row.
def test_a_carriage_return_in_a_text_does_not_cut_it() -> None:
    file = TableFile("csv", "", b"text,label\n\r,0\n", ("no", "yes"), (("\r", 0),))
    assert check_table(file) == "refused"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows", "image"])
def test_five_thousand_inputs_show_no_fault(name: str) -> None:
    reader = next(one for one in READERS if one.name == name)
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        found = fuzz(reader, 5000, 5)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert found.found is None
    assert found.inputs >= 5000
