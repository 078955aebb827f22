"""Onboard one finetuned model: validate, localize, evaluate, and make it a member.

    registered --> validate --> localize --> measure statistics --> evaluate --> act `localized`
    worse than the base on its own task ---------------------------------------> act `held`
    cannot join ---------------------------------------------------------------> act `quarantined`

`onboard` can be killed at any point and run again: each step first looks for its result in the
store, and the act counts once, because it starts from the state `registered`. If the line's
settings for masks change, its members are localized again. If a task's description changes, its
newest model is measured again. A model is quarantined after three processes have died while
onboarding it.

Four evaluations judge a mask: the base, the finetuned model, the base with every localizable
weight replaced, and the base with only the masked weights replaced. If more than 10 % of the
squared change lies outside of the localizable tensors, `onboard` warns and names them. If they hold
a part of the skill, it proposes a choice of tensors for the line, and measures it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from restitch.flows.audit.report import mirror
from restitch.flows.lines.adopt_mlflow import adopt_one
from restitch.flows.outcome import Outcome
from restitch.flows.promotion.lost_skill import as_key, proposed
from restitch.flows.promotion.masks import mask_choice, needs_new_mask
from restitch.flows.promotion.skill import Judgement, is_in_champion, judge
from restitch.merging.errors import BadInput, CannotJoin, RestitchError, shortlist
from restitch.registry.ledger.finetuned_models import (
    PREPROCESSING,
    Addition,
    Member,
    ModelFacts,
    ModelKey,
    ModelVersion,
)
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.measurements import compared, keeps_subspace
from restitch.registry.ledger.records import Kind
from restitch.registry.ledger.references import STATISTIC
from restitch.registry.specs.task import TaskSpec
from restitch.registry.store.attempts import Attempt, Attempts
from restitch.tasks.evaluate import evaluate
from restitch.tasks.gain import gain_over_base
from restitch.tasks.inputs.live_base import check_device
from restitch.tasks.inputs.task_data import description_digest, evaluation_split
from restitch.tasks.localize import localize
from restitch.tasks.runtime.console import say, warn
from restitch.tasks.runtime.crash_recovery import MAX_CRASHES
from restitch.tasks.runtime.engine import engine_url, flow
from restitch.tasks.runtime.events import (
    MASK_READY,
    announce,
    is_workers_run,
    mark_crashed,
    run_ended,
    this_run,
)
from restitch.tasks.runtime.notify import notify
from restitch.tasks.runtime.prefect_artifacts import show_onboarded
from restitch.tasks.runtime.refs import (
    DeltaRef,
    LineRef,
    ResultRef,
    StatisticRef,
    Validated,
    WeightsRef,
)
from restitch.tasks.runtime.workspace import actor, workspace
from restitch.tasks.statistics import own_statistics
from restitch.tasks.validate import validate

# Warn above this share of the squared change outside of the localizable tensors.
OUTSIDE_WARNING = 0.1

# The facts that do not come from localizing and measuring.
_KEPT = ("registered_again", "held_in", "expected", "accepted")


@dataclass(frozen=True)
class OnboardOutcome(Outcome):
    """The result of onboarding.

    Attributes:
        state: the state of the model: ready, held, quarantined, ...
        localized: whether this run localized it.
    """

    line: str
    task: str
    version: int
    state: str
    reason: str | None
    localized: bool
    facts: ModelFacts


@flow("onboard", "{line}/{task}/{version}")
def onboard(line: str, task: str, version: int) -> OnboardOutcome:
    """Make one registered model a member of its line, or quarantine it with the reason.

    Raises:
        BadInput: there is no such model.
        RestitchError: its data or a server is unavailable; it stays registered.
    """
    ledger = workspace().ledger(line)
    line_state = ledger.state()
    key = ModelKey(task, version)
    model = _registered(line_state, key)
    if model.state != "registered" and not is_outdated(line_state, key):
        return _done(ledger, key, localized=False)
    if line_state.is_paused:
        say(f"line {line} is paused {line_state.paused}; {key} is localized once it is resumed")
        return _done(ledger, key, localized=False)
    check_device(line_state.spec)
    attempts = attempts_at(ledger, key)
    died = died_at(attempts)
    if len(died) >= MAX_CRASHES and model.state == "registered":
        _quarantine(ledger, key, _killed_workers(key, died), deaths=len(died))
        return _done(ledger, key, localized=False)
    with attempts.attempt(this_run()) as own:
        if is_workers_run() and _others_at_work(attempts, own):
            say(f"another run already onboards {task} version {version}")
            return _done(ledger, key, localized=False)
        return _onboard(ledger, line_state, key)


def onboard_event(
    line: str, task: str, version: int | None, mlflow_version: int | None
) -> OnboardOutcome | None:
    """Onboard the model that an event names; adopt it first if it was registered in MLflow.

    Returns:
        The outcome; None if the model waits for its task's description, or its line was dropped.
    """
    dropped = workspace().ledger(line, dropped=True).state().dropped
    if dropped is not None:
        say(f"line {line} was dropped {dropped}: the event is ignored")
        return None
    if version is None and mlflow_version is not None:
        version = adopt_one(line, task, mlflow_version)
    if version is None:
        return None
    outcome: OnboardOutcome = onboard.body(line, task, version)
    return outcome


def _onboard(ledger: Ledger, line_state: LineState, key: ModelKey) -> OnboardOutcome:
    ref, spec = LineRef(line_state.spec, line_state.base), line_state.tasks[key.task].spec
    model = line_state.model(key)
    if model.state != "registered" and not needs_new_mask(line_state, model):
        _measure_again(ledger, ref, spec, key, model)
        return _done(ledger, key, localized=False)
    try:
        accept = PREPROCESSING in model.facts.accepted
        checked = validate(ref, spec, model.model, accept_preprocessing=accept)
        delta = localize(ref, spec, model.model)
    except CannotJoin as error:
        if model.state == "registered":
            _quarantine(ledger, key, error)
        else:
            warn(f"{key.task} version {key.version} keeps its old mask: {error.message()}")
        return _done(ledger, key, localized=False)
    localized = model.model_copy(update={"mask": delta.mask, "delta": delta.blob})
    member = Member(task=key.task, version=key.version, spec=spec, model=localized)
    # Measured now, because a later merge may run where the task's rows cannot be read.
    statistics = own_statistics(ref, member)
    facts = _measure(ref, spec, model, checked, delta, statistics)
    _join(ledger, ref, key, delta, facts, statistics)
    return _done(ledger, key, localized=True)


def attempts_at(ledger: Ledger, key: ModelKey) -> Attempts:
    """The attempts at onboarding a model since its last registration."""
    model = ledger.state().model(key)
    again = model.facts.registered_again
    return Attempts(ledger.objects.store, "onboard", ledger.line, *key, again)


def died_at(attempts: Attempts) -> list[Attempt]:
    """The attempts whose process died; mark their runs as crashed."""
    died = [attempt for attempt in attempts.unfinished() if not attempt.is_alive(_run_ended)]
    for attempt in died:
        if attempt.run is not None and engine_url() is not None:
            mark_crashed(attempt.run, f"process {attempt.facts['pid']} died")
    return died


def _others_at_work(attempts: Attempts, own: Attempt) -> bool:
    # Of several attempts that began together, the first one continues.
    return any(
        other.number < own.number and other.is_alive(_run_ended) for other in attempts.unfinished()
    )


def _run_ended(run: str) -> bool:
    return engine_url() is not None and run_ended(run)


def _killed_workers(key: ModelKey, died: list[Attempt]) -> CannotJoin:
    return CannotJoin(
        f"{len(died)} processes died while they onboarded {key.task} version {key.version}",
        expected=f"fewer than {MAX_CRASHES} deaths",
        found="; ".join(map(str, died)),
        hint="find the cause (often memory; see the worker's log), then register the model again",
    )


def is_outdated(line_state: LineState, key: ModelKey) -> bool:
    """True if a localized model needs another mask or other measurements.

    The line's settings for masks have changed since it was localized, or the description of its
    task since it was measured.
    """
    model = line_state.model(key)
    return needs_new_mask(line_state, model) or _has_outdated_results(line_state, key)


def _has_outdated_results(line_state: LineState, key: ModelKey) -> bool:
    model, spec = line_state.model(key), line_state.tasks[key.task].spec
    # A task that has no rows any more cannot tell more than the results that are known.
    if model.state not in ("ready", "held") or evaluation_split(spec) is None:
        return False
    return model.facts.measured_on not in (None, description_digest(spec))


def _registered(line_state: LineState, key: ModelKey) -> ModelVersion:
    known = line_state.tasks[key.task].versions if key.task in line_state.tasks else {}
    if key.version not in known:
        models = ", ".join(
            f"{name} {n}" for name, t in line_state.tasks.items() for n in t.versions
        )
        raise BadInput(
            f"line {line_state.line} has no model {key}",
            expected="a registered model, as TASK VERSION",
            found=f"the line has {models or 'no models'}",
            hint="register the model first with `restitch register`",
        )
    return known[key.version]


def _measure(
    line: LineRef,
    spec: TaskSpec,
    model: ModelVersion,
    checked: Validated,
    delta: DeltaRef,
    statistics: Mapping[str, StatisticRef],
) -> ModelFacts:
    """Collect the facts that the line stores, with accuracies if the task has data."""
    measured = _results(line, spec, model, delta.blob)
    addition = _addition(line, spec, model, checked.include, measured["results"])
    _warn_of_outside(spec.task, checked, measured["results"], addition)
    if statistics:
        seconds = sum(each.recorded_seconds or 0.0 for each in statistics.values())
        measured |= {
            "statistics": {kind: each.blob for kind, each in statistics.items()},
            "statistics_bytes": sum(each.size for each in statistics.values()),
            "statistics_seconds": round(seconds, 3),
        }
    return ModelFacts(
        kept=delta.kept,
        coordinates=delta.coordinates,
        density=delta.density,
        delta_bytes=delta.size,
        localizer=delta.localizer,
        seconds=delta.seconds,
        localized_by=delta.made_by,
        choice=mask_choice(line.spec),
        outside_share=checked.outside_share,
        outside_tensors=checked.outside_tensors,
        addition=addition,
        unused=checked.unused,
        from_base=checked.from_base,
        notes=checked.notes,
        **delta.facts,
        **measured,
    )


def _results(line: LineRef, spec: TaskSpec, model: ModelVersion, delta: str) -> dict[str, Any]:
    """The facts that depend on the task's description: evaluations, and the gain over the base."""
    measured: dict[str, Any] = {"measured_on": description_digest(spec), "results": {}}
    if evaluation_split(spec) is None:
        return measured
    weights = {
        "base": WeightsRef("base"),
        "finetuned": WeightsRef("finetuned", model.model.weights, model.model.uri),
        "localizable": WeightsRef("localizable", model.model.weights, model.model.uri),
        "grafted": WeightsRef("grafted", delta),
    }
    results = {name: evaluate(line, spec, each, model.model) for name, each in weights.items()}
    gain = gain_over_base(workspace().objects, results["base"], results["finetuned"])
    return measured | {"results": results, "gain": gain}


