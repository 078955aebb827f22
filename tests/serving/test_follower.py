"""A loaded model that follows a line: the bits of a fresh load, and never half of an update."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from restitch.merging.errors import BadInput, Damage
from restitch.serving import follower as module
from restitch.serving.follower import Follower
from restitch.serving.reader_lock import ReaderLock
from tests import tiny_models
from tests.conftest import Three
from tests.shell import Shell
from tests.worlds import World, write_yaml

pytestmark = pytest.mark.usefixtures("without_mlflow")

BITS = {2: torch.int16, 4: torch.int32}


def bits(model: nn.Module) -> dict[str, Tensor]:
    """The bit patterns of all weights of a model."""
    return {
        name: value.detach().clone().view(BITS[value.element_size()])
        for name, value in model.named_parameters()
    }


def of(follower: Follower) -> dict[str, Tensor]:
    with follower.model() as model:
        return bits(model)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def use(shell: Shell, version: int) -> None:
    if shell.state().champion != version:
        shell("rollback", "demo", version, "--reason", "a test")


@pytest.fixture
def shell(three: Three, tmp_path: Path) -> Iterator[Shell]:
    shutil.copytree(three.shell.home, tmp_path / "home")
    shell = Shell(tmp_path / "home")
    with shell.inside():
        yield shell


def decoder_in_bfloat16(folder: Path) -> Path:
    whole = tiny_models.tiny_decoder(folder.with_name("whole"))
    shutil.copytree(whole, folder)
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def classifier(base: Path, folder: Path, seed: int) -> Path:
    return tiny_models.tiny_classifier(base, folder, ("a", "b"), seed=seed)


def noisy(base: Path, folder: Path, seed: int) -> Path:
    return tiny_models.tweaked(base, folder, seed=seed)


DATALESS = {"mode": "dataless", "density": 0.3}
SUBSPACE = {"mode": "subspace", "rank": 0.25}
STITCH = "localize-and-stitch"


@pytest.mark.parametrize(
    ("family", "base", "model", "method", "localize"),
    [
        ("text-encoder", tiny_models.tiny_bert, noisy, STITCH, DATALESS),
        ("clip", tiny_models.tiny_clip, noisy, STITCH, DATALESS),
        ("causal-lm", tiny_models.tiny_decoder, noisy, STITCH, DATALESS),
        ("causal-lm", tiny_models.tiny_experts, noisy, STITCH, DATALESS),
        ("causal-lm", decoder_in_bfloat16, noisy, STITCH, DATALESS),
        ("seq2seq-lm", tiny_models.tiny_seq2seq, noisy, STITCH, DATALESS),
        ("masked-lm", tiny_models.tiny_masked, noisy, STITCH, DATALESS),
        ("text-classifier", tiny_models.tiny_bert, classifier, STITCH, DATALESS),
        ("image-classifier", tiny_models.tiny_image_model, classifier, STITCH, DATALESS),
        ("text-encoder", tiny_models.tiny_bert, noisy, "tsv-m", SUBSPACE),
        ("causal-lm", decoder_in_bfloat16, noisy, "task-arithmetic", {**DATALESS, "density": 1}),
    ],
)
def test_a_refreshed_model_has_the_bits_of_a_fresh_one(
    tmp_path: Path,
    family: str,
    base: Callable[[Path], Path],
    model: Callable[[Path, Path, int], Path],
    method: str,
    localize: dict[str, Any],
) -> None:
    shell, made = Shell(tmp_path / "home"), base(tmp_path / "base")
    line = {"line": "demo", "base": str(made), "family": family, "method": method}
    shell("init", write_yaml(tmp_path / "line.yaml", {**line, "localize": localize}))
    for number, task in enumerate("ab"):
        file = write_yaml(tmp_path / f"{task}.yaml", {"task": task})
        shell("register", "demo", "--task", file, "--model", model(made, tmp_path / task, number))
    with shell.inside():
        use(shell, 1)
        follower = Follower("demo")
        first = of(follower)
        for version in (2, 1, 2):
            use(shell, version)
            found = follower.refresh()
            assert (found.version, follower.version.version) == (version, version)
            assert found.tensors > 0
            assert found.weights > 0
            fresh = of(Follower("demo"))
            assert same(of(follower), fresh)
            assert same(first, fresh) == (version == 1)
    if base is decoder_in_bfloat16:
        assert {value.dtype for value in fresh.values()} == {torch.int16}


def test_the_model_is_that_of_an_export(shell: Shell, tmp_path: Path) -> None:
    use(shell, 1)
    follower = Follower("demo")
    use(shell, 3)
    follower.refresh()
    shell("export", "demo", "champion", tmp_path / "out")
    assert same(of(follower), bits(AutoModel.from_pretrained(tmp_path / "out")))


def test_a_refresh_without_a_new_version_changes_nothing(shell: Shell) -> None:
    follower = Follower("demo")
    found = follower.refresh()
    assert (found.version, found.previous, found.tensors, found.patch_bytes) == (3, 3, 0, 0)


def test_a_reader_never_sees_half_of_an_update(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = []
    for version in (1, 2):
        use(shell, version)
        known.append(of(Follower("demo")))
    follower, seen, stop = Follower("demo"), [], threading.Event()
    real = module._set

    def slowly(changes: list[Any]) -> None:
        for change in changes:
            real([change])
            time.sleep(0.002)

    monkeypatch.setattr(module, "_set", slowly)

    def read() -> None:
        while not stop.is_set():
            with follower.model() as model:
                before = bits(model)
                time.sleep(0.001)
                assert same(before, bits(model))
            seen.append([same(before, each) for each in known].index(True))

    failed: list[BaseException] = []

    def reader() -> None:
        try:
            read()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=reader) for _ in range(3)]
    for thread in threads:
        thread.start()
    for version in (1, 2, 1, 2):
        use(shell, version)
        follower.refresh()
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert set(seen) == {0, 1}


def test_an_interrupted_update_is_finished(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    use(shell, 1)
    follower = Follower("demo")
    use(shell, 2)
    real, calls = module._set, 0

    def interrupted(changes: list[Any]) -> None:
        nonlocal calls
        calls += 1
        real(changes[: len(changes) // 2] if calls == 1 else changes)
        if calls == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_set", interrupted)
    with pytest.raises(KeyboardInterrupt):
        follower.refresh()
    assert follower.version.version == 2
    assert same(of(follower), of(Follower("demo")))


def test_a_damaged_patch_leaves_the_model_as_it_is(shell: Shell) -> None:
    use(shell, 1)
    follower = Follower("demo")
    before = of(follower)
    blob = shell.home / "store" / "blobs" / shell.ledger().merged(2).patch
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    use(shell, 2)
    with pytest.raises(Damage):
        follower.refresh()
    assert same(of(follower), before)
    assert follower.version.version == 1
    with pytest.raises(Damage):
        Follower("demo")


def test_without_the_store_the_model_stays_and_its_date_is_stated(
    shell: Shell, caplog: pytest.LogCaptureFixture
) -> None:
    follower = Follower("demo")
    before = of(follower)
    (shell.home / "store").rename(shell.home / "away")
    found = follower.refresh()
    assert (found.version, found.tensors) == (3, 0)
    assert same(of(follower), before)
    assert "version 3 of line demo is used, which was the champion of the line on 20" in caplog.text


def test_a_line_on_another_base_is_refused(
    shell: Shell, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower = Follower("demo")
    base = follower.version.base.model_copy(update={"weights": "0" * 64})
    other = follower.version.model_copy(update={"base": base, "record": "1" * 64})
    monkeypatch.setattr(module, "read_version", lambda *_: other)
    with pytest.raises(BadInput, match="has another base"):
        follower.refresh()


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_a_type_that_the_family_cannot_load_is_refused(shell: Shell, dtype: torch.dtype) -> None:
    with pytest.raises(BadInput, match="cannot load weights as"):
        Follower("demo", dtype=dtype)


def test_a_model_may_be_loaded_in_another_type(shell: Shell) -> None:
    use(shell, 1)
    follower = Follower("demo", dtype=torch.bfloat16)
    use(shell, 3)
    follower.refresh()
    assert same(of(follower), of(Follower("demo", dtype=torch.bfloat16)))


def test_a_refresh_inside_of_a_reader_is_refused(shell: Shell) -> None:
    use(shell, 1)
    follower = Follower("demo")
    use(shell, 2)
    with follower.model(), pytest.raises(RuntimeError, match="would wait for itself"):
        follower.refresh()


def test_a_writer_waits_for_readers_and_a_nested_reader_does_not_wait_for_it() -> None:
    lock, events = ReaderLock(), []

    def write() -> None:
        with lock.writing():
            events.append("writing")

    with lock.reading():
        writer = threading.Thread(target=write)
        writer.start()
        time.sleep(0.05)
        with lock.reading():
            events.append("nested")
        assert lock.is_reading
    writer.join(10)
    assert events == ["nested", "writing"]
    with lock.reading():
        pass
