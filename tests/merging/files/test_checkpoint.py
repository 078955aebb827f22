import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from tests import tiny


def test_tensors_are_those_that_were_saved(tmp_path: Path) -> None:
    tensors = {
        **tiny.base_tensors(),
        "half": torch.randn(3).half(),
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 4),
        "flag": torch.tensor([True, False, True]),
    }
    checkpoint = tiny.save(tmp_path, tensors)
    assert set(checkpoint.names) == set(tensors)
    for name, value in tensors.items():
        assert checkpoint.info(name).shape == tuple(value.shape)
        assert checkpoint.tensor(name).dtype == value.dtype
        assert torch.equal(checkpoint.tensor(name), value)


def test_names_are_in_the_order_of_their_utf8_bytes(tmp_path: Path) -> None:
    # As UTF-16, as some sort, the emoji's surrogates come before U+FFFD.
    names = ["z", "\ufffd", "\U0001f600", "Z", "a.10", "a.2"]
    checkpoint = tiny.save(tmp_path, {name: torch.zeros(1) for name in names})
    assert checkpoint.names == ("Z", "a.10", "a.2", "z", "\ufffd", "\U0001f600")


def test_integer_buffers_are_not_weights(tmp_path: Path) -> None:
    checkpoint = tiny.save(tmp_path, tiny.base_tensors())
    assert "position_ids" in checkpoint.names
    assert "position_ids" not in checkpoint.floating


def test_the_digest_depends_neither_on_sharding_nor_on_the_file_name(tmp_path: Path) -> None:
    tensors = tiny.base_tensors()
    single = tiny.save(tmp_path / "single", tensors)
    sharded = tiny.save(tmp_path / "sharded", tensors, shards=3)
    save_file(dict(reversed(tensors.items())), tmp_path / "other.safetensors")
    assert len(sharded.shards) == 3
    assert single.digest() == sharded.digest()
    assert single.digest() == Checkpoint.open(tmp_path / "other.safetensors").digest()


def test_the_digest_never_changes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(4.0).view(2, 2), "a": torch.tensor([1, 2], dtype=torch.int32)}
    digest = tiny.save(tmp_path, tensors).digest()
    assert digest == "362bb6f29b094227926ed69d8afaddf477ebc29b006126df38191599ff969dcd"


@pytest.mark.parametrize("what", ["name", "type", "shape", "bytes"])
def test_the_digest_covers(tmp_path: Path, what: str) -> None:
    before = {"a": torch.tensor([[1.0, 2.0]])}
    after = {
        "name": {"b": before["a"]},
        "type": {"a": before["a"].view(torch.int32)},
        "shape": {"a": before["a"].view(2, 1)},
        "bytes": {"a": torch.tensor([[1.0, -2.0]])},
    }[what]
    one, two = tiny.save(tmp_path / "1", before), tiny.save(tmp_path / "2", after)
    assert one.digest() != two.digest()


def test_progress_ends_with_all_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint = tiny.save(tmp_path, tiny.base_tensors())
    checkpoint.digest(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (checkpoint.nbytes, checkpoint.nbytes)
    assert seen == sorted(seen)


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    checkpoint = tiny.save(tmp_path, {"a": torch.ones(4)})
    checkpoint.tensor("a").zero_()
    assert torch.equal(Checkpoint.open(tmp_path).tensor("a"), torch.ones(4))


def test_a_tensor_at_an_odd_byte_is_read(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * ((1 - len(header)) % 4)
    data = torch.tensor([1.5, -2.0]).numpy().tobytes()
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    checkpoint = Checkpoint.open(tmp_path / "odd.safetensors")
    assert checkpoint.location("a").start % 4
    assert checkpoint.tensor("a").tolist() == [1.5, -2.0]


def test_a_renamed_view_holds_the_named_tensors_only(tmp_path: Path) -> None:
    tensors = tiny.base_tensors()
    checkpoint = tiny.save(tmp_path, tensors)
    view = checkpoint.renamed({"embed.weight": "e", "position_ids": "p"})
    assert view.names == ("e", "p")
    assert torch.equal(view.tensor("e"), tensors["embed.weight"])
    assert view.info("e").name == "e"
    expected = tiny.save(tmp_path / "x", {"e": tensors["embed.weight"], "p": torch.arange(5)})
    assert view.digest() == expected.digest()


def test_two_tensors_cannot_be_renamed_to_one(tmp_path: Path) -> None:
    checkpoint = tiny.save(tmp_path, tiny.base_tensors())
    with pytest.raises(ValueError):
        checkpoint.renamed({"embed.weight": "x", "position_ids": "x"})


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_a_pickle_is_refused_with_the_way_to_convert(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(BadInput, match="safe_serialization") as caught:
            Checkpoint.open(path)
        assert name in str(caught.value)


def test_safetensors_next_to_a_pickle_are_used(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert tiny.save(tmp_path, {"a": torch.ones(1)}).names == ("a",)


def test_missing_and_empty_places_are_bad_input(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(BadInput, match=path.name):
            Checkpoint.open(path)


def test_one_file_of_any_name_is_found_and_several_are_ambiguous(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    assert Checkpoint.open(tmp_path).names == ("a",)
    save_file({"a": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(BadInput, match="several"):
        Checkpoint.open(tmp_path)


def index(folder: Path, weight_map: object) -> None:
    text = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/x.safetensors", "a/b", "..", "", "x\0y", "gone.safetensors"]
)
def test_a_shard_outside_of_the_folder_or_missing_is_refused(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    index(folder, {"a": shard})
    with pytest.raises(BadInput):
        Checkpoint.open(folder)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"b": "m.safetensors"}, {}])
def test_an_index_that_disagrees_with_its_shards_is_refused(
    tmp_path: Path, weight_map: object
) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "m.safetensors")
    index(tmp_path, weight_map)
    if weight_map == {}:
        save_file({"a": torch.ones(1)}, tmp_path / "n.safetensors")
        index(tmp_path, {"a": "m.safetensors", "b": "n.safetensors"})
    with pytest.raises(BadInput):
        Checkpoint.open(tmp_path)


def test_a_name_that_would_be_a_path_is_only_a_name(tmp_path: Path) -> None:
    names = {"../../etc/x", "a\0b", "/root"}
    assert set(tiny.save(tmp_path, {n: torch.ones(1) for n in names}).names) == names
