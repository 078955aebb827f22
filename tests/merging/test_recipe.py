import json

import pytest

from restitch.merging.errors import Damage
from restitch.merging.recipe import Recipe, RecipeBase, RecipeMember, RecipeMethod


def recipe(*tasks: str, **settings: object) -> Recipe:
    return Recipe(
        base=RecipeBase(weights="w", config="c"),
        family="clip",
        method=RecipeMethod("localize-and-stitch", 1, settings or {"overlap": "mean"}),
        members=tuple(RecipeMember(task, f"model {task}", "mask", "delta") for task in tasks),
        code=1,
        other={"tokenizer": "t"},
    )


def test_a_recipe_survives_json() -> None:
    one = recipe("b", "a")
    assert Recipe.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_the_order_of_members_does_not_matter() -> None:
    assert recipe("b", "a", "B").digest() == recipe("a", "B", "b").digest()
    assert [member.task for member in recipe("b", "a", "B").members] == ["B", "a", "b"]


def test_everything_in_a_recipe_is_in_its_digest() -> None:
    assert len({recipe("a").digest(), recipe("a", "b").digest(), recipe("a", x=1).digest()}) == 3


def test_the_digest_never_changes() -> None:
    assert (
        recipe("a").digest() == "e84fc5f49942b2795590521d4715393994a0ec7421b89eea7c8e3040f38b4e2d"
    )


def test_a_task_is_in_a_recipe_once() -> None:
    with pytest.raises(ValueError):
        recipe("a", "a")


def test_anything_but_a_recipe_is_damage() -> None:
    good = recipe("a", "b").to_json()
    for bad in (
        {},
        {**good, "format": 2},
        {**good, "more": 1},
        {**good, "base": {"weights": "w"}},
        {**good, "members": list(reversed(good["members"]))},
        {**good, "members": None},
    ):
        with pytest.raises(Damage, match="recipe"):
            Recipe.from_json(bad)


def test_settings_that_json_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError):
        recipe("a", x=float("nan")).digest()
