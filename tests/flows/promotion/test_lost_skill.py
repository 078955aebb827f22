"""The sentence on a lost skill names the step that costs most, with its values and what to do."""

from typing import Any

import pytest

from restitch.flows.promotion.lost_skill import needed_tensors, why_little, why_not_joined
from restitch.registry.gates.gate import Drop
from restitch.registry.gates.max_task_drop import MaxTaskDrop
from restitch.registry.gates.min_normalized import MinNormalized
from restitch.registry.ledger.finetuned_models import Addition, Member, ModelFacts
from restitch.registry.ledger.measurements import ResultRef
from restitch.registry.ledger.records import TaskResult
from restitch.registry.specs.task import TaskSpec
from tests.registry import builders

SPEC = builders.line_spec(localize={"mode": "dataless", "density": 0.05})
ADDITION = Addition(include=("vision_model.*", "x"), value=0.8)


def member(localizable: float | None, **facts: Any) -> Member:
    known = {}
    if localizable is not None:
        low, high = localizable - 0.01, localizable + 0.01
        known["localizable"] = ResultRef(
            metric="accuracy",
            value=localizable,
            low=low,
            high=high,
            count=100,
            blob=builders.digest("result"),
        )
    model = builders.ready().model_copy(update={"facts": ModelFacts(results=known, **facts)})
    return Member(task="a", version=1, spec=TaskSpec(task="a"), model=model)


def result(grafted: float, merged: float, finetuned: float = 0.8, **more: Any) -> TaskResult:
    values = {"base": 0.1, "finetuned": finetuned, "grafted": grafted, "merged": merged}
    return TaskResult(**{**values, "normalized": merged / finetuned, **more})


def test_tensors_that_the_line_does_not_merge_are_named_with_the_measured_proposal() -> None:
    found = why_little(SPEC, member(0.4, addition=ADDITION), result(0.3, 0.25), ["b"])
    assert found == (
        "the merged model has accuracy 0.250, the finetuned model 0.800, mostly because some of"
        " the skill lies in tensors that the line does not merge: all weights that it can merge"
        " have 0.400;"
        ' with `localize: {include: ["vision_model.*", "x"]}` in the line file the accuracy of all'
        " weights that can be merged is 0.800"
    )


def test_a_mask_that_leaves_out_too_much_is_named_with_the_key_to_raise() -> None:
    found = why_little(SPEC, member(0.75), result(0.4, 0.35), ["b"])
    assert found is not None
    assert (
        "its mask leaves out too much: alone, on the base, it has 0.400, and all weights" in found
    )
    assert found.endswith("raise `density` under `localize` (now 0.05), or use `mode: distilled`")
    subspaces = builders.line_spec(localize={"mode": "subspace"})
    other = why_little(subspaces, member(0.75), result(0.4, 0.35), ["b"])
    assert other is not None
    assert "its subspace leaves out too much" in other
    assert other.endswith("raise `rank` under `localize` (now 0.0417)")


@pytest.mark.parametrize(
    ("others", "with_whom"), [(["b", "c"], "of merging it with b, c"), ([], "of merging it")]
)
def test_other_members_are_named_if_merging_costs_most(others: list[str], with_whom: str) -> None:
    found = why_little(SPEC, member(None), result(0.75, 0.3), others)
    assert found is not None
    assert f"mostly because {with_whom}: its mask alone, on the base, has 0.750" in found
    assert "`restitch compare line --tune`" in found
    assert "`restitch experts line`" in found


def test_a_metric_that_is_better_lower_has_its_costs_the_right_way_round() -> None:
    perplexity = {"metric": "perplexity", "base": 40.0, "normalized": 0.5}
    known = result(12.0, 20.0, 10.0, **perplexity)
    whole = member(None)
    found = why_little(SPEC, whole, known, ["b"])
    assert found is not None
    assert "the merged model has perplexity 20.000, the finetuned model 10.000" in found
    assert "merging it with b" in found


@pytest.mark.parametrize("normalized", [None, 0.9, 1.2])
def test_nothing_is_said_of_a_skill_that_is_kept_or_not_measured(normalized: float | None) -> None:
    assert why_little(SPEC, member(0.8), result(0.8, 0.75, normalized=normalized), []) is None


def test_the_proposal_alone_is_a_sentence_with_its_values() -> None:
    assert needed_tensors(ModelFacts()) is None
    found = needed_tensors(member(0.4, addition=ADDITION).model.facts)
    assert found is not None
    assert found.startswith("some of the skill lies in tensors that the line does not merge")
    assert "all weights that it can merge have 0.400" in found


def blocked(task: str) -> Any:
    return MaxTaskDrop().outcome(0.02, 0.3, task, task=task)


def test_a_member_that_costs_another_one_too_much_does_not_fit_with_it() -> None:
    results = {"a": result(0.7, 0.5), "b": result(0.7, 0.4), "c": result(0.7, 0.7)}
    drops = {
        "b": Drop(value=0.3, is_noise=False, against=1),
        "c": Drop(value=0.0, is_noise=True, against=1),
    }
    found = why_not_joined(SPEC, member(0.8), results, drops, [blocked("b")])
    assert found is not None
    assert found.startswith(
        "it does not fit with b, because their changes conflict: merged, b goes from 0.700 to"
        " 0.400, and a has 0.500, its mask alone 0.700, its finetuned model 0.800; `restitch"
    )


def test_a_member_with_too_little_skill_of_its_own_is_explained_by_its_steps() -> None:
    gate = MinNormalized().outcome(0.9, 0.3, "a", task="a")
    found = why_not_joined(SPEC, member(0.4), {"a": result(0.3, 0.25)}, {}, [gate])
    assert found is not None
    assert "tensors that the line does not merge" in found
    other = MinNormalized().outcome(0.9, 0.3, "b", task="b")
    assert why_not_joined(SPEC, member(0.4), {"a": result(0.3, 0.25)}, {}, [other]) is None
