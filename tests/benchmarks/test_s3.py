from pathlib import Path

import pytest

from benchmarks import s3


@pytest.mark.slow
def test_both_ways_are_measured_in_both_directions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the benchmark sets for its processes is undone with the test.
    for name in (*s3._ACCOUNT, "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, "")
    found = {(each.way, each.direction): each for each in s3.measure(tmp_path, 40 << 20, 1)}
    assert set(found) == {(way, to) for way in ("boto3", "restitch") for to in ("up", "down")}
    for each in found.values():
        assert each.seconds > 0
        assert each.memory >= each.started > 0
    assert s3.table(list(found.values()), 40 << 20).row_count == 4
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["file"]


def test_the_blocks_of_the_file_are_all_different(tmp_path: Path) -> None:
    s3._fill(tmp_path / "file", (3 << 24) + 5)
    data = (tmp_path / "file").read_bytes()
    assert len(data) == (3 << 24) + 5
    assert len({data[at : at + 100] for at in range(0, 3 << 24, 1 << 24)}) == 3
