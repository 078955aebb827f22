import pytest

from restitch.merging.errors import BadInput
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.versions import find_version
from tests.registry.builders import digest, line_state


def merged(versions: int) -> LineState:
    """A line with versions of which none was promoted."""
    line = line_state()
    for number in range(1, versions + 1):
        line = line.with_merged(digest(str(number)))
    return line


@pytest.mark.parametrize(
    ("versions", "asked", "message"),
    [
        (0, "champion", ("has no champion", "no merged version yet", "register a model")),
        (0, "1", ("has no version 1", "no merged version yet")),
        (3, "4", ("has no version 4", "versions 1 to 3; no champion; the candidate is version 3")),
        (
            3,
            "champion",
            ("has no champion", "versions 1 to 3", "`restitch history line --versions`"),
        ),
        (3, "latest", ("'latest' is not a version", "a number, `champion` or `candidate`")),
    ],
)
def test_a_version_that_is_not_there_is_refused_with_those_that_are(versions, asked, message):
    with pytest.raises(BadInput) as raised:
        find_version(merged(versions), asked)
    for part in message:
        assert part in str(raised.value)
    assert "None" not in str(raised.value)
