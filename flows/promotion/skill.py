"""The rule that a finetuned model must show its skill on its own task.

A model that is significantly worse than the base is held, unless a person has accepted it. A
model that is not significantly better joins with a warning. If a task gets another description,
a member of the champion that has shown its skill before stays: the change may be a mistake.
"""

from dataclasses import dataclass

from restitch.registry.ledger.finetuned_models import NO_GAIN, ModelFacts, ModelKey, State
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.measurements import compared, decisions, unexpected
from restitch.tasks.gain import why_held
from restitch.tasks.runtime.refs import LineRef


@dataclass(frozen=True)
class Judgement:
    """The state of a model after it was measured.

    Attributes:
        facts: the facts that decided.
        reason: the reason for the state.
        summary: the reason in one sentence, if the judgement holds the model.
        warnings: what a reader of the log must know.
    """

    facts: ModelFacts
    state: State
    reason: str | None = None
    summary: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """True if the model is held because it shows no skill."""
        return bool(self.summary)


def judge(
    ledger: Ledger,
    line: LineRef,
    line_state: LineState,
    key: ModelKey,
    facts: ModelFacts,
) -> Judgement:
    """Decide the state of a model.

    Args:
        ledger: of the line.
        line: the line with which the model was measured.
        line_state: the present state, with the model's earlier facts.
        key: the model.
        facts: its facts after the measurement.
    """
    model = line_state.model(key)
    warnings = _warnings(key, facts)
    if facts.lacks_gain:
        why = why_held(line, line_state.tasks[key.task].spec, facts)
        if not _has_shown_its_skill(ledger, line_state, key):
            held = f"{key.task} version {key.version} is held: {why.summary}"
            summary = f"{key}: {why.summary}"
            return Judgement(facts, "held", why.message(), summary, (held, *warnings))
        stays = (
            f"{key} is {why.summary}; it stays merged, because it was better with the description"
            " before"
        )
        return Judgement(facts, "ready", warnings=(stays, *warnings))
    if model.state == "registered" or (model.state == "held" and model.facts.lacks_gain):
        return Judgement(facts, "ready", warnings=warnings)
    return Judgement(facts, model.state, model.reason, warnings=warnings)


def _has_shown_its_skill(ledger: Ledger, line_state: LineState, key: ModelKey) -> bool:
    model = line_state.model(key)
    gain = model.facts.gain
    if model.state != "ready" or gain is None or gain.verdict == "not better":
        return False
    return is_in_champion(ledger, line_state, key)


def is_in_champion(ledger: Ledger, line_state: LineState, key: ModelKey) -> bool:
    """True if the version in use holds a model."""
    if line_state.champion is None:
        return False
    member = ledger.merged(line_state.champion).members.get(key.task)
    return member is not None and member.version == key.version


def _warnings(key: ModelKey, facts: ModelFacts) -> tuple[str, ...]:
    warnings, finetuned = [], facts.results.get("finetuned")
    if facts.gain is not None and facts.gain.verdict != "better":
        values = compared(facts.gain, facts.results)
        if NO_GAIN in facts.accepted:
            warnings.append(f"{key}: {values}; {decisions(facts.accepted)}")
        elif facts.gain.verdict == "not better":
            warnings.append(f"{key} is {facts.gain.against_base} on its own task: {values}")
    if (contradiction := unexpected(facts.expected, finetuned)) is not None:
        warnings.append(f"{key}: {contradiction}")
    return tuple(warnings)
