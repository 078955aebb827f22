"""The questions of an auditor, about a line whose history the test knows."""

import json
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_end_to_end import plain
from tests.conftest import Three
from tests.shell import Shell
from tests.worlds import World


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory, world: World) -> Shell:
    """A line with a history: joins, a replacement, a failed gate, a rollback, a retirement."""
    from restitch.registry.mlflow.sync import MlflowProjection

    root = tmp_path_factory.mktemp("lived")
    shell = Shell(root / "home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowProjection, "repair", lambda *_, **__: 0)
        shell("init", world.line(root / "line.yaml", gates={"min_retention": 0.25}))
        shell.add(world, "colour")  # 1
        shell.add(world, "number")  # 2
        shell.add(world, "colour", model="colour-2", code=0)  # 3
        shell.add(world, "wreck", code=5)  # 4 rejected
        shell("rollback", "demo", 2, "--reason", "the second colour model is biased")
        shell("retire", "demo", "number", "--reason", "its data was withdrawn")  # 5, 6
        shell("unpin", "demo", "--reason", "looked at it")
    return shell


KINDS = [
    "configured",
    *("registered", "localized", "merged", "promoted") * 3,
    *("registered", "localized", "merged", "rejected", "held"),
    "rolled-back",
    "retired",
    *("merged", "rejected", "held"),  # what was held is tried again
    "merged",
    "unpinned",
    "promoted",
]


def test_history_lists_every_act_newest_first_as_json_and_as_a_table(lived: Shell) -> None:
    acts = lived.json("history", "demo")["acts"]
    assert [act["kind"] for act in acts] == KINDS[::-1]
    assert [act["sequence"] for act in acts] == list(range(len(KINDS), 0, -1))
    for newer, older in pairwise(acts):
        assert newer["previous"] == older["entry"]
        assert newer["time"] > older["time"]
    table = plain(lived("history", "demo").out)
    for act in acts:
        row = f"{act['sequence']} {act['time'][:19].replace('T', ' ')} {act['kind']} {act['actor']}"
        assert row in table


def test_every_act_names_the_champion_after_it(lived: Shell) -> None:
    acts = lived.json("history", "demo")["acts"][::-1]
    champions = [act["champion"] for act in acts]
    assert champions == [
        *[None] * 4,
        *[1] * 4,
        *[2] * 4,
        *[3] * 6,
        *[2] * 7,
        6,
    ]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (("--event", "promoted"), ["promoted"] * 4),
        (("--event", "rolled-back"), ["rolled-back"]),
        (("--task", "wreck"), ["registered", "localized", "held", "held"]),
        (("--task", "number", "--event", "retired"), ["retired"]),
    ],
)
def test_history_can_be_filtered(
    lived: Shell, filters: tuple[str, ...], expected: list[str]
) -> None:
    acts = lived.json("history", "demo", *filters)["acts"]
    assert [act["kind"] for act in acts][::-1] == expected


def test_a_span_holds_both_of_its_ends(lived: Shell) -> None:
    acts = lived.json("history", "demo")["acts"][::-1]
    span = ("--since", acts[4]["time"], "--until", acts[8]["time"])
    found = lived.json("history", "demo", *span)["acts"][::-1]
    assert found == acts[4:9]
    day = acts[0]["time"][:10]
    assert len(lived.json("history", "demo", "--since", day, "--until", "2999-01-01")["acts"]) > 20
    assert lived.json("history", "demo", "--until", "2000-01-01")["acts"] == []


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (("--event", "promotion"), 3, "promoted"),
        (("--task", "colur"), 3, "colour"),
        (("--since", "yesterday"), 3, "2026-03-03"),
        (("--as-of", "2001-01-01"), 3, "did not exist"),
        (("--as-of", "2026-01-01", "--versions"), 2, "exclude"),
        (("--task", "colour", "--versions"), 2, "exclude"),
    ],
)
def test_a_wrong_question_is_explained(
    lived: Shell, args: tuple[str, ...], code: int, told: str
) -> None:
    assert told in plain(lived("history", "demo", *args, code=code).err)


def test_as_of_answers_what_was_in_use_between_any_two_acts(lived: Shell) -> None:
    acts = lived.json("history", "demo")["acts"][::-1]
    for act in acts:
        found = lived.json("history", "demo", "--as-of", act["time"])
        assert found["sequence"] == act["sequence"]
        champion = found["champion"]
        assert (None if champion is None else champion["version"]) == act["champion"]
        just_before = datetime.fromisoformat(act["time"]) - timedelta(microseconds=1)
        if act["sequence"] > 1:
            earlier = lived.json("history", "demo", "--as-of", just_before.isoformat())
            assert earlier["sequence"] == act["sequence"] - 1


