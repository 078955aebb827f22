"""The model card of an export, from records alone."""

import yaml

from registry.history import Interval, TaskResult
from tasks.card import model_card
from tests.registry import builders


def front_matter(card: str) -> dict[str, object]:
    _, text, _ = card.split("---\n", 2)
    found: dict[str, object] = yaml.safe_load(text)
    return found


def test_a_base_from_the_hub_is_named_without_its_commit() -> None:
    head = builders.head()
    pinned = head.model_copy(
        update={"base": head.base.model_copy(update={"uri": f"openai/clip@{'a' * 40}"})}
    )
    record = builders.record()
    assert front_matter(model_card(pinned, record))["base_model"] == "openai/clip"
    assert "base_model" not in front_matter(model_card(head, record)), "a path means nothing"


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
    card = model_card(builders.head(), record)
    row = "| a | 0.4000 | 0.8000 | 0.7000 | 0.6000 | 0.7500 | 0.5000 to 0.7000 |"
    assert row in card
    assert "| b |  |  |  |  |  |  |" in card
    assert "retention 0.9000" in card
    assert record.recipe_digest in card
    assert record.members["a"].weights[:16] in card


def test_a_card_without_a_benchmark_or_members_stands() -> None:
    card = model_card(builders.head(), builders.record(tasks=(), results={}, retention=None))
    assert "no task" in card
    assert "retention" not in card