def _addition(
    line: LineRef,
    spec: TaskSpec,
    model: ModelVersion,
    include: Sequence[str],
    results: Mapping[str, ResultRef],
) -> Addition | None:
    """The tensors that the line should merge, too; None if they hold no part of the skill.

    Args:
        line: the line.
        spec: the model's task.
        model: the finetuned model.
        include: globs that add all tensors that finetuning changed.
        results: the evaluations of the model.
    """
    if not results or not include or not _lacks_skill(results):
        return None
    choice = line.spec.localize
    wider = choice.model_copy(update={"include": tuple(dict.fromkeys((*choice.include, *include)))})
    of_wider = LineRef(line.spec.model_copy(update={"localize": wider}), line.base)
    weights = WeightsRef("localizable", model.model.weights, model.model.uri)
    found = evaluate(of_wider, spec, weights, model.model)
    now = results["localizable"].value
    if not found.measure.is_better(found.value - now):
        return None
    return Addition(include=wider.include, value=found.value)


def _lacks_skill(results: Mapping[str, ResultRef]) -> bool:
    """True if all localizable weights of a finetuned model do not have its value."""
    return _differs(results["localizable"], results["finetuned"])


def _warn_of_outside(
    task: str, checked: Validated, results: Mapping[str, ResultRef], addition: Addition | None
) -> None:
    """Warn if a considerable part of what finetuning changed is in tensors that are not merged."""
    matters = bool(results) and _lacks_skill(results)
    if checked.outside_share <= OUTSIDE_WARNING and not matters:
        return
    names = shortlist([name for name, _ in checked.outside_tensors])
    text = (
        f"{task}: {checked.outside_share:.1%} of what finetuning changed is outside of the"
        f" localizable tensors (in {names or 'no tensor'})"
    )
    if results:
        text += (
            f"; with every localizable weight the {results['finetuned'].metric} is"
            f" {results['localizable'].value:.3f}, not {results['finetuned'].value:.3f}"
        )
    if addition is not None:
        text += f"; {proposed(addition, results['finetuned'].metric)}"
    elif checked.include and not matters:
        text += f"; {as_key(checked.include)} in the line file would add them"
    warn(text)