def test_as_of_shows_the_members_the_actor_and_the_reason(lived: Shell) -> None:
    acts = lived.json("history", "demo")["acts"]
    rolled = next(act for act in acts if act["kind"] == "rolled-back")
    found = lived.json("history", "demo", "--as-of", rolled["time"])
    champion = found["champion"]
    assert (champion["version"], champion["act"], champion["by"], champion["since"]) == (
        2,
        "rolled-back",
        rolled["actor"],
        rolled["time"],
    )
    assert champion["why"].endswith("the second colour model is biased")
    shown = lived.json("show", "demo", 2)
    assert champion["members"] == shown["members"]
    assert champion["retention"] == shown["retention"]
    assert found["pinned"]
    states = {(m["task"], m["version"]): m["state"] for m in found["models"]}
    assert states == {
        ("colour", 1): "replaced",
        ("colour", 2): "ready",
        ("number", 1): "ready",
        ("wreck", 1): "held",
    }
    table = plain(lived("history", "demo", "--as-of", rolled["time"]).out)
    assert "version 2 was in use" in table
    for member in champion["members"].values():
        assert member["weights"][:12] in table


def test_a_date_means_its_end(lived: Shell) -> None:
    acts = lived.json("history", "demo")["acts"]
    found = lived.json("history", "demo", "--as-of", acts[0]["time"][:10])
    assert found["as_of"].endswith("23:59:59.999999+00:00")
    assert found["sequence"] == acts[0]["sequence"]


def inside(value: float, ends: dict[str, float]) -> bool:
    """Whether a value is in an interval with rounded ends."""
    return ends["low"] - 1e-9 <= value <= ends["high"] + 1e-9


def test_show_has_every_value_that_decided(lived: Shell) -> None:
    shown = lived.json("show", "demo", 4)
    (gate,) = [gate for gate in shown["gates"] if not gate["passed"]]
    assert (gate["gate"], gate["action"], gate["limit"]) == ("min_retention", "block", 0.25)
    kept = shown["retention"]
    assert gate["value"] == kept["ratio"]
    assert gate["interval"] == kept["ratio_interval"]
    assert inside(kept["value"], kept["interval"])
    assert inside(kept["base"], kept["base_interval"])
    for result in shown["results"].values():
        assert set(result["evaluations"]) == {"base", "finetuned", "grafted", "merged"}
        for name, ends in {**result["intervals"], "merged": result["interval"]}.items():
            assert inside(result[name], ends)
        assert result["data"]["split"] == "test"
    for member in shown["members"].values():
        assert member["facts"]["kept"] == 1334
        assert member["facts"]["seconds"] > 0
        assert member["facts"]["localized_by"]["device"] == "cpu"
    libraries = {"restitch", "torch", "transformers", "datasets", "prefect", "mlflow"}
    assert libraries <= shown["software"].keys()
    assert shown["links"]["mlflow_filter"] == f"tags.`restitch.digest` = '{shown['digest']}'"
    table = plain(lived("show", "demo", 4).out)
    assert f"failed: {gate['note']}" in table
    assert f"({gate['interval']['low']:.3f} to {gate['interval']['high']:.3f})" in table


def rows_of(shell: Shell, digest: str) -> list[bool]:
    """Whether each row was predicted right, read from the stored bits."""
    found = json.loads((shell.home / "store" / "blobs" / digest).read_bytes())
    bits = "".join(f"{byte:08b}" for byte in bytes.fromhex(found["rows"]["right"]))
    return [bit == "1" for bit in bits[: found["count"]]]


