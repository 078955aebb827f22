from pathlib import Path

import pytest

from restitch.merging.errors import BadInput
from restitch.registry.gates.registry import GATES
from restitch.registry.specs.base import Spec
from restitch.registry.specs.files import load_line, load_task, parse_line, parse_task
from restitch.registry.specs.hub_id import is_hub_id, keep_pin, split_pin
from restitch.registry.specs.line import DEFAULT_CRON, LineSpec, ScheduleSpec, line_changes
from restitch.registry.specs.localize import DEFAULT_DENSITY
from restitch.registry.specs.task import TaskSpec
from tests.registry.specs.schemas import schema_problems

COMMIT = "0123456789" * 4
LINE = "line: demo\nbase: org/model\nfamily: clip\nmethod: localize-and-stitch\n"


def line(text: str = "", folder: Path = Path("/nowhere")) -> LineSpec:
    spec = parse_line(LINE + text, "line.yaml", folder)
    assert schema_problems("line", LINE + text) == []
    return spec


def task(text: str = "", folder: Path = Path("/nowhere")) -> TaskSpec:
    spec = parse_task("task: demo\n" + text, "task.yaml", folder)
    assert schema_problems("task", "task: demo\n" + text) == []
    return spec


def problems(make, *args) -> str:
    with pytest.raises(BadInput) as raised:
        make(*args)
    return str(raised.value)


def test_all_defaults_are_stored():
    assert line().to_json() == {
        "line": "demo",
        "base": "org/model",
        "family": "clip",
        "method": {"name": "localize-and-stitch", "settings": {}},
        "localize": {
            "mode": "distilled",
            "density": 0.1,
            "rank": None,
            "preset": "budget",
            "shots": 64,
            "epochs": 3,
            "seed": 0,
            "include": [],
            "exclude": [],
            "recovery": None,
            "max_density": None,
            "max_rank": None,
            "budget": None,
            "values": "exact",
        },
        "space": None,
        "retention": None,
        "gates": {**dict.fromkeys(GATES), "warn": []},
        "schedule": {"cron": "*/15 * * * *", "timezone": "UTC"},
        "require_device": None,
        "compute": "auto",
        "actors": None,
        "notify": [],
        "mlflow": {"weights": "champion"},
    }


def test_density_is_lower_by_default_when_trained():
    assert line("localize: {mode: trained}").localize.density == 0.01
    assert line("localize: {mode: trained, density: 0.2}").localize.density == 0.2


def test_only_what_determines_the_mask_is_in_the_settings():
    assert line("localize: {mode: dataless}").localize.settings == {"density": 0.05}
    assert set(line("localize: {mode: trained}").localize.settings) == {
        "density",
        "preset",
        "shots",
        "epochs",
        "seed",
    }


def test_every_key_of_a_line_is_read(tmp_path):
    (tmp_path / "base").mkdir()
    text = """
line: demo
base: base
family: text-encoder
method: {name: ties, settings: {density: 0.2, overlap: mean}}
localize:
  {mode: trained, density: 1e-3, preset: paper, shots: 8, epochs: 2, seed: 1, include: ["*.w"]}
retention: imagenet
gates: {min_retention: 0.95, max_task_drop: 0.01, min_normalized: 0.9}
schedule: "*/15 * * * *"
require_device: cuda
"""
    spec = parse_line(text, "line.yaml", tmp_path)
    assert spec.base == str((tmp_path / "base").resolve())
    assert spec.method.settings == {"density": 0.2, "overlap": "mean"}
    assert spec.localize.density == 0.001
    assert spec.localize.include == ("*.w",)
    assert spec.retention == "imagenet"
    assert spec.gates.limits["min_retention"] == 0.95
    assert LineSpec.from_json(spec.to_json()) == spec


def test_a_schedule_is_a_cron_line_in_utc_unless_it_names_a_time_zone():
    assert line('schedule: "0 3  * * * "').schedule == ScheduleSpec(cron="0 3 * * *")
    night = line('schedule: {cron: "0 3 * * *", timezone: Europe/Berlin}').schedule
    assert night == ScheduleSpec(cron="0 3 * * *", timezone="Europe/Berlin")
    assert line('schedule: {cron: "@daily"}').schedule == ScheduleSpec(cron="@daily")
    assert str(ScheduleSpec(cron="@daily")) == "@daily UTC"


