"""A merged version is a pure function of its recipe: DESIGN's promises, byte for byte."""

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from restitch.merging.digests import digest_file
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.export import export_weights
from restitch.merging.files.sparse import SparseFile
from restitch.merging.methods.registry import get_method
from restitch.merging.recipe import Recipe, RecipeBase, RecipeMember, RecipeMethod
from restitch.merging.rules.stitch import DeltaMember, sparse_delta, stitch, write_patch
from tests import tiny

TASKS = ("a", "B", "b2", "é", "z")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, dict[str, DeltaMember]]:
    folder = tmp_path_factory.mktemp("world")
    base = tiny.save(folder / "base", tiny.base_tensors())
    return base, {task: tiny.member(folder, base, task, i) for i, task in enumerate(TASKS)}


World = tuple[Checkpoint, dict[str, DeltaMember]]
quick = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def patch_bytes(folder: Path, base: Checkpoint, members: list[DeltaMember]) -> bytes:
    write_patch(folder / "patch", base, stitch(base, members), {})
    return (folder / "patch").read_bytes()


@quick
@given(tasks=st.lists(st.sampled_from(TASKS), unique=True), seed=st.integers(0, 99))
def test_the_order_of_registration_does_not_matter(
    world: World, tmp_path: Path, tasks: list[str], seed: int
) -> None:
    base, members = world
    chosen = [members[task] for task in tasks]
    shuffled = random.Random(seed).sample(chosen, len(chosen))
    assert patch_bytes(tmp_path, base, chosen) == patch_bytes(tmp_path, base, shuffled)


@quick
@given(tasks=st.permutations(TASKS))
def test_restitching_incrementally_equals_restitching_from_nothing(
    world: World, tmp_path: Path, tasks: list[str]
) -> None:
    base, members = world
    joined: list[DeltaMember] = []
    for task in tasks:
        joined.append(members[task])
        incremental = patch_bytes(tmp_path, base, joined)
    # From nothing: other processes open the files anew.
    fresh = [DeltaMember(task, SparseFile.open(members[task].delta.path)) for task in sorted(TASKS)]
    again = Checkpoint.open(base.path)
    assert patch_bytes(tmp_path, again, fresh) == incremental


@quick
@given(joined=st.lists(st.sampled_from(TASKS), unique=True, min_size=1), data=st.data())
def test_a_retired_member_leaves_no_trace(
    world: World, tmp_path: Path, joined: list[str], data: st.DataObject
) -> None:
    base, members = world
    retired = data.draw(st.sampled_from(joined))
    patch_bytes(tmp_path, base, [members[task] for task in joined])
    left = patch_bytes(tmp_path, base, [members[task] for task in joined if task != retired])
    never = [members[task] for task in sorted(set(joined) - {retired})]
    assert left == patch_bytes(tmp_path, base, never)


@quick
@given(tasks=st.lists(st.sampled_from(TASKS), unique=True, min_size=1))
def test_an_auditor_rebuilds_a_version_from_its_recipe(
    world: World, tmp_path: Path, tasks: list[str]
) -> None:
    base, members = world
    chosen = [members[task] for task in tasks]
    recipe = Recipe(
        base=RecipeBase(base.digest(), "config"),
        family="text-encoder",
        method=RecipeMethod("localize-and-stitch", 1, {"overlap": "mean"}),
        members=tuple(
            RecipeMember(
                m.task, "model", sparse_delta(m).mask().digest(), digest_file(m.delta.path)
            )
            for m in chosen
        ),
        code=1,
    )
    stored, published = recipe.to_json(), patch_bytes(tmp_path, base, chosen)

    read = Recipe.from_json(stored)
    by_digest = {digest_file(m.delta.path): m.delta.path for m in members.values()}
    parts = [DeltaMember(m.task, SparseFile.open(by_digest[m.delta])) for m in read.members]
    method = get_method(read.method.name)
    write_patch(tmp_path / "rebuilt", base, method(base, parts, **read.method.settings), {})
    assert (tmp_path / "rebuilt").read_bytes() == published


@quick
@given(tasks=st.lists(st.sampled_from(TASKS), unique=True))
def test_the_patch_and_the_members_export_the_same_model(
    world: World, tmp_path: Path, tasks: list[str]
) -> None:
    base, members = world
    edits = stitch(base, [members[task] for task in tasks])
    write_patch(tmp_path / "patch", base, edits, {})
    digests = set()
    for index, source in enumerate((edits, SparseFile.open(tmp_path / "patch"))):
        out = tmp_path / f"out{index}"
        out.mkdir(exist_ok=True)
        export_weights(base, source, out)
        digests.add(Checkpoint.open(out).digest())
    assert len(digests) == 1
