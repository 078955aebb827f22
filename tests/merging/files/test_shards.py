"""Which files of a folder are its checkpoint, and which folders are refused with what message."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.shards import choose_shards
from tests import tiny

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NUMBERED = tuple(f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3))


def chosen(*names: str) -> tuple[str, ...]:
    return choose_shards("FOLDER", Path("/nowhere"), names).names


def refused(*names: str) -> str:
    with pytest.raises(BadInput) as caught:
        choose_shards("FOLDER", Path("/nowhere"), names)
    return caught.value.message()


def with_index(folder: Path, *shards: str, index: str = INDEX) -> None:
    weight_map = {f"tensor{number}": shard for number, shard in enumerate(shards)}
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))


def written(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        save_file({f"tensor{number}": torch.ones(2)}, folder / name)


def test_shards_without_an_index_are_read_together_and_noted() -> None:
    found = choose_shards("FOLDER", Path("/nowhere"), NUMBERED[::-1])
    assert found.names == NUMBERED
    assert found.index is None
    assert found.notes == ("there is no index: the 3 shards were read together by their numbers",)


def test_shards_without_an_index_hold_the_same_checkpoint(tmp_path: Path) -> None:
    tensors = tiny.base_tensors()
    whole = tiny.save(tmp_path / "whole", tensors)
    parts = tiny.save(tmp_path / "parts", tensors, shards=3)
    (tmp_path / "parts" / INDEX).unlink()
    assert Checkpoint.open(tmp_path / "parts").digest() == whole.digest() == parts.digest()


@given(missing=st.sets(st.integers(1, 12), min_size=1, max_size=11), total=st.just(12))
def test_every_missing_shard_is_counted_and_the_first_is_named(
    missing: set[int], total: int
) -> None:
    name = "model-{:05d}-of-00012.safetensors".format
    message = refused(*(name(number) for number in range(1, total + 1) if number not in missing))
    assert name(min(missing)) in message
    assert f"{total - len(missing)} of {total} shards" in message


def test_a_shard_that_the_index_lists_is_named_if_it_is_missing(tmp_path: Path) -> None:
    with_index(tmp_path, *NUMBERED)
    written(tmp_path, NUMBERED[0])
    with pytest.raises(BadInput, match="lacks shards that its index lists") as caught:
        Checkpoint.open(tmp_path)
    assert ", ".join(NUMBERED[1:]) in caught.value.message()


@pytest.mark.parametrize(
    "names",
    [
        (SINGLE, *NUMBERED),
        (SINGLE, NUMBERED[0], NUMBERED[1], NUMBERED[2], "pytorch_model.bin"),
        ("one.safetensors", "two.safetensors"),
        (*NUMBERED, "model-00001-of-00001.safetensors"),
        (*NUMBERED, "ema-2-of-2.safetensors", "ema-1-of-2.safetensors"),
    ],
    ids=lambda names: "+".join(names)[:40],
)
def test_two_checkpoints_in_a_folder_are_refused_with_both_named(names: tuple[str, ...]) -> None:
    message = refused(*names)
    assert "several checkpoints" in message
    for name in {names[0], names[-1] if names[-1].endswith(".safetensors") else names[1]}:
        assert name.split("-0")[0] in message


def test_an_index_next_to_another_single_file_is_refused(tmp_path: Path) -> None:
    with_index(tmp_path, *NUMBERED)
    written(tmp_path, *NUMBERED, SINGLE)
    with pytest.raises(BadInput, match="several checkpoints") as caught:
        Checkpoint.open(tmp_path)
    assert f"{INDEX} ({NUMBERED[0]} and 2 more shards); {SINGLE}" in caught.value.message()


def test_an_index_of_the_single_file_belongs_to_it(tmp_path: Path) -> None:
    with_index(tmp_path, SINGLE)
    written(tmp_path, SINGLE)
    assert Checkpoint.open(tmp_path).names == ("tensor0",)


def test_an_index_whose_shards_are_all_gone_does_not_hide_the_single_file(tmp_path: Path) -> None:
    with_index(tmp_path, *NUMBERED)
    written(tmp_path, SINGLE)
    assert Checkpoint.open(tmp_path).index is None


def test_shards_with_the_same_tensor_are_refused(tmp_path: Path) -> None:
    for name in NUMBERED:
        written(tmp_path, name)  # each holds tensor0
    with pytest.raises(BadInput, match="twice"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "aside",
    [
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "tf_model.h5",
        "flax_model.msgpack",
        "model-q4.gguf",
        "other.safetensors",
    ],
)
def test_weights_that_are_not_read_are_named(aside: str) -> None:
    found = choose_shards("FOLDER", Path("/nowhere"), (SINGLE, aside, "training_args.bin"))
    assert found.names == (SINGLE,)
    assert found.notes == (f"read {SINGLE}; not read: {aside}",)


def test_files_of_a_trainer_and_hidden_files_are_no_weights() -> None:
    names = (SINGLE, "optimizer.pt", "rng_state.pth", "training_args.bin", "._model.safetensors")
    assert choose_shards("FOLDER", Path("/nowhere"), names).notes == ()
    assert chosen("._model.safetensors", "weights.safetensors") == ("weights.safetensors",)


def test_weights_that_were_written_later_and_are_not_read_are_noted(tmp_path: Path) -> None:
    written(tmp_path, SINGLE)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    assert len(Checkpoint.open(tmp_path).notes) == 1
    later = (tmp_path / SINGLE).stat().st_mtime + 3600
    os.utime(tmp_path / "pytorch_model.bin", (later, later))
    assert any("pytorch_model.bin was written after" in n for n in Checkpoint.open(tmp_path).notes)


def test_one_shard_is_no_model(tmp_path: Path) -> None:
    written(tmp_path, *NUMBERED)
    with pytest.raises(BadInput, match="is one of 3 shards") as caught:
        Checkpoint.open(tmp_path / NUMBERED[1])
    assert f"name the folder of the shards: {tmp_path}" in caught.value.message()


def test_an_index_can_be_named_itself(tmp_path: Path) -> None:
    with_index(tmp_path, *NUMBERED)
    written(tmp_path, *NUMBERED)
    assert Checkpoint.open(tmp_path / INDEX).names == ("tensor0", "tensor1", "tensor2")


def test_the_checkpoints_below_a_folder_of_a_trainer_are_named(tmp_path: Path) -> None:
    for number in (500, 1000, 90):
        written(tmp_path / "out" / f"checkpoint-{number}", SINGLE)
    (tmp_path / "out" / "training_args.bin").write_bytes(b"\x80")
    with pytest.raises(BadInput, match="folders below it do") as caught:
        Checkpoint.open(tmp_path / "out")
    message = caught.value.message()
    assert "checkpoint-1000, checkpoint-500, checkpoint-90" in message
    assert f"for instance {tmp_path / 'out' / 'checkpoint-1000'}" in message


def test_an_adapter_alone_is_refused_with_the_way_to_merge_it(tmp_path: Path) -> None:
    written(tmp_path, "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(BadInput, match="is an adapter, not a whole model") as caught:
            Checkpoint.open(path)
        assert "kind LORA, of org/base" in caught.value.message()
        assert "merge_and_unload" in caught.value.message()


@pytest.mark.parametrize("config", ["[]", "{", '"x"', "{}"])
def test_an_adapter_with_a_broken_configuration_is_still_an_adapter(
    tmp_path: Path, config: str
) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(BadInput, match="is an adapter"):
        Checkpoint.open(tmp_path)


def test_an_adapter_next_to_whole_weights_is_refused() -> None:
    message = refused(SINGLE, "adapter_config.json", "adapter_model.safetensors")
    assert "an adapter next to whole weights" in message
    assert f"next to {SINGLE}" in message


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model-q4_0.gguf", "GGUF"),
        ("__0_0.distcp", "merge-weights"),
        ("zero_to_fp32.py", "safe_serialization"),
        ("mp_rank_00_model_states.pt", "zero_to_fp32.py"),
        ("notes.txt", "check"),
    ],
)
def test_a_folder_without_a_checkpoint_names_its_files(name: str, hint: str) -> None:
    message = refused(name)
    assert "contains no checkpoint" in message
    assert name in message
    assert hint in message


def test_a_pointer_of_git_lfs_is_explained(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    with pytest.raises(BadInput, match="git lfs pull"):
        Checkpoint.open(tmp_path)


@given(
    names=st.sets(
        st.sampled_from(
            [SINGLE, *NUMBERED, "a.safetensors", "b.safetensors", "consolidated.safetensors"]
        )
    )
)
def test_the_choice_is_one_complete_checkpoint_or_an_error(names: set[str]) -> None:
    try:
        found = set(chosen(*names))
    except BadInput:
        return
    assert found <= names
    assert found in ({SINGLE}, set(NUMBERED)) or (
        len(found) == 1 and not names & {SINGLE, *NUMBERED}
    )