def _differs(one: ResultRef, other: ResultRef) -> bool:
    """True if a value lies outside of another one's interval, whose ends are rounded."""
    return not other.low - 1e-9 <= one.value <= other.high + 1e-9


def _quarantine(ledger: Ledger, key: ModelKey, error: RestitchError, deaths: int = 0) -> None:
    def change(line_state: LineState) -> LineState | None:
        model = line_state.model(key)
        if model.state != "registered":
            return None
        facts = model.facts.model_copy(update={"deaths": deaths})
        return line_state.with_state(*key, "quarantined", error.message(), facts=facts)

    act = ledger.act("quarantined", actor(), f"{key}: {error.summary}", change)
    if act is not None:
        warn(f"{key.task} version {key.version} is quarantined: {error.summary}")
        notify(act, {"crashes": f"{deaths} processes died at it."} if deaths else None)
        mirror(ledger.line)


def _join(
    ledger: Ledger,
    line: LineRef,
    key: ModelKey,
    delta: DeltaRef,
    facts: ModelFacts,
    statistics: Mapping[str, StatisticRef],
) -> None:
    def join(line_state: LineState) -> Judgement | None:
        model = line_state.model(key)
        if model.state != "registered" and not needs_new_mask(line_state, model):
            return None
        kept = {name: getattr(model.facts, name) for name in _KEPT}
        known = facts.model_copy(update=kept)
        return judge(ledger, line, line_state, key, known)

    of = "numbers for" if keeps_subspace(delta.localizer) else "of"
    reason = f"{key}: {delta.kept} {of} {delta.coordinates} coordinates"
    digests = {"mask": delta.mask, "delta": delta.blob}
    digests |= {f"{STATISTIC}{kind}": each.blob for kind, each in statistics.items()}
    changes = {"mask": delta.mask, "delta": delta.blob}
    if _acted(ledger, key, join, "localized", reason, changes, digests):
        say(f"localized {reason}, {delta.size} bytes")
        if facts.gain is None:
            say(f"{key}: the gain over the base is not measured, because the task has no rows")


