"""Data of every form gives the same rows, and bad data a clear error."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from restitch.merging.errors import BadInput, Unavailable
from restitch.modeling.data.task_data import (
    Rows,
    TaskData,
    data_digest,
    labels_of,
    open_split,
    set_apart,
    stratified,
)
from restitch.registry.specs.data import DataSpec
from tests.modeling.conftest import png

LABELS = ("no", "yes")
TEXTS = ["first", "second, with a comma", 'third "quoted"', "fourth\u2028still the fourth"]
CLASSES = [0, 1, 1, 0]


def read(folder: Path, source: str, labels: tuple[str, ...] = LABELS, **spec: Any) -> Rows:
    return open_split(DataSpec(path=str(folder), test=source, **spec), "test", labels=labels)


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8"
    )
    return path


def records(classes: list[int] = CLASSES) -> list[dict[str, Any]]:
    return [{"text": t, "label": c} for t, c in zip(TEXTS, classes, strict=True)]


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerow(["text", "label"])
        writer.writerows(zip(TEXTS, CLASSES, strict=True))


def table() -> pa.Table:
    return pa.table({"text": TEXTS, "label": CLASSES})


def write_arrow(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table().schema) as writer:
        writer.write_table(table())


def write_disk(folder: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS, "label": CLASSES}).save_to_disk(folder)


def write_sharded(folder: Path) -> None:
    for shard, rows in enumerate((table()[:3], table()[3:])):
        pq.write_table(rows, folder / f"test-0000{shard}-of-00002.parquet", row_group_size=2)


FORMS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "jsonl": ("test.jsonl", lambda f: write_jsonl(f / "test.jsonl", records())),
    "json": ("test.json", lambda f: (f / "test.json").write_text(json.dumps(records()))),
    "csv": ("test.csv", lambda f: write_csv(f / "test.csv")),
    "tsv": ("test.tsv", lambda f: write_csv(f / "test.tsv", "\t")),
    "parquet": ("test.parquet", lambda f: pq.write_table(table(), f / "test.parquet")),
    "arrow": ("test.arrow", lambda f: write_arrow(f / "test.arrow")),
    "arrow on disk": ("test", lambda f: write_disk(f / "test")),
    "split of one file": ("test", lambda f: write_jsonl(f / "test.jsonl", records())),
    "split in shards": ("test", write_sharded),
    "folder": ("rows", lambda f: write_jsonl(f / "rows" / "part.jsonl", records())),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows_in_order(tmp_path, form):
    source, write = FORMS[form]
    write(tmp_path)
    rows = read(tmp_path, source)
    assert [rows[i].inputs for i in range(len(rows))] == [(text,) for text in TEXTS]
    assert [rows[i].label for i in range(len(rows))] == CLASSES == rows.targets.tolist()
    assert len({rows[i].where for i in range(len(rows))}) == len(rows)


@pytest.mark.parametrize("form", FORMS)
def test_the_digest_of_rows_does_not_depend_on_their_form(tmp_path, form):
    source, write = FORMS[form]
    write(tmp_path)
    (tmp_path / "same").mkdir()
    write_jsonl(tmp_path / "same" / "x.jsonl", records())
    assert read(tmp_path, source).digest() == read(tmp_path / "same", "x.jsonl").digest()


def test_the_digest_of_data_follows_content_not_place(tmp_path):
    for name in ("here", "there"):
        write_jsonl(tmp_path / name / "test.jsonl", records())
    here, there = (DataSpec(path=str(tmp_path / n), test="test.jsonl") for n in ("here", "there"))
    assert data_digest(here) == data_digest(there)
    assert str(tmp_path) not in json.dumps(data_digest(here))
    write_jsonl(tmp_path / "there" / "test.jsonl", records(classes=[0, 1, 1, 1]))
    assert data_digest(here) != data_digest(there)


def test_reading_leaves_no_files_behind(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    data = tmp_path / "data"
    data.mkdir()
    write_sharded(data)
    write_disk(data / "disk")
    before = sorted(tmp_path.rglob("*"))
    code = (
        "import sys; from restitch.modeling.data.task_data import *\n"
        "for s in ('test', 'disk'):\n"
        "    open_split(DataSpec(path=sys.argv[1], test=s), 'test', labels=('a', 'b'))[0]\n"
    )
    environment = {**os.environ, "HOME": str(home)}
    for name in ("HF_HOME", "XDG_CACHE_HOME", "HF_DATASETS_CACHE"):
        environment.pop(name, None)
    subprocess.run([sys.executable, "-c", code, str(data)], env=environment, check=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_pair_of_columns_is_read_in_the_given_order(tmp_path):
    write_jsonl(tmp_path / "t.jsonl", [{"b": "B", "a": "A", "label": 0}])
    assert read(tmp_path, "t.jsonl", input=("a", "b"))[0].inputs == ("A", "B")


class TestLabels:
    def rows(self, tmp_path: Path, values: list[Any], labels: tuple[str, ...] = LABELS) -> Rows:
        write_jsonl(tmp_path / "t.jsonl", [{"text": "x", "label": v} for v in values])
        return read(tmp_path, "t.jsonl", labels)

    def test_a_name_and_an_index_mean_the_same(self, tmp_path):
        assert self.rows(tmp_path, [1, "yes", "1", "no"]).targets.tolist() == [1, 1, 1, 0]

    def test_a_name_wins_over_the_index_that_it_looks_like(self, tmp_path):
        assert self.rows(tmp_path, ["1", "0"], labels=("1", "0")).targets.tolist() == [0, 1]

    @pytest.mark.parametrize("value", [2, -1, "maybe", "2", None, 1.0, True, [0]])
    def test_an_unknown_label_is_an_error_that_names_the_row(self, tmp_path, value):
        with pytest.raises(BadInput, match=r"t\.jsonl row 1: the label is not one of") as caught:
            self.rows(tmp_path, [0, value])
        assert caught.value.found == repr(value)

    def test_class_names_of_the_data_decide_where_they_are_the_labels(self, tmp_path):
        import datasets

        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["yes", "no"])}
        )
        data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features)
        data.to_parquet(tmp_path / "t.parquet")
        data.save_to_disk(tmp_path / "disk")
        for source in ("t.parquet", "disk"):
            assert read(tmp_path, source).targets.tolist() == [1, 0]
            # Other names: the index is all that is known.
            assert read(tmp_path, source, labels=("x", "y")).targets.tolist() == [0, 1]
            assert labels_of(DataSpec(path=str(tmp_path), test=source)) == ("yes", "no")

    def test_data_that_names_no_classes_is_an_error(self, tmp_path):
        self.rows(tmp_path, [0])
        with pytest.raises(BadInput, match="does not name its classes"):
            labels_of(DataSpec(path=str(tmp_path), test="t.jsonl"))

    def test_a_name_of_several_classes_cannot_be_looked_up(self, tmp_path):
        assert self.rows(tmp_path, [2], labels=("a", "b", "a")).targets.tolist() == [2]
        with pytest.raises(BadInput, match="is the name of several classes"):
            self.rows(tmp_path, ["a"], labels=("a", "b", "a"))

    def test_rows_without_classes_need_no_label_column(self, tmp_path):
        write_jsonl(tmp_path / "t.jsonl", [{"text": "x"}])
        rows = read(tmp_path, "t.jsonl", labels=())
        assert rows[0].label is None
        with pytest.raises(BadInput, match="have no labels"):
            _ = rows.targets


class TestErrors:
    def test_a_missing_column_lists_the_columns(self, tmp_path):
        write_jsonl(tmp_path / "t.jsonl", records())
        with pytest.raises(BadInput, match="no column 'sentence'") as caught:
            read(tmp_path, "t.jsonl", input=("sentence",))
        assert caught.value.found == "columns text, label"

    def test_an_empty_data_set_is_an_error(self, tmp_path):
        (tmp_path / "t.jsonl").write_text("\n")
        pq.write_table(table()[:0], tmp_path / "p.parquet")
        for source in ("t.jsonl", "p.parquet"):
            with pytest.raises(BadInput, match="no rows"):
                read(tmp_path, source)

    def test_a_missing_split_lists_the_known_ones(self, tmp_path):
        write_jsonl(tmp_path / "train.jsonl", records())
        with pytest.raises(BadInput, match="split 'dev' in") as caught:
            read(tmp_path, "dev")
        assert caught.value.found == "train.jsonl"
        with pytest.raises(BadInput, match="no validation rows") as caught:
            open_split(DataSpec(path=str(tmp_path), test="train"), "validation")
        assert caught.value.found == "test"

    def test_two_files_of_one_split_are_refused(self, tmp_path):
        write_jsonl(tmp_path / "test.jsonl", records())
        write_csv(tmp_path / "test.csv")
        with pytest.raises(BadInput, match="is ambiguous"):
            read(tmp_path, "test")

    @pytest.mark.parametrize("source", ["data.py", "set"])
    def test_a_script_is_never_run(self, tmp_path, source):
        (tmp_path / "set").mkdir()
        for place in (tmp_path / "data.py", tmp_path / "set" / "set.py"):
            place.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        with pytest.raises(BadInput, match="never run"):
            read(tmp_path, source)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("t.jsonl", b'{"text": "a", "label": 0}\n{"text"\n', "line 2 is not valid JSON"),
            ("t.jsonl", b"[1]\n", "line 1 is not a row"),
            ("t.jsonl", b'{"text": "\xff", "label": 0}\n', "not UTF-8"),
            ("t.json", b"3", "does not hold rows"),
            ("t.csv", b"text,label\na,0\nb\n", "line 3 has too many or too few fields"),
            ("t.parquet", b"PAR1 no", "cannot be read"),
            ("t.arrow", b"no arrow", "cannot be read"),
            ("t.txt", b"a", "not in a known format"),
        ],
    )
    def test_a_broken_file_is_named(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=message) as caught:
            read(tmp_path, name)
        assert name in str(caught.value)

    def test_a_text_column_must_hold_text(self, tmp_path):
        write_jsonl(tmp_path / "t.jsonl", [{"text": 3, "label": 0}])
        with pytest.raises(BadInput, match=r"t\.jsonl row 0, column 'text' is not a text"):
            read(tmp_path, "t.jsonl")[0]

    def test_a_file_as_path_gets_a_hint(self, tmp_path):
        path = write_jsonl(tmp_path / "t.jsonl", records())
        with pytest.raises(BadInput, match="is a file"):
            read(path, "test")

    def test_a_path_that_is_not_there_may_be_an_unpinned_hub_id(self, tmp_path):
        with pytest.raises(BadInput, match="neither a folder nor the id"):
            read(tmp_path / "absent", "test")
        with pytest.raises(BadInput, match="has no commit"):
            read(Path("owner/name"), "test")


class TestCalibration:
    def data(self, tmp_path: Path, counts: tuple[int, ...], **spec: Any) -> TaskData:
        rows = [
            {"text": f"{label} {i}", "label": label}
            for label, count in enumerate(counts)
            for i in range(count)
        ]
        write_jsonl(tmp_path / "train.jsonl", rows)
        labels = tuple(f"class {i}" for i in range(len(counts)))
        return TaskData(DataSpec(path=str(tmp_path), train="train.jsonl", **spec), labels, "text")

    def test_shots_are_per_class_and_all_where_there_are_fewer(self, tmp_path):
        data = self.data(tmp_path, (50, 3), validation="train.jsonl")
        rows = data.calibration(shots=8, seed=0)
        assert np.bincount(rows.targets).tolist() == [8, 3]

    def test_a_seed_gives_the_same_rows_and_another_seed_others(self, tmp_path):
        data = self.data(tmp_path, (50, 50))
        one, same, other = (data.calibration(4, seed).digest() for seed in (1, 1, 2))
        assert one == same != other

    def test_few_shots_are_among_the_many_of_the_same_seed(self, tmp_path):
        data = self.data(tmp_path, (50, 50))
        texts = [{data.calibration(n, 3)[i].inputs for i in range(2 * n)} for n in (4, 9)]
        assert texts[0] < texts[1]

    def test_rows_set_apart_are_a_fifth_of_each_class_and_never_calibrated_on(self, tmp_path):
        data = self.data(tmp_path, (50, 20, 1))
        assert data.validation_from_train
        assert data.splits == ("train", "validation")
        assert data.spec.evaluation_split == "validation"
        apart, kept = data.rows("validation"), data.rows("train")
        assert np.bincount(apart.targets, minlength=3).tolist() == [10, 4, 0]
        assert len(apart) + len(kept) == 71
        everything = data.calibration(shots=1000, seed=0)
        inputs = [{rows[i].inputs for i in range(len(rows))} for rows in (apart, everything)]
        assert not inputs[0] & inputs[1]
        assert len(inputs[1]) == len(kept)

    def test_given_validation_rows_leave_train_whole(self, tmp_path):
        data = self.data(tmp_path, (5, 5), validation="train.jsonl")
        assert not data.validation_from_train
        assert len(data.rows("train")) == 10

    def test_no_more_than_a_thousand_rows_are_set_apart(self):
        _, apart = set_apart(np.arange(20_000) % 7)
        assert 990 <= len(apart) <= 1000
        _, apart = set_apart(np.arange(6000) // 2)  # 3000 classes of two rows
        assert len(apart) == 1000

    def test_a_task_names_the_share_that_is_set_apart(self, tmp_path):
        data = self.data(tmp_path, (50, 20, 1), holdout=0.1)
        apart, kept = data.rows("validation"), data.rows("train")
        assert np.bincount(apart.targets, minlength=3).tolist() == [5, 2, 0]
        assert len(apart) + len(kept) == 71
        _, many = set_apart(np.arange(20_000) % 7, 0.1)
        assert 1990 <= len(many) <= 2000

    def test_the_share_enters_the_digest_only_where_it_is_named(self, tmp_path):
        usual = self.data(tmp_path, (5, 5)).spec
        assert "read_as" not in data_digest(usual)
        named = usual.model_copy(update={"holdout": 0.1})
        assert data_digest(named)["read_as"] == {"holdout": 0.1}
        with pytest.raises(ValueError, match="in place of 'validation'"):
            DataSpec(path=".", train="train", validation="validation", holdout=0.1)

    def test_the_rows_set_apart_never_change(self):
        kept, apart = set_apart(np.arange(20) % 2)
        assert apart.tolist() == [3, 5, 6, 14]
        assert sorted([*kept, *apart]) == list(range(20))

    def test_single_rows_cannot_be_set_apart(self, tmp_path):
        with pytest.raises(BadInput, match="too few rows"):
            self.data(tmp_path, (1, 1)).rows("validation")

    def test_test_rows_are_what_is_reported_on(self, tmp_path):
        assert self.data(tmp_path, (5, 5), test="train.jsonl").spec.evaluation_split == "test"
        assert DataSpec(path=".").evaluation_split is None

    def test_calibration_needs_train_rows(self, tmp_path):
        self.data(tmp_path, (5, 5))
        data = TaskData(DataSpec(path=str(tmp_path), test="train.jsonl"), LABELS, "text")
        with pytest.raises(BadInput, match="no train rows"):
            data.calibration(4, 0)

    def test_an_unreachable_hub_is_unavailable_and_not_bad_input(self, monkeypatch):
        import datasets

        def refuse(*_args, **_keywords):
            raise ConnectionError("refused")

        monkeypatch.setattr(datasets, "load_dataset", refuse)
        with pytest.raises(Unavailable, match="owner/name cannot be fetched"):
            read(Path(f"owner/name@{'a' * 40}"), "test")


def test_pictures_count_in_the_digest_of_a_table_that_names_them(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    write_jsonl(tmp_path / "t.jsonl", [{"image": "a.png", "label": 0}])
    spec = DataSpec(path=str(tmp_path), test="t.jsonl", input=("image",))
    before = data_digest(spec)
    (tmp_path / "a.png").write_bytes(png(2))
    assert data_digest(spec) != before


def test_a_sample_gives_each_class_its_share_and_is_the_same_every_time() -> None:
    targets = np.repeat([0, 1, 2], [60, 30, 10])
    chosen = stratified(targets, 20, seed=3)
    assert np.bincount(targets[chosen]).tolist() == [12, 6, 2]
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert chosen.tolist() == stratified(targets, 20, seed=3).tolist()
    assert chosen.tolist() != stratified(targets, 20, seed=4).tolist()


def test_a_sample_has_exactly_its_rows_for_any_classes() -> None:
    targets = np.arange(100) % 7
    for count in (1, 7, 50, 99):
        chosen = stratified(targets, count, seed=0)
        assert len(chosen) == count
        shares = np.bincount(targets[chosen], minlength=7) - np.bincount(targets) * count / 100
        assert np.abs(shares).max() < 1
    assert stratified(targets, 100, seed=0).tolist() == list(range(100))
    assert stratified(targets, 1000, seed=0).tolist() == list(range(100))


def test_a_sample_never_changes() -> None:
    targets = np.repeat([0, 1], [6, 6])
    assert stratified(targets, 4, seed=0).tolist() == [3, 5, 10, 11]


class TestTrainRowsWithoutLabels:
    def data(self, folder: Path, **more: Any) -> TaskData:
        write_jsonl(folder / "train.jsonl", [{"text": f"train {i}"} for i in range(200)])
        rows = [{"text": f"test {i}", "label": i % 2} for i in range(10)]
        write_jsonl(folder / "test.jsonl", rows)
        spec = DataSpec(path=str(folder), train="train.jsonl", **more)
        return TaskData(spec, LABELS, "text")

    def test_rows_without_labels_serve_as_inputs_to_calibrate_with(self, tmp_path):
        data = self.data(tmp_path, test="test.jsonl")
        rows = data.calibration(shots=8, seed=0)
        assert (len(rows), rows.label, rows[0].label) == (16, None, None), "8 for each class"
        assert data.calibration(8, 0).digest() == rows.digest() != data.calibration(8, 1).digest()

    def test_rows_to_evaluate_on_need_a_label_column(self, tmp_path):
        with pytest.raises(BadInput, match="no column 'label'"):
            self.data(tmp_path).rows("train")
        with pytest.raises(BadInput, match="no column 'label'"):
            self.data(tmp_path, test="train.jsonl").rows("test")