def test_null_is_no_schedule_and_a_file_without_the_key_has_the_default():
    assert line("schedule: null").schedule is None
    assert line().schedule == ScheduleSpec(cron=DEFAULT_CRON)
    assert line("schedule: null").digest != line().digest
    for text in ("", "schedule: null", 'schedule: "0 3 * * *"'):
        assert LineSpec.from_json(line(text).to_json()) == line(text)


def test_a_changed_schedule_is_listed_by_its_keys():
    never, night = line("schedule: null"), line('schedule: "0 3 * * *"')
    assert line_changes(line(), night) == [("schedule.cron", "*/15 * * * *", "0 3 * * *")]
    assert line_changes(night, never) == [
        ("schedule.cron", "0 3 * * *", None),
        ("schedule.timezone", "UTC", None),
    ]


def test_paths_are_relative_to_their_file(tmp_path, monkeypatch):
    folder = tmp_path / "tasks"
    (folder / "data").mkdir(parents=True)
    (folder / "labels.txt").write_text("cat\ndog\n\n")
    (folder / "templates.json").write_text('["a photo of a {}"]')
    (folder / "task.yaml").write_text(
        "task: pets\ndata: {path: data, train: train.csv, input: image, label: kind}\n"
        "head: {labels: labels.txt, templates: templates.json}\n"
    )
    (tmp_path / "line.yaml").write_text(LINE + "retention: tasks/task.yaml\n")
    monkeypatch.chdir("/")
    spec = load_line(tmp_path / "line.yaml").retention
    assert isinstance(spec, TaskSpec)
    assert spec == load_task(folder / "task.yaml")
    assert spec.data is not None
    assert spec.head is not None
    assert spec.data.path == str((folder / "data").resolve())
    assert spec.data.train == "train.csv", "a file within the path stays as it is"
    assert spec.data.input == ("image",)
    assert spec.head.labels == ("cat", "dog")
    assert spec.head.templates == ("a photo of a {}",)


def test_a_spec_does_not_change_with_its_files(tmp_path):
    (tmp_path / "labels.txt").write_text("a\nb\n")
    spec = task("head: {labels: labels.txt}", tmp_path)
    stored = spec.to_json()
    (tmp_path / "labels.txt").write_text("x\ny\n")
    assert TaskSpec.from_json(stored) == spec
    assert task("head: {labels: labels.txt}", tmp_path).digest != spec.digest


def test_an_existing_path_wins_over_a_hub_id(tmp_path):
    assert line("", tmp_path).base == "org/model"
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert line("", tmp_path).base == str((tmp_path / "org" / "model").resolve())


def test_a_word_stands_for_the_curated_names_unless_a_file_does(tmp_path):
    found = task("head: {labels: openai, templates: openai}", tmp_path).head
    assert found is not None
    assert (found.labels, found.templates) == ("openai", "openai")
    (tmp_path / "openai").write_text("a\nb")
    found = task("head: {labels: openai}", tmp_path).head
    assert found is not None
    assert found.labels == ("a", "b")


def test_a_task_needs_nothing_but_its_name():
    assert task().to_json() == {
        "task": "demo",
        "data": None,
        "head": None,
        "prompt": None,
        "chat": None,
        "choices": None,
        "choices_column": None,
        "answer": None,
        "generate": None,
        "lm_eval": None,
        "score": "sum",
        "per": None,
        "scale": None,
        "max_length": None,
        "metric": "accuracy",
        "expected": None,
    }


