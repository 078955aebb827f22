from pathlib import Path

import pytest
from blake3 import blake3

from restitch.merging.digests import canonical_json, digest_bytes, digest_file, digest_json


def test_a_file_has_the_digest_of_its_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000
    (tmp_path / "file").write_bytes(data)
    assert digest_file(tmp_path / "file") == digest_bytes(data) == blake3(data).hexdigest()


def test_the_order_of_keys_does_not_matter() -> None:
    assert digest_json({"b": 1, "a": [1.5, None]}) == digest_json({"a": [1.5, None], "b": 1})
    assert canonical_json({"b": "é", "a": 1}) == '{"a":1,"b":"é"}'.encode()


def test_values_that_json_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError):
        digest_json(float("nan"))