def _measure_again(
    ledger: Ledger, line: LineRef, spec: TaskSpec, key: ModelKey, model: ModelVersion
) -> None:
    """Compare a model with the base on its task as it is described now."""
    measured = _results(line, spec, model, str(model.delta))
    known = model.facts.addition
    include = () if known is None else known.include
    measured["addition"] = _addition(line, spec, model, include, measured["results"])

    def measure(line_state: LineState) -> Judgement | None:
        if not _has_outdated_results(line_state, key):
            return None
        known = line_state.model(key).facts.model_copy(update=measured)
        return judge(ledger, line, line_state, key, known)

    reason = f"{key}: {compared(measured['gain'], measured['results'])}"
    _acted(ledger, key, measure, "measured", reason, {}, {})


def _acted(
    ledger: Ledger,
    key: ModelKey,
    decide: Callable[[LineState], Judgement | None],
    kind: Kind,
    reason: str,
    changes: dict[str, Any],
    digests: dict[str, str],
) -> bool:
    """Store a model's facts, and its state after a judgement on them, by one act.

    Args:
        ledger: of the line.
        key: the model.
        decide: judges a state of the line; None if there is nothing to do.
        kind: the kind of the act, unless the judgement holds the model.
        reason: the reason of the act, likewise.
        changes: further changes of the model.
        digests: the objects that the act is about.
    """
    line_state = ledger.state()
    judgement = decide(line_state)
    if judgement is None:
        return False
    if judgement.holds and line_state.model(key).state != "held":
        kind, reason = "held", judgement.summary

    def change(line_state: LineState) -> LineState | None:
        now = decide(line_state)
        # A person has just accepted the model: the next remerge onboards it.
        if now is None or now.holds != judgement.holds:
            return None
        new = {**changes, "facts": now.facts}
        return line_state.with_state(*key, now.state, now.reason, **new)

    act = ledger.act(kind, actor(), reason, change, digests)
    if act is None:
        return False
    for message in judgement.warnings:
        warn(message)
    notify(act)
    mirror(ledger.line)
    return True


def _done(ledger: Ledger, key: ModelKey, *, localized: bool) -> OnboardOutcome:
    """Read the model's state, and announce a mask that is not in the champion yet."""
    line_state = ledger.state()
    model = line_state.model(key)
    if this_run() is not None and model.state in ("ready", "held") and not line_state.is_paused:
        inside = is_in_champion(ledger, line_state, key)
        joins = model.state == "ready" or not model.facts.lacks_gain
        if joins != inside or (joins and localized):
            announce(MASK_READY, ledger.line, *key)
    outcome = OnboardOutcome(
        line_state.line, *key, model.state, model.reason, localized, model.facts
    )
    show_onboarded(outcome.as_dict())
    return outcome