def test_all_problems_are_listed_at_once_with_their_places():
    found = problems(
        line, "localize: {mode: trainde, densty: 1, shots: 1.5, include: [3]}\nschedul: 3\n"
    )
    for part in (
        "line.yaml cannot be used",
        "unknown key 'densty' in localize; did you mean 'density'?",
        "unknown key 'schedul'; did you mean 'schedule'?",
        "localize.mode: expected 'dataless', 'trained', 'fisher', 'distilled' or 'subspace', "
        'found "trainde"',
        "localize.shots: expected integer, found 1.5",
        "localize.include.0: expected string, found 3; put it in quotes",
    ):
        assert part in found


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("line: 'A b'", "is not a name"),
        ("line: " + "a" * 64, "is not a name"),
        ("line: -a", "is not a name"),
        ("line: 3", "put it in quotes"),
        ("line: a", "'base' is missing"),
        ("method: {nam: x}", "'nam' in method; did you mean 'name'?"),
        ("gates: {min_retention: high}", "gates.min_retention: expected number"),
        ("method: {tournament: [a, b], objektive: mean}", "did you mean 'objective'"),
        ("method: {tournament: [a, {name: b, setting: {}}]}", "did you mean 'settings'"),
        ("method: {tournament: [a]}", "method.tournament: expected a list of 2 or more"),
        ("method: {tournament: [a, b], objective: {retention: -1}}", "objective.retention"),
        ("gates: {max_task_drop: 2}", "a fraction from 0 to 1, found 2; write 0.02, not 2"),
        ("gates: {min_retention: .inf}", "a fraction from 0 to 1, found inf"),
        ("localize: {density: 0}", "greater than 0"),
        ("localize: {density: .nan}", "localize.density"),
        ("localize: {shots: true}", "localize.shots: expected integer, found true"),
        ("localize: 3", "localize: expected an object"),
        ("schedule: hourly", "is not a cron line"),
        ("schedule: [a]", "schedule"),
        ("schedule: 5", "schedule"),
        ('schedule: ""', "is not a cron line"),
        ('schedule: "* * * *"', "is not a cron line"),
        ('schedule: "* * * * * *"', "is not a cron line"),
        ('schedule: {cron: "* * * * *", zone: UTC}', "unknown key 'zone' in schedule"),
        ("schedule: {timezone: UTC}", "'schedule.cron' is missing"),
        ('schedule: {cron: "* * * * *", timezone: ""}', "schedule.timezone"),
        ("require_device: tpu", "require_device: expected 'cpu' or 'cuda'"),
        ("retention: gone/task.yaml", "neither a file nor the name of a task"),
        ("retention: {task: x, dat: 1}", "'dat'; did you mean 'data'?"),
        ("base: ./gone", "neither an existing path nor a hub id"),
        ("base: [a]", "base: expected string"),
    ],
)
def test_a_wrong_line_file_names_the_place(text, part):
    assert part in problems(parse_line, text, "line.yaml", Path("/nowhere"))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            "head: {labels: [yes, no]}",
            "head.labels.0: expected string, found true; put it in quotes",
        ),
        ("head: {labels: [a]}", "at least two labels"),
        ("head: {labels: [a, b, a]}", "labels occur twice: 'a'"),
        ("head: {labels: [a, '']}", "head.labels.1"),
        ("head: {templates: ['{}']}", "either 'labels' or 'labels_from: dataset'"),
        ("head: {labels: [a, b], labels_from: dataset}", "either 'labels' or 'labels_from"),
        ("head: {labels: [a, b], templates: [x]}", "has no '{}'"),
        ("head: {labels: [a, b], templates: []}", "at least one template"),
        ("head: {labels: gone.txt}", "gone.txt cannot be read"),
        ("data: {path: ./gone, input: x}", "data.path './gone' is neither"),
        ("data: {train: x}", "'data.path' is missing"),
        ("scale: -1", "scale"),
        ("max_length: 0", "max_length"),
        ("metric: acc", "metric: expected 'accuracy', 'f1', 'exact_match'"),
        ("labels: [a, b]", "unknown key 'labels'"),
    ],
)
def test_a_wrong_task_file_names_the_place(text, part):
    assert part in problems(task, text)


def test_a_label_file_that_is_not_a_list_is_refused(tmp_path):
    (tmp_path / "labels.json").write_text('{"a": 1}')
    assert "not a JSON list" in problems(task, "head: {labels: labels.json}", tmp_path)
    (tmp_path / "labels.json").write_text("[")
    assert "not valid JSON" in problems(task, "head: {labels: labels.json}", tmp_path)


