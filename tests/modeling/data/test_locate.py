"""The files of a split: hidden files are no data, all others are read, counted or refused."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from restitch.merging.errors import BadInput
from restitch.modeling.data.file_kinds import IMAGE_SUFFIXES, UNREADABLE_IMAGES
from restitch.modeling.data.task_data import Rows, data_digest, open_split
from restitch.registry.specs.data import DataSpec
from tests.modeling.conftest import png

LABELS = ("cat", "dog")


def images(folder: Path, source: str = "test", **spec: Any) -> Rows:
    data = DataSpec(path=str(folder), test=source, input=("image",), **spec)
    return open_split(data, "test", labels=LABELS, modality="image")


def texts(folder: Path, source: str) -> list[Any]:
    rows = open_split(DataSpec(path=str(folder), test=source), "test", labels=LABELS)
    return [rows[row].inputs[0] for row in range(len(rows))]


def write_images(root: Path, names: tuple[str, ...] = ("cat/0.png", "dog/1.png")) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(len(name)))
    return root


def write_rows(file: Path, *names: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": name, "label": 0}) + "\n" for name in names)
    file.write_text("".join(lines))


HIDDEN = [
    *("cat/._0.png", "cat/.ipynb_checkpoints/0-checkpoint.png", ".ipynb_checkpoints/0.png"),
    *("__MACOSX/cat/._0.png", "cat/Thumbs.db", ".DS_Store", "dog/.DS_Store", "desktop.ini"),
]


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_files_and_those_of_a_system_are_no_data(tmp_path, name):
    write_images(tmp_path / "test")
    before = data_digest(DataSpec(path=str(tmp_path), test="test", input=("image",)))
    write_images(tmp_path / "test", (name,))
    rows = images(tmp_path)
    assert rows.targets.tolist() == [0, 1]
    assert rows.notes == (f"left out of {tmp_path / 'test'}: 1 hidden file ({name})",)
    assert data_digest(DataSpec(path=str(tmp_path), test="test", input=("image",))) == before


def test_what_is_left_out_is_counted_and_named(tmp_path):
    write_images(tmp_path / "test", ("cat/0.png", "dog/1.png"))
    for number in range(7):
        (tmp_path / "test" / "cat" / f"{number}.txt").write_text("a caption")
    assert images(tmp_path).notes == (
        f"left out of {tmp_path / 'test'}: 7 files that are no images by their names "
        "(cat/0.txt, cat/1.txt, cat/2.txt, cat/3.txt, cat/4.txt and 2 more)",
    )


@pytest.mark.parametrize("suffix", ["jfif", "JPG", "ppm", "jp2", "Webp", "tga", "jpe", "avif"])
def test_an_image_may_have_any_suffix_that_pillow_knows(tmp_path, suffix):
    write_images(tmp_path / "test", (f"cat/0.{suffix}", "dog/1.png"))
    rows = images(tmp_path)
    assert len(rows) == 2
    assert rows[0].inputs[0].mode == "RGB"


def test_every_suffix_of_pillow_is_read_or_refused():
    from PIL import Image

    no_pictures = {".h5", ".hdf"}  # tables of numbers
    known = {*IMAGE_SUFFIXES, *UNREADABLE_IMAGES, *no_pictures}
    Image.init()
    assert {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN} <= known
    assert not set(IMAGE_SUFFIXES) & set(UNREADABLE_IMAGES)


def test_every_suffix_of_an_image_folder_of_datasets_is_known():
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    assert set(ImageFolder.EXTENSIONS) <= {*IMAGE_SUFFIXES, *UNREADABLE_IMAGES}


@pytest.mark.parametrize("suffix", ["heic", "svg", "eps", "NEF", "jxl"])
def test_a_picture_that_is_not_read_is_refused_by_name(tmp_path, suffix):
    write_images(tmp_path / "test", ("cat/0.png", f"dog/1.{suffix}"))
    with pytest.raises(BadInput, match="1 images of a kind that is not read") as caught:
        images(tmp_path)
    assert caught.value.found == f"dog/1.{suffix}"


def test_a_folder_without_images_says_what_is_in_it(tmp_path):
    for number in range(3):
        write_images(tmp_path / "test", (f"cat/{number}.xyz",))
    with pytest.raises(BadInput, match="known form") as caught:
        images(tmp_path)
    assert caught.value.found == "3 files of .xyz"


class TestLinks:
    def test_a_linked_folder_and_a_linked_image_are_read(self, tmp_path):
        write_images(tmp_path / "elsewhere", ("0.png", "1.png"))
        write_images(tmp_path / "test", ("cat/0.png",))
        (tmp_path / "test" / "dog").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "test" / "cat" / "2.png").symlink_to(tmp_path / "elsewhere" / "0.png")
        assert images(tmp_path).targets.tolist() == [0, 0, 1, 1]

    def test_the_target_of_a_link_is_in_the_digest(self, tmp_path):
        (tmp_path / "a.png").write_bytes(png(1))
        (tmp_path / "test" / "cat").mkdir(parents=True)
        (tmp_path / "test" / "cat" / "0.png").symlink_to(tmp_path / "a.png")
        spec = DataSpec(path=str(tmp_path), test="test", input=("image",))
        before = data_digest(spec)
        (tmp_path / "a.png").write_bytes(png(2))
        assert data_digest(spec) != before

    @pytest.mark.parametrize("kind", ["broken", "pipe"])
    def test_what_cannot_be_read_is_not_left_out(self, tmp_path, kind):
        write_images(tmp_path / "test")
        place = tmp_path / "test" / "dog" / "2.png"
        if kind == "pipe":
            os.mkfifo(place)
        else:
            place.symlink_to(tmp_path / "absent.png")
        with pytest.raises(BadInput, match=r"broken link|not a regular file"):
            images(tmp_path)

    def test_a_link_to_a_folder_above_is_refused(self, tmp_path):
        write_images(tmp_path / "test")
        (tmp_path / "test" / "dog" / "more").symlink_to(tmp_path / "test")
        with pytest.raises(BadInput, match="link to a folder above"):
            images(tmp_path)

    def test_a_name_that_is_not_utf8_is_refused(self, tmp_path):
        write_images(tmp_path / "test")
        place = os.fsencode(tmp_path / "test" / "dog") + b"/\xff.png"
        Path(os.fsdecode(place)).write_bytes(png(1))
        with pytest.raises(BadInput, match="not UTF-8"):
            images(tmp_path)


def test_an_image_in_the_folders_of_two_classes_is_refused(tmp_path):
    write_images(tmp_path / "test", ("cat/0.png", "dog/1.png", "cat/dog/2.png"))
    with pytest.raises(BadInput, match="folders of two classes") as caught:
        images(tmp_path)
    assert caught.value.found == "cat and dog"


def test_folders_inside_of_a_class_belong_to_it(tmp_path):
    write_images(tmp_path / "test", ("cat/a/0.png", "cat/b/1.png", "dog/2.png"))
    assert images(tmp_path).targets.tolist() == [0, 0, 1]


class TestMetadata:
    """A table that lists the images of its folder, in the form of `datasets`."""

    def write(self, folder: Path, rows: list[dict[str, Any]], name: str = "metadata.csv") -> None:
        write_images(folder, ("a.png", "sub/b.png", "c.png"))
        table = pa.Table.from_pylist(rows)
        if name.endswith(".parquet"):
            pq.write_table(table, folder / name)
        else:
            lines = [",".join(table.column_names)]
            lines += [",".join(map(str, row.values())) for row in rows]
            (folder / name).write_text("\n".join(lines) + "\n")

    @pytest.mark.parametrize("name", ["metadata.csv", "metadata.parquet"])
    def test_file_name_is_the_image_and_others_are_counted(self, tmp_path, name):
        rows = [{"file_name": "a.png", "label": "dog"}, {"file_name": "sub/b.png", "label": "cat"}]
        self.write(tmp_path / "test", rows, name)
        (tmp_path / "test" / "README").write_text("about")
        found = images(tmp_path)
        assert found.targets.tolist() == [1, 0]
        assert found[1].inputs[0].size == (20, 16)
        assert found.notes == (
            f"left out of {tmp_path / 'test'}: 1 file that is not read (README)",
            f"left out of {tmp_path / 'test'}: 1 file that is not listed in {name} (c.png)",
        )

    @pytest.mark.parametrize("name", ["metadata.csv", "metadata.parquet"])
    def test_every_image_that_is_named_is_in_the_digest(self, tmp_path, name):
        rows = [{"file_name": "a.png", "label": 0}, {"file_name": "sub/b.png", "label": 1}]
        self.write(tmp_path / "test", rows, name)
        spec = DataSpec(path=str(tmp_path), test="test", input=("image",))
        before = data_digest(spec)
        (tmp_path / "test" / "c.png").write_bytes(png(77))
        assert data_digest(spec) == before
        (tmp_path / "test" / "sub" / "b.png").write_bytes(png(78))
        assert data_digest(spec) != before


@pytest.mark.parametrize("value", ["a.unknown", "sub/noending"])
@pytest.mark.parametrize("form", ["jsonl", "parquet", "path in parquet"])
def test_a_named_image_of_any_suffix_is_in_the_digest(tmp_path, value, form):
    write_images(tmp_path, (value,))
    image: Any = {"bytes": None, "path": value} if form == "path in parquet" else value
    name = f"t.{form.split()[-1]}"
    if form == "jsonl":
        (tmp_path / name).write_text(json.dumps({"image": image, "label": 0}))
    else:
        pq.write_table(pa.table({"image": [image], "label": [0]}), tmp_path / name)
    spec = DataSpec(path=str(tmp_path), test=name, input=("image",))
    assert images(tmp_path, name)[0].inputs[0].size == (20, 16)
    before = data_digest(spec)
    (tmp_path / value).write_bytes(png(55))
    assert data_digest(spec) != before


def test_images_inside_of_a_table_are_not_read_for_the_digest(tmp_path, monkeypatch):
    image = {"bytes": png(0), "path": "a.png"}
    pq.write_table(pa.table({"image": [image], "label": [0]}), tmp_path / "t.parquet")
    monkeypatch.setattr(
        "restitch.modeling.data.arrow_tables._Parquet.read", lambda *_: pytest.fail("read")
    )
    data_digest(DataSpec(path=str(tmp_path), test="t.parquet", input=("image",)))


class TestShards:
    def test_shards_of_a_split_are_read_in_order(self, tmp_path):
        for shard in (1, 0):
            write_rows(tmp_path / f"test-0000{shard}-of-00002.jsonl", f"shard {shard}")
        assert texts(tmp_path, "test") == ["shard 0", "shard 1"]

    @pytest.mark.parametrize(
        "names",
        [
            ("test-00000-of-00002", "test-00002-of-00002"),
            ("test-00000-of-00002",),
            ("test-00000-of-00001", "test-00000-of-00002", "test-00001-of-00002"),
            ("test", "test-00000-of-00001"),
        ],
    )
    def test_a_missing_or_a_second_set_of_shards_is_refused(self, tmp_path, names):
        for name in names:
            write_rows(tmp_path / f"{name}.jsonl", name)
        with pytest.raises(BadInput, match=r"ambiguous|does not have all of its 2 shards"):
            texts(tmp_path, "test")

    def test_a_file_and_its_packed_copy_are_not_read_twice(self, tmp_path):
        write_rows(tmp_path / "test.jsonl", "a")
        (tmp_path / "test.jsonl.gz").write_bytes(b"")
        with pytest.raises(BadInput, match="is ambiguous"):
            texts(tmp_path, "test")

    def test_a_pattern_names_several_files(self, tmp_path):
        for name in ("part-b", "part-a", "other", ".part-c"):
            write_rows(tmp_path / "rows" / f"{name}.jsonl", name)
        assert texts(tmp_path, "rows/part-*.jsonl") == ["part-a", "part-b"]
        with pytest.raises(BadInput, match="there is no file, folder or split"):
            texts(tmp_path / "rows", "../rows/part-*.jsonl")

    def test_files_of_several_splits_are_not_one(self, tmp_path):
        for name in ("train", "dev"):
            write_rows(tmp_path / f"{name}.jsonl", name)
        with pytest.raises(BadInput, match="several splits"):
            texts(tmp_path, ".")

    def test_other_files_next_to_tables_are_named(self, tmp_path):
        write_rows(tmp_path / "rows" / "a.jsonl", "a")
        write_rows(tmp_path / "rows" / "more" / "b.jsonl", "b")
        (tmp_path / "rows" / "._a.jsonl").write_bytes(b"\0\5\x16\7")
        rows = open_split(DataSpec(path=str(tmp_path), test="rows"), "test", labels=LABELS)
        assert len(rows) == 1
        assert rows.notes == (
            f"left out of {tmp_path / 'rows'}: 1 hidden file (._a.jsonl), "
            "1 file that is not read (more/b.jsonl)",
        )


class TestSavedByDatasets:
    def save(self, folder: Path, count: int = 4) -> None:
        import datasets

        made = datasets.Dataset.from_dict(
            {"text": [f"{n}" for n in range(count)], "label": [0, 1] * 2}
        )
        made.save_to_disk(folder, num_shards=2)

    def test_the_files_of_the_rows_are_the_digest_in_their_order(self, tmp_path):
        self.save(tmp_path / "test")
        spec = DataSpec(path=str(tmp_path), test="test")
        before = data_digest(spec)
        (tmp_path / "test" / "cache-123.arrow").write_bytes(b"a cache of map()")
        assert data_digest(spec) == before
        assert texts(tmp_path, "test") == ["0", "1", "2", "3"]
        state = json.loads((tmp_path / "test" / "state.json").read_text())
        state["_data_files"].reverse()
        (tmp_path / "test" / "state.json").write_text(json.dumps(state))
        assert texts(tmp_path, "test") == ["2", "3", "0", "1"]
        assert data_digest(spec) != before

    def test_a_missing_file_is_named(self, tmp_path):
        self.save(tmp_path / "test")
        next((tmp_path / "test").glob("*-00001-*.arrow")).unlink()
        with pytest.raises(BadInput, match="00001"):
            texts(tmp_path, "test")


def test_columns_may_have_another_order_in_another_file(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "test-0.parquet")
    pq.write_table(pa.table({"label": [1], "text": ["b"]}), tmp_path / "test-1.parquet")
    assert texts(tmp_path, "test") == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t.csv.zip", "of packed files, text tables in"),
        ("t.parquet.gz", "it is compressed inside"),
        ("t.xlsx", "not in a known format"),
    ],
)
def test_an_unknown_kind_of_file_is_refused_by_name(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BadInput, match=message):
        texts(tmp_path, name)


def test_a_column_that_is_missing_by_case_or_a_blank_is_suggested(tmp_path):
    (tmp_path / "t.csv").write_text("Text, label\na,0\n")
    with pytest.raises(BadInput, match="no column") as caught:
        texts(tmp_path, "t.csv")
    assert "'Text'" in str(caught.value.hint)
