"""The model card of an export: results, lineage, licences and escaping."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from restitch.merging.files.checkpoint import Checkpoint
from restitch.modeling.licence import Licence
from restitch.registry.ledger.finetuned_models import MemberFacts
from restitch.registry.ledger.records import DataUsed, TaskResult
from restitch.registry.record import Interval
from restitch.registry.store.folder import FolderStore
from restitch.registry.store.objects import ObjectStore
from restitch.tasks.report.card import adapter_card, model_card, specialist_card
from restitch.tasks.report.provenance import Provenance, licence_of, lineage, provenance
from tests.conftest import Three
from tests.registry import builders

MIT, APACHE = Licence(("mit",)), Licence(("apache-2.0",))
LLAMA = Licence(("other",), "llama3", "https://u:p@example.org/LICENSE")


def card(record: Any = None, base: str = "/models/base", **origin: Any) -> str:
    line_state = builders.line_state()
    line_state = line_state.model_copy(
        update={"base": line_state.base.model_copy(update={"uri": base})}
    )
    return model_card(line_state, record or builders.record(), Provenance(**origin))


def front_matter(text: str) -> dict[str, Any]:
    _, front, _ = text.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(front)
    return found


def test_a_base_from_the_hub_is_named_without_its_commit() -> None:
    found = front_matter(card(base=f"openai/clip@{'a' * 40}"))
    assert (found["base_model"], found["base_model_relation"]) == (["openai/clip"], "merge")


@pytest.mark.parametrize(
    "base",
    [
        "/models/base",
        f"store://{'a' * 64}",
        "models:/base/1",
        "runs:/abc/model",
        "s3://bucket/base",
    ],
)
def test_a_base_outside_of_the_hub_is_not_named_as_base_model(base: str) -> None:
    assert "base_model" not in front_matter(card(base=base))


def test_the_card_of_an_adapter_names_the_base_alone() -> None:
    line_state = builders.line_state()
    made = {"kept": 0.9, "parameters": 10, "left_out": {}, "results": {}, "retention": None}

    def of(base: str) -> str:
        ref = line_state.base.model_copy(update={"uri": base})
        own = line_state.model_copy(update={"base": ref})
        return adapter_card(own, builders.record(), made, Provenance(), "a line of Python")

    text = of(f"openai/clip@{'a' * 40}")
    found = front_matter(text)
    assert (found["base_model"], found["base_model_relation"]) == ("openai/clip", "adapter")
    assert (found["library_name"], "lora" in found["tags"]) == ("peft", True)
    assert "a line of Python" in text
    assert "## Results" not in text, "nothing was measured"
    assert "base_model" not in front_matter(of("/models/base"))
    assert "model-index" not in found


def test_the_card_of_an_adapter_has_the_values_that_were_measured_with_it() -> None:
    measured = {"metric": "accuracy", "count": 10, "merged": 0.6, "adapter": 0.5}
    general = {**measured, "adapter": 0.4}
    made = {"kept": 0.9, "parameters": 10, "left_out": {}, "results": {"a": measured}}
    record = builders.record(results={"a": TaskResult(merged=0.6), "b": TaskResult(merged=0.7)})
    text = adapter_card(builders.line_state(), record, {**made, "retention": general}, Provenance())
    (index,) = front_matter(text)["model-index"]
    task, benchmark = index["results"]
    assert task["metrics"] == [{"type": "accuracy", "value": 0.5, "name": "accuracy, adapter"}]
    assert [each["value"] for each in benchmark["metrics"]] == [0.4, 0.8]
    assert benchmark["metrics"][1]["name"] == "retention, adapter over base"


def test_the_card_has_results_members_and_recipe() -> None:
    result = TaskResult(
        base=0.4,
        finetuned=0.8,
        grafted=0.7,
        merged=0.6,
        normalized=0.75,
        interval=Interval(low=0.5, high=0.7),
    )
    record = builders.record(results={"a": result, "b": TaskResult(notes=("no data",))})
    text = card(record)
    row = "| a | 0.4000 | 0.8000 | 0.7000 | 0.6000 | 0.7500 | 0.5000 to 0.7000 |"
    assert row in text
    assert "| b |  |  |  |  |  |  |" in text
    assert "retention 0.9000" in text
    assert record.recipe_digest in text
    member = record.members["a"]
    assert all(digest in text for digest in (member.weights, member.mask, member.delta))
    assert '"settings":{"overlap":"mean"}' in text


def test_values_with_an_interval_show_it() -> None:
    result = TaskResult(base=0.4, merged=0.6, intervals={"base": Interval(low=0.3, high=0.5)})
    retention = {
        "task": "general",
        "value": 0.45,
        "base": 0.5,
        "ratio": 0.9,
        "interval": {"low": 0.4, "high": 0.5},
        "ratio_interval": {"low": 0.85, "high": 0.95},
        "count": 1000,
    }
    text = card(builders.record(results={"a": result}, retention=retention))
    assert "| a | 0.4000 (0.3000 to 0.5000) |" in text
    assert "| merged, accuracy | 0.4500 | 0.4000 to 0.5000 |" in text
    assert "| base, accuracy | 0.5000 |  |" in text
    assert "| retention | 0.9000 | 0.8500 to 0.9500 |" in text


def test_gates_show_their_values_and_limits() -> None:
    gates = [
        {"gate": "min_retention", "limit": 0.95, "value": 0.9, "passed": False},
        {"gate": "max_task_drop", "limit": 0.1, "value": 0.0, "passed": True, "task": "a"},
    ]
    text = card(builders.record(gates=gates))
    assert "| min_retention |  | 0.9000 | 0.95 | failed (block) |" in text
    assert "| max_task_drop | a | 0.0000 | 0.1 | passed |" in text


def test_the_card_of_a_specialist_names_its_task_its_members_and_its_recipe() -> None:
    line_state = builders.line_state()
    record = builders.record(tasks=("a", "b"))
    origin = Provenance(weights="w" * 64, licences={"a": MIT, "b": MIT}, base_licence=MIT)
    text = specialist_card(line_state, record, "a", {"method": ["tall", 1]}, origin)
    assert f"# {record.line}, version {record.version}: a\n" in text
    assert "The specialist for `a`" in text
    assert front_matter(text)["license"] == "mit"
    for member in record.members.values():
        assert member.weights in text
        assert member.delta not in text
    assert '{"method":["tall",1]}' in text
    assert f"restitch export {record.line} {record.version} OUT --task a" in text
    assert f"It prints `{'w' * 64}`" in text


def test_a_card_needs_no_benchmark_and_no_members() -> None:
    text = card(builders.record(tasks=(), results={}, retention=None))
    assert "no task" in text
    assert "retention" not in text


def test_the_card_lists_the_previous_champion_and_all_acts_with_actor_and_reason(
    tmp_path: Path,
) -> None:
    line = builders.ledger(tmp_path)
    for _ in range(3):
        builders.merge(line)
    line.act("rejected", "t", "version 3: <b>too</b> | little", lambda line_state: line_state)
    line.act("rolled-back", "ann", "it was slow", lambda line_state: line_state.promoted(1))
    parent, acts = lineage(2, line.entries())
    assert (parent, [act.kind for act in acts]) == (1, ["merged", "promoted", "promoted"])
    parent, acts = lineage(3, line.entries())
    assert parent == 2
    assert [act.kind for act in acts] == ["merged", "promoted", "rejected", "rolled-back"]
    text = card(line.merged(3), parent=parent, acts=acts)
    assert "When this version was created, version 2 was champion." in text
    assert f"| rolled-back | ann | it was slow | `{acts[-1].digest[:16]}` |" in text
    assert "| version 3: \\<b\\>too\\</b\\> \\| little | `" in text, "a reason is escaped"
    parent, acts = lineage(1, line.entries())
    assert parent is None
    assert "there was no champion" in card(line.merged(1), acts=acts)


def test_a_common_licence_is_the_licence_of_the_card() -> None:
    text = card(base_licence=MIT, licences={"a": MIT, "b": MIT})
    assert front_matter(text)["license"] == "mit"
    text = card(base_licence=LLAMA, licences={"a": LLAMA, "b": LLAMA})
    found = front_matter(text)
    assert (found["license"], found["license_name"]) == ("other", "llama3")
    assert found["license_link"] == "https://***@example.org/LICENSE"
    assert "u:p" not in text


def test_different_licences_are_listed() -> None:
    text = card(base_licence=MIT, licences={"a": APACHE, "b": MIT})
    assert front_matter(text)["license"] == "other"
    assert "| base | `base` | mit |" in text
    assert "| a | `a` | apache-2.0 |" in text


def test_an_unknown_licence_is_shown_as_unknown() -> None:
    text = card(base_licence=MIT, licences={"a": None, "b": MIT})
    assert front_matter(text)["license"] == "other"
    assert "| a | `a` | unknown |" in text
    text = card()
    assert "license" not in front_matter(text)
    assert text.count("| unknown |") == 3


def test_members_on_the_hub_and_their_data_are_named_in_the_front_matter() -> None:
    data = DataUsed(path=f"owner/rows:plain@{'c' * 40}", split="test", digest="d" * 64)
    result = TaskResult(merged=0.6, metric="f1", split="test", data=data)
    record = builders.record(results={"a": result, "b": TaskResult(merged=0.5)})
    members = {
        task: member.model_copy(update={"uri": f"owner/{task}@{'a' * 40}" if task == "a" else "/b"})
        for task, member in record.members.items()
    }
    found = front_matter(
        card(record.model_copy(update={"members": members}), base="owner/base@main")
    )
    assert found["base_model"] == ["owner/base", "owner/a"]
    assert found["base_model_relation"] == "merge"
    assert found["datasets"] == ["owner/rows"]
    (index,) = found["model-index"]
    first, second, general = index["results"]
    assert first["dataset"] == {
        "type": "owner/rows",
        "config": "plain",
        "name": "a",
        "split": "test",
    }
    assert (first["metrics"][0]["type"], first["metrics"][0]["value"]) == ("f1", 0.6)
    assert second["dataset"] == {"type": "b", "name": "b"}
    assert [each["value"] for each in general["metrics"]] == [0.45, 0.9]


def test_the_card_says_what_was_not_merged_and_names_no_local_path() -> None:
    record = builders.record()
    facts = MemberFacts(outside_share=0.25, notes=("read /home/ann/models/a, and nothing else",))
    members = {**record.members, "a": record.members["a"].model_copy(update={"facts": facts})}
    line_state = builders.with_task(
        builders.line_state(),
        "c",
        builders.model("c", state="quarantined", reason="/srv/models/c: a tensor has NaN"),
    )
    record = record.model_copy(update={"members": members})
    text = model_card(line_state, record, Provenance())
    assert "| a | 25.00% |" in text
    assert "| c | 1 | quarantined | c: a tensor has NaN |" in text
    assert "read a, and nothing else" in text
    for part in ("/models", "/home", "/srv"):
        assert part not in text


def test_the_card_of_an_export_names_the_digest_of_its_weights(
    three: Three, tmp_path: Path
) -> None:
    three.shell("export", "demo", "2", tmp_path / "out")
    three.shell("export", "demo", "2", tmp_path / "parts", "--shard-size", "10KB")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"It prints `{Checkpoint.open(tmp_path / 'out').digest()}`" in text
    assert (tmp_path / "parts" / "README.md").read_text(encoding="utf-8") == text
    assert "When this version was created, version 1 was champion." in text
    assert "| merged |" in text
    assert "| promoted |" in text


def test_the_card_says_how_to_verify_it() -> None:
    text = card(weights="f" * 64)
    assert "restitch verify line --version 1" in text
    assert "restitch export line 1 OUT" in text
    assert "It prints `" + "f" * 64 in text


def model_folder(path: Path, licence: str) -> Path:
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "README.md").write_text(f"---\nlicense: {licence}\n---\n", encoding="utf-8")
    return path


def test_licences_are_read_from_folders_but_not_next_to_single_files(tmp_path: Path) -> None:
    objects = ObjectStore(FolderStore(tmp_path / "store"))
    folder = model_folder(tmp_path / "model", "mit")
    assert licence_of(str(folder), objects) == MIT
    assert licence_of(str(folder / "model.safetensors"), objects) is None
    assert licence_of(str(tmp_path / "gone"), objects) is None


def test_licences_are_read_from_copies_that_have_a_card(tmp_path: Path) -> None:
    objects = ObjectStore(FolderStore(tmp_path / "store"))
    folder = model_folder(tmp_path / "model", "mit")
    blob = objects.put_blob(folder / "README.md")
    manifest = objects.put_json({"files": {"README.md": blob}})
    assert licence_of(f"store://{manifest}", objects) == MIT
    fetched = "models:/base/1"
    assert licence_of(fetched, objects) is None
    objects.publish("source", builders.digest(fetched), manifest)
    assert licence_of(fetched, objects) == MIT
    assert licence_of(f"store://{objects.put_json({'files': {}})}", objects) is None
    assert licence_of(f"store://{objects.put_json([1])}", objects) is None
    assert licence_of(f"store://{'0' * 64}", objects) is None
    assert licence_of("store://../../x", objects) is None


def test_licences_of_the_hub_are_read_only_from_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    objects = ObjectStore(FolderStore(tmp_path / "store"))
    commit = "a" * 40
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert licence_of(f"org/model@{commit}", objects) is None
    model_folder(tmp_path / "hub" / "models--org--model" / "snapshots" / commit, "apache-2.0")
    assert licence_of(f"org/model@{commit}", objects) == APACHE
    assert licence_of(f"org/model@{'b' * 40}", objects) is None


def test_provenance_has_licences_and_acts(tmp_path: Path) -> None:
    line = builders.ledger(tmp_path / "store")
    builders.merge(line)
    base = model_folder(tmp_path / "base", "mit")
    found = provenance(str(base), line.merged(1), line.entries(), line.objects, "f" * 64)
    assert found.base_licence == MIT
    assert found.licences == {"a": None, "b": None}
    assert [act.kind for act in found.acts] == ["merged", "promoted"]