def test_diff_compares_members_and_results_and_tests_each_difference(lived: Shell) -> None:
    found = lived.json("diff", "demo", 2, 3)
    assert found["members"] == {
        "joined": {},
        "left": {},
        "replaced": {"colour": [1, 2]},
        "relocalized": {},
    }
    assert found["settings"] == []
    one, other = (lived.json("show", "demo", version)["results"] for version in (2, 3))
    for row in found["results"]:
        task = row["task"]
        assert (row["a"], row["b"]) == (one[task]["merged"], other[task]["merged"])
        assert row["difference"] == pytest.approx(row["b"] - row["a"])
        before, after = (
            rows_of(lived, side[task]["evaluations"]["merged"]) for side in (one, other)
        )
        pairs = list(zip(before, after, strict=True))
        # Another model says of some rows what the first did not: its rows are the same ones.
        assert row["gained"] == sum(b and not a for a, b in pairs)
        assert row["lost"] == sum(a and not b for a, b in pairs)
        assert row["rows"] == len(pairs) == 60
        significant = row["p_value"] < 0.05
        assert (row["verdict"] in ("better", "worse")) is significant
    table = plain(lived("diff", "demo", 2, 3).out)
    assert "replaced: colour 1 -> 2" in table
    assert f"{found['weights']['differ']:,} weights differ" in table
    for layer, count in found["weights"]["by_layer"].items():
        assert f"{layer}: {count:,}" in table


def test_diff_counts_the_weights_that_differ(lived: Shell, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    models = []
    for version in (2, 3):
        lived("export", "demo", version, tmp_path / str(version))
        models.append(load_file(tmp_path / str(version) / "model.safetensors"))
    counts = {n: int((models[0][n] != models[1][n]).sum()) for n in models[0]}
    found = lived.json("diff", "demo", 2, 3)["weights"]
    assert found["by_tensor"] == {name: count for name, count in counts.items() if count}
    assert found["differ"] == sum(counts.values()) == sum(found["by_layer"].values())
    assert found["differ"] == sum(found["by_component"].values())
    assert lived.json("diff", "demo", 3, 3)["weights"]["differ"] == 0


def test_diff_shows_the_members_that_joined_and_left(lived: Shell) -> None:
    assert lived.json("diff", "demo", 1, 2)["members"]["joined"] == {"number": 1}
    found = lived.json("diff", "demo", 2, 6)["members"]
    assert (found["left"], found["replaced"]) == ({"number": 1}, {"colour": [1, 2]})
    joined = next(r for r in lived.json("diff", "demo", 1, 2)["results"] if r["task"] == "number")
    assert (joined["a"], joined["difference"], joined["verdict"]) == (None, None, "joined")
    left = next(r for r in lived.json("diff", "demo", 2, 6)["results"] if r["task"] == "number")
    assert (left["b"], left["difference"], left["verdict"]) == (None, None, "left")


def test_why_follows_a_task_over_the_versions(lived: Shell) -> None:
    found = lived.json("why", "demo", "colour")
    steps = found["versions"]
    assert [step["version"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step["model"] for step in steps] == [1, 1, 2, 2, 2, 2]
    assert steps[1]["members"]["joined"] == {"number": 1}
    assert steps[2]["members"]["replaced"] == {"colour": [1, 2]}
    assert steps[4]["members"]["left"] == {"number": 1}
    passed = [step["passed"] for step in steps]
    assert passed == [True, True, True, False, False, True]
    assert steps[0]["change"] is None
    for before, step in pairwise(steps):
        assert step["change"] == pytest.approx(step["merged"] - before["merged"])
        assert step["significant"] is (step["p_value"] < 0.05)
    table = plain(lived("why", "demo", "colour").out)
    assert "version 3: replaced colour 1 -> 2" in table
    wreck = lived.json("why", "demo", "wreck")["versions"]
    assert [step["model"] for step in wreck] == [None, None, None, 1, 1, None]


def test_an_auditors_commands_need_no_server(lived: Shell) -> None:
    away = {
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "PREFECT_API_URL": "http://127.0.0.1:9/api",
    }
    shell = Shell(lived.home, away)
    for command in (
        ("history", "demo"),
        ("history", "demo", "--versions"),
        ("show", "demo"),
        ("diff", "demo", 1, 2),
        ("why", "demo", "colour"),
    ):
        shell(*command)
    assert shell.json("show", "demo")["links"]["mlflow"] is None


def test_looking_changes_nothing(lived: Shell) -> None:
    def everything() -> dict[str, Any]:
        files = (p for p in (lived.home / "store").rglob("*") if p.is_file())
        return {str(p): p.read_bytes() for p in files}

    before = everything()
    lived("history", "demo")
    lived("show", "demo", 1)
    lived("diff", "demo", 1, 2)
    lived("why", "demo", "colour")
    assert everything() == before


def test_each_registration_promotes_one_version(three: Three) -> None:
    acts = three.shell.json("history", "demo", "--event", "promoted")["acts"]
    assert [act["champion"] for act in acts] == [3, 2, 1]
    assert [act["versions"] for act in acts] == [[2, 3], [1, 2], [1]]
