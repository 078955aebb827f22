"""An export that is put on the hub: one commit, what is there is not sent again, names refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.conftest import Three
from tests.hub_server import FakeHub, fake_hub

REPOSITORY = "team/merged"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield served


def run(hub: FakeHub, three: Three, folder: Path, *commands: tuple[str, ...]) -> list[Any]:
    done = [three.shell(*command, code=None) for command in commands]
    return [(each.code, each.out, each.err) for each in done]


def push(*options: str, version: str = "champion", to: str = REPOSITORY) -> tuple[str, ...]:
    return ("export", "demo", version, "--push", to, *options)


def files(hub: FakeHub, repository: str = REPOSITORY) -> dict[str, bytes]:
    return hub.commits["models", repository][hub.branches["models", repository]["main"]]


def commits(hub: FakeHub) -> int:
    return sum("/commit/" in request for request in hub.requests)


def test_a_version_is_pushed_in_one_commit_and_a_newer_one_replaces_it(
    hub: FakeHub, three: Three, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (code, printed, error), again, resharded = run(
        hub,
        three,
        tmp_path,
        push("--private", "--json", version="2"),
        push("--json"),
        ("export", "demo", "3", str(out), "--push", REPOSITORY, "--shard-size", "10KB", "--json"),
    )
    assert code == 0, error
    found = json.loads(printed)
    assert found["repository"] == REPOSITORY
    assert found["commit"].startswith(f"{hub.url}/{REPOSITORY}/commit/")
    assert found["out"] is None
    assert (again[0], resharded[0]) == (0, 0), again[2] + resharded[2]
    assert commits(hub) == 3
    assert REPOSITORY in hub.private
    there = files(hub)
    assert "model.safetensors" not in there, "a file of the version before"
    local = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert {name: data for name, data in there.items() if name != ".gitattributes"} == local
    three.shell("export", "demo", "3", tmp_path / "local", "--shard-size", "10KB")
    for name, data in local.items():
        if name.endswith((".safetensors", "config.json")):
            assert (tmp_path / "local" / name).read_bytes() == data


def test_nothing_that_is_pushed_names_this_machine(
    hub: FakeHub, three: Three, tmp_path: Path
) -> None:
    ((code, _, error),) = run(hub, three, tmp_path, push())
    assert code == 0, error
    import socket

    texts = {name: files(hub)[name].decode() for name in ("README.md", "restitch.json")}
    for text in texts.values():
        assert "/tmp" not in text
        assert str(three.shell.home.parent) not in text
        assert "hf_secret" not in text
    assert socket.gethostname() not in texts["restitch.json"]
    assert f'from_pretrained("{REPOSITORY}")' in texts["README.md"].replace("'", '"')
    data: Any = ModelCard(texts["README.md"]).data
    assert data.eval_results is not None
    values = {each.dataset_name: each.metric_value for each in data.eval_results}
    record = json.loads(texts["restitch.json"])
    for task, result in record["results"].items():
        assert values[task] == pytest.approx(result["merged"], abs=1e-6)
    kinds = {each.metric_type for each in data.eval_results}
    assert kinds == {"accuracy", "retention"}


def test_an_interrupted_upload_continues(hub: FakeHub, three: Three, tmp_path: Path) -> None:
    hub.most_large = 1
    command = push("--shard-size", "10KB")
    ((code, _, error),) = run(hub, three, tmp_path, command)
    assert code == 6
    assert "run the command again: it continues" in error
    assert commits(hub) == 0
    assert len(hub.large) == 1
    hub.most_large = None
    before = sum(request.startswith("PUT") for request in hub.requests)
    ((code, _, error),) = run(hub, three, tmp_path, command)
    assert code == 0, error
    sent = sum(request.startswith("PUT") for request in hub.requests) - before
    assert sent == len(hub.large) - 1
    assert commits(hub) == 1


def test_names_and_repositories_that_do_not_fit_are_refused(
    hub: FakeHub, three: Three, tmp_path: Path
) -> None:
    hub.forbidden.add("others")
    hub.commit("team/taken", {"model.safetensors": b"weights"})
    hub.commit("team/line", {"model.safetensors": b"w", "restitch.json": b'{"line": "other"}'})
    commands = {
        "no name for a model": push(to="team/a--b"),
        "one slash": push(to="merged"),
        "the hub refuses others/merged": push(to="others/merged"),
        "team/taken on the hub holds another model": push(to="team/taken"),
        "team/line on the hub holds another model": push(to="team/line"),
        "team/taken on the hub is public": push("--private", "--overwrite", to="team/taken"),
    }
    before = dict(hub.commits["models", "team/taken"])
    for message, (code, _, error) in zip(
        commands, run(hub, three, tmp_path, *commands.values()), strict=True
    ):
        assert code == 3, error
        assert message in error
    assert hub.commits["models", "team/taken"] == before
    ((code, _, error),) = run(hub, three, tmp_path, push("--overwrite", to="team/taken"))
    assert code == 0, error
    assert files(hub, "team/taken")["model.safetensors"] != b"weights"


def test_a_hub_that_is_away_is_named(hub: FakeHub, three: Three, tmp_path: Path) -> None:
    hub.stop()
    ((code, _, error),) = run(hub, three, tmp_path, push())
    assert code == 6
    assert "cannot write team/merged to the hub" in error


def test_options_that_do_not_fit_are_refused(three: Three) -> None:
    three.shell("export", "demo", "1", code=2)
    three.shell("export", "demo", "1", "out", "--private", code=2)
    three.shell("export", "demo", "1", "--as", "lora", code=2)
    three.shell("export", "demo", "1", "--push", REPOSITORY, "--rank", "2", code=2)


def test_an_adapter_is_pushed_in_one_commit_with_its_card(
    hub: FakeHub, three: Three, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    as_lora = ("--as", "lora", "--rank", "2")
    (code, printed, error), whole, elsewhere, replaced = run(
        hub,
        three,
        tmp_path,
        ("export", "demo", "champion", str(out), "--push", REPOSITORY, *as_lora, "--json"),
        push(),
        push(*as_lora, "--json", to="team/adapter"),
        push("--overwrite"),
    )
    assert code == 0, error
    found = json.loads(printed)
    assert found["commit"].startswith(f"{hub.url}/{REPOSITORY}/commit/")
    assert found["out"] == str(out)
    assert json.loads(elsewhere[1])["out"] is None
    pushed = files(hub, "team/adapter")
    assert {name for name in pushed if name != ".gitattributes"} == set(found["files"])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert pushed[name] == (out / name).read_bytes()
    for name in ("README.md", "restitch.json", "adapter_config.json"):
        assert "/tmp" not in pushed[name].decode()
        assert str(three.shell.home.parent) not in pushed[name].decode()
    card = pushed["README.md"].decode()
    data: Any = ModelCard(card).data
    assert (data.library_name, data.base_model) == ("peft", None)
    assert "'team/adapter')" in card
    # Libraries tell adapters from whole models by their files, so a repository holds one kind.
    assert whole[0] == 3
    assert f"{REPOSITORY} on the hub holds adapters of line demo" in whole[2]
    assert replaced[0] == 0, replaced[2]
    there = files(hub)
    assert "config.json" in there
    assert not [name for name in there if name.startswith("adapter_")]
    assert commits(hub) == 3
    ((code, _, error),) = run(hub, three, tmp_path, push(*as_lora))
    assert code == 3
    assert "holds whole models of line demo" in error


def test_the_front_matter_is_what_the_hub_reads(three: Three, tmp_path: Path) -> None:
    three.shell("export", "demo", "champion", tmp_path / "out")
    _, front, _ = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["library_name"] == "transformers"
    assert fields["pipeline_tag"] == "feature-extraction"
    assert "merge" in fields["tags"]