def test_base_and_family_are_fixed_and_any_other_change_is_named():
    old = line()
    new = line("localize: {density: 0.2}\ngates: {min_retention: 0.9}\nretention: other\n")
    assert line_changes(old, new) == [
        ("gates.min_retention", None, 0.9),
        ("localize.density", 0.1, 0.2),
        ("retention", None, "other"),
    ]
    assert line_changes(new, old) == [
        ("gates.min_retention", 0.9, None),
        ("localize.density", 0.2, 0.1),
        ("retention", "other", None),
    ]
    assert line_changes(old, line("actors: {promote: [a]}\nlocalize: {seed: 0}\n")) == [
        ("actors.promote", None, ["a"])
    ]
    assert line_changes(old, old) == []
    for key, value in (("base", "/other"), ("family", "text-encoder")):
        assert f"{key} cannot change" in problems(
            line_changes, old, old.model_copy(update={key: value})
        )


def test_an_unpinned_source_keeps_the_commit_that_was_pinned():
    pinned = line().with_base(f"org/model@{COMMIT}")
    assert line().with_pins_of(pinned) == pinned
    assert line_changes(pinned, line().with_pins_of(pinned)) == []
    assert keep_pin("org/other", f"org/model@{COMMIT}") == "org/other"
    assert keep_pin("org/model@main", f"org/model@{COMMIT}") == "org/model@main"
    old = task(f"data: {{path: 'org/data@{COMMIT}'}}")
    assert task("data: {path: org/data}").with_pins_of(old) == old


def test_a_revision_is_split_from_a_hub_id_and_never_from_a_path():
    assert split_pin("org/model@v1") == ("org/model", "v1")
    assert split_pin("org/model") == ("org/model", None)
    assert split_pin("/folder/model@v1") == ("/folder/model@v1", None)


@pytest.mark.parametrize("good", ["org/model", "gpt2", "org/m.o-d_el@v1.0", "org/data:config@main"])
def test_these_are_hub_ids(good):
    assert is_hub_id(good)


@pytest.mark.parametrize(
    "bad", ["", "/a", "./a", "../a", "a/b/c", "a b", "org/", "a/b@", "~/a", "s3://a/b"]
)
def test_these_are_not_hub_ids(bad):
    assert not is_hub_id(bad)


def test_a_new_optional_key_leaves_the_digests_of_lines_that_do_not_use_it():
    class Part(Spec):
        x: int = 1

    class LaterLine(LineSpec):
        colour: str = "none"
        part: Part = Part()

    class LaterTask(TaskSpec):
        colour: str | None = None

    for text in ("", "localize: {mode: trained}", "gates: {max_task_drop: 0.1}"):
        now = line(text)
        later = LaterLine.from_json(now.to_json())
        assert later.digest == now.digest
        assert later.model_copy(update={"colour": "red"}).digest != now.digest
        assert later.model_copy(update={"part": Part(x=2)}).digest != now.digest
    assert LaterTask.from_json(task().to_json()).digest == task().digest


def test_a_default_that_is_written_out_gives_the_same_digest():
    assert (
        line("localize: {mode: dataless, seed: 0}").digest
        == line("localize: {mode: dataless}").digest
    )
    written = ('schedule: "*/15 * * * *"', 'schedule: {cron: "*/15 * * * *", timezone: UTC}')
    assert {line(text).digest for text in written} == {line().digest}
    digests = {line(f"localize: {{mode: {mode}}}").digest for mode in DEFAULT_DENSITY}
    assert len(digests) == len(DEFAULT_DENSITY)


def test_the_digest_of_a_line_does_not_change_by_accident():
    assert (
        line("localize: {mode: dataless}").digest
        == "11c92133ee75421c845f6c43c036bf3a46d7cfae9b14d8779b244599fb1c1bfb"
    )
    assert (
        line("localize: {mode: trained}").digest
        == "d6671e04495036bd9e5373a09d451f7b06739b70b6eb04fb96926b003c078d11"
    )


def test_defaults_that_depend_on_the_mode_are_stored():
    for mode, density, epochs in (("fisher", 0.1, 10), ("distilled", 0.1, 3)):
        found = line(f"localize: {{mode: {mode}}}").localize
        assert (found.density, found.epochs) == (density, epochs)
    assert line("localize: {mode: fisher}").localize.settings == {
        "density": 0.1,
        "shots": 64,
        "seed": 0,
    }


def test_a_density_that_is_chosen_brings_its_defaults():
    spec = line("localize: {mode: dataless, density: auto, budget: 20MB}")
    stored = spec.to_json()["localize"]
    assert stored["density"] == "auto"
    assert (stored["recovery"], stored["max_density"], stored["budget"]) == (0.95, 0.3, 20_000_000)
    assert LineSpec.from_json(spec.to_json()) == spec
    assert spec.localize.settings == {
        "density": "auto",
        "recovery": 0.95,
        "max_density": 0.3,
        "budget": 20_000_000,
    }


def test_a_subspace_has_defaults_of_its_own():
    spec = line("localize: {mode: subspace}").localize
    assert (spec.rank, spec.values, spec.density, spec.recovery) == (0.0417, "int8", 1.0, None)
    assert not spec.reads_rows
    assert not spec.chooses_by_rows
    assert line("localize: {mode: subspace, rank: auto}").localize.chooses_by_rows
    assert spec.settings == {"rank": 0.0417, "values": "int8"}
    auto = line("localize: {mode: subspace, rank: auto, values: bf16}").localize
    assert (auto.rank, auto.values, auto.recovery, auto.max_rank) == ("auto", "bf16", 0.95, 0.25)
    exact = line("localize: {mode: subspace, values: exact}")
    assert exact.localize.settings == {"rank": 0.0417, "values": "exact"}
    for one in (exact, line("localize: {mode: subspace, rank: auto, budget: 1MB}")):
        assert LineSpec.from_json(one.to_json()) == one
    written = line("localize: {mode: subspace, rank: 0.0417, values: int8}")
    assert written.digest == line("localize: {mode: subspace}").digest


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ("mode: subspace, density: 0.1", "keeps a rank, not a density"),
        ("mode: subspace, rank: 0", "rank"),
        ("mode: subspace, rank: 1.5", "rank"),
        ("mode: subspace, recovery: 0.9", "recovery belongs to rank: auto"),
        ("mode: subspace, rank: 0.1, max_rank: 0.2", "max_rank belongs to rank: auto"),
        ("mode: dataless, rank: 0.1", "belong to mode: subspace"),
        ("mode: dataless, values: bf16", "belong to mode: subspace"),
        ("mode: dataless, max_rank: 0.1", "belong to mode: subspace"),
    ],
)
def test_keys_of_masks_and_of_subspaces_do_not_mix(keys, problem):
    assert problem in problems(line, f"localize: {{{keys}}}")


def test_what_a_delta_stores_of_a_weight_enters_digests_only_where_it_is_chosen():
    plain = line("localize: {mode: dataless}")
    short = line("localize: {mode: dataless, values: int8}")
    assert line("localize: {mode: dataless, values: exact}").digest == plain.digest
    assert short.digest != plain.digest
    assert plain.localize.settings == {"density": 0.05}
    assert short.localize.settings == {"density": 0.05, "values": "int8"}
    assert LineSpec.from_json(short.to_json()) == short
    assert "expected 'exact', 'int8' or 'bf16'" in problems(line, "localize: {values: int4}")


@pytest.mark.parametrize(
    ("localize", "found"),
    [
        ("{density: atuo}", "localize.density: expected 'auto', found \"atuo\""),
        ("{density: true}", "localize.density: expected number"),
        ("{density: 2}", "localize.density: expected less than or equal to 1"),
        ("{recovery: 0.9}", "belong to density: auto"),
        ("{density: 0.1, max_density: 0.2}", "belong to density: auto"),
        ("{density: auto, recovery: null}", "needs recovery and max_density"),
        ("{mode: trained, preset: official, density: auto}", "a density of its own"),
        ("{mode: trained, preset: paper, budget: 1MB}", "a density of its own"),
        ("{budget: many}", "is not a file size"),
    ],
)
def test_an_impossible_density_is_explained_in_one_line(localize, found):
    text = problems(line, f"localize: {localize}")
    assert found in text
    assert text.count("  - ") == 1, text
