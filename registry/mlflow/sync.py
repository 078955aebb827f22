"""The projection of the ledger to MLflow, which only this module and `writer` write.

`repair` completes from the ledger what is missing in MLflow. It may be killed at any point
and run again. An experiment tag, written last, records up to which act the projection is
complete, so that a repair with nothing to do costs a few queries. Credentials in an address
never reach a message.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from restitch.registry.home import Home
from restitch.registry.ledger import outcomes
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import Entry
from restitch.registry.mlflow import descriptions, merged_models, projection, projection_merged
from restitch.registry.mlflow.connection import connect, mlflow_explained
from restitch.registry.mlflow.writer import Writer, or_none, pages
from restitch.registry.store.disk import explained, locked

if TYPE_CHECKING:
    from mlflow import MlflowClient

_COMPLETE_TAG = "restitch.complete_to"
_PROJECTION_VERSION = "4"  # raised when projections change, so that all are written again

# Further artifacts of a merged version's run, by path.
Extras = Callable[[int], Mapping[str, bytes]]


class MlflowProjection:
    """The lines of a home in MLflow.

    MLflow is imported and connected at the first call. Every method raises `Unavailable` if
    MLflow cannot be used; the store does not depend on it.
    """

    def __init__(self, home: Home) -> None:
        self.home = home

    @cached_property
    def client(self) -> "MlflowClient":
        """MLflow's own client."""
        with mlflow_explained(self.home):
            return connect(self.home)

    @cached_property
    def _writer(self) -> Writer:
        return Writer(self.client, self.home)

    def repair(
        self,
        ledger: Ledger,
        *,
        full: bool = False,
        extras: Extras | None = None,
        models: merged_models.Models | None = None,
    ) -> int:
        """Complete the projection of a line from its ledger; returns how many acts it processed.

        Args:
            ledger: the line.
            full: process every act, not only those since the last complete repair.
            extras: makes artifacts for the run of a merged version, which replace existing
                ones; called for every version that a processed act is about.
            models: makes the MLflow models of merged versions.

        Raises:
            Unavailable: MLflow cannot be reached; the next repair completes the rest.
            Damage: the audit trail or a record is damaged.
        """
        with mlflow_explained(self.home), self._alone():
            line_state = ledger.state()  # under the lock: an older state would move aliases back
            audit = self._writer.experiment(line_state.line, "audit")
            done = None if full else _completed(self.client.get_experiment(audit).tags)
            registered = self._registered(line_state)
            if registered is None:
                done, registered = None, _NOTHING
            trail = ledger.entries()
            pending = _since(trail, line_state, done)
            for entry in reversed(pending):
                self._writer.write_run(audit, projection.project_act(entry))
            self._show_models(line_state, pending)
            self._show_merged(ledger, line_state, pending, trail, extras, models is not None)
            if models is not None:
                weights = registered.weights or frozenset()
                about = _versions_about(line_state, pending)
                weights = self._add_models(line_state, models, about, weights, again=full)
            for chart in projection_merged.CHARTS:
                self._show_chart(ledger, line_state, chart, done, pending, full=full)
            self._set_aliases(line_state, registered.aliases)
            if models is not None:
                self._remove_weights(line_state, models, weights)
            if pending:
                self._describe_models(line_state, pending)
                self._archive_line(line_state)
                self.client.set_experiment_tag(audit, _COMPLETE_TAG, _complete(line_state))
        return len(pending)

    def show_study(
        self,
        line: str,
        name: str,
        digest: str,
        by: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        artifacts: Mapping[str, bytes],
        parts: Iterable[projection.StudyPart] = (),
    ) -> str:
        """Write a study of a line, such as a comparison of methods, as a run; returns its id.

        Results of the same digest are written once. Params are any JSON values, and artifacts
        contents by path. Each part is a nested run.
        """
        with mlflow_explained(self.home), self._alone():
            experiment = self._writer.experiment(line, "studies")
            now = int(time.time() * 1000)
            study = projection.StudyPart(name, params, metrics)
            run = projection.project_study(study, digest, by, now, artifacts=artifacts)
            run_id = self._writer.write_run(experiment, run)
            for part in parts:
                below = f"{digest}.{part.name}"
                run = projection.project_study(part, below, by, now, parent=run_id)
                self._writer.write_run(experiment, run)
            return run_id

    def acts_shown(self, line: str) -> dict[str, str]:
        """The digests of a line's audit entries in MLflow, with the names of their runs."""
        with mlflow_explained(self.home):
            experiment = self._experiment(line, "audit")
            if experiment is None:
                return {}
            search = partial(self.client.search_runs, [experiment.experiment_id])
            return {
                run.data.tags[projection.DIGEST_TAG]: str(run.info.run_name)
                for run in pages(search)
                if projection.DIGEST_TAG in run.data.tags
            }

    def copy_of(self, line: str, digest: str) -> bytes | None:
        """The bytes of an act or of a version's record from MLflow; None if it has none.

        The caller must compare them with the digest.

        Raises:
            Unavailable: MLflow cannot be reached.
        """
        artifacts: dict[projection.Part, str] = {"audit": "audit.json", None: "record.json"}
        with mlflow_explained(self.home):
            for part, artifact in artifacts.items():
                experiment = self._experiment(line, part)
                if experiment is not None:
                    name = experiment.experiment_id
                    for run in self._writer.runs(name, digest, deleted=True):
                        data = self._artifact(run.info.run_id, artifact)
                        if data is not None:
                            return data
        return None

    def differences(self, ledger: Ledger) -> tuple[str, ...]:
        """The differences between MLflow and the ledger; none while MLflow is behind.

        Raises:
            Unavailable: MLflow cannot be reached.
        """
        with mlflow_explained(self.home):
            line_state = ledger.state()
            audit = self._experiment(line_state.line, "audit")
            if audit is None or _completed(audit.tags) != line_state.entry:
                return ()  # the next remerge completes it
            problems = []
            registered = self._registered(line_state)
            if registered is None:
                return (
                    f"the registered model {projection.model_name(line_state.line)} is missing",
                )
            for alias in ("champion", "candidate"):
                version = getattr(line_state, alias)
                shown = self._shown(line_state, registered.aliases.get(alias))
                if shown != version:
                    problems.append(
                        f"the alias {alias} is on {_version(shown)}, not {_version(version)}"
                    )
            problems += self._weights_differences(line_state, registered.weights)
            problems += [
                f"version {number} is missing"
                for number in sorted(line_state.versions)
                if not self._versions(line_state, number)
            ]
        shown_acts = self.acts_shown(line_state.line)
        missing = [entry for entry in ledger.entries() if entry.digest not in shown_acts]
        problems += [f"act {entry.sequence} ({entry.kind}) is missing" for entry in missing]
        return tuple(problems)

    def weights_shown(self, line_state: LineState) -> Iterator[tuple[int, Path]]:
        """The versions with their weights in MLflow, each with a folder of `WEIGHT_FOLDERS`.

        The folder is there until the next version is asked for.

        Raises:
            Unavailable: MLflow or its artifacts cannot be read.
        """
        with mlflow_explained(self.home):
            for number in sorted(merged_models.keeps_weights(line_state)):
                for shown in self._versions(line_state, number)[:1]:
                    place = merged_models.place_of(self.client, self.home, shown)
                    if set(merged_models.WEIGHT_FOLDERS) <= place.names():
                        with tempfile.TemporaryDirectory(dir=self.home.scratch) as scratch:
                            folders = merged_models.WEIGHT_FOLDERS
                            yield number, place.fetch(folders, Path(scratch))

    def _weights_differences(
        self, line_state: LineState, tagged: frozenset[int] | None
    ) -> Iterator[str]:
        """The weights that are missing in MLflow, and those that should not be there."""
        if tagged is None:
            return  # the next remerge writes the first ones
        wanted = merged_models.keeps_weights(line_state)
        for number in sorted(tagged | wanted):
            for shown in self._versions(line_state, number)[:1]:
                names = merged_models.place_of(self.client, self.home, shown).names()
                there = set(merged_models.WEIGHT_FOLDERS) <= names
                if number in wanted and merged_models.MODEL_FILE not in names:
                    yield f"version {number} is no MLflow model"
                elif number in wanted and not there:
                    yield f"the weights of version {number} are missing"
                elif number not in wanted and there:
                    yield f"the weights of version {number} are still there"

    def _shown(self, line_state: LineState, number: int | None) -> int | None:
        """The merged version that a version in MLflow shows; -1 if it shows none."""
        if number is None:
            return None
        shown = self.client.get_model_version(projection.model_name(line_state.line), str(number))
        for version, record in line_state.versions.items():
            if shown.tags.get(projection.DIGEST_TAG) == record:
                return version
        return -1

    def _experiment(self, line: str, part: projection.Part) -> Any:
        """The experiment of a part of a line; None if it does not exist."""
        return self.client.get_experiment_by_name(projection.experiment_name(line, part))

    def _versions(self, line_state: LineState, number: int) -> list[Any]:
        """The versions in MLflow that show a merged version."""
        identity = projection.identity(line_state.versions[number], number)
        return self._writer.versions(projection.model_name(line_state.line), identity)

    def _artifact(self, run: str, name: str) -> bytes | None:
        """The content of a run's artifact; None if it cannot be read."""
        from mlflow.exceptions import MlflowException

        self.home.scratch.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=self.home.scratch) as folder,
            contextlib.suppress(MlflowException, OSError),
        ):
            return Path(self.client.download_artifacts(run, name, folder)).read_bytes()
        return None

    def _show_models(self, line_state: LineState, pending: Sequence[Entry]) -> None:
        """Write the finetuned models that acts are about, in their present state."""
        models = dict(line_state.models)
        touched = {key for entry in pending for key in outcomes.touched_models(entry)}
        if any("/dropped" in entry.before for entry in pending):
            # The line started again: with its experiment, MLflow restores forgotten models.
            touched |= models.keys()
        for key in sorted(touched & models.keys()):
            run, shown = projection.project_model(
                line_state.line, key.task, key.version, models[key], line_state.base.weights
            )
            experiment = self._writer.experiment(line_state.line, "models")
            archived = models[key].state == "forgotten"
            run_id = self._writer.write_run(experiment, run, archived=archived)
            self._writer.write_version(shown, run_id)
        for task in sorted({key.task for key in touched}):
            name, known = projection.model_name(line_state.line, task), line_state.tasks[task]
            self._writer.archive_model(name, archived=known.forgotten)

    def _show_merged(
        self,
        ledger: Ledger,
        line_state: LineState,
        pending: list[Entry],
        older: Iterable[Entry],
        extras: Extras | None,
        as_models: bool,
    ) -> None:
        """Write the merged versions that acts are about, with their outcomes.

        With `as_models`, new versions have their source where their MLflow models will lie.
        """
        about = _versions_about(line_state, pending)
        moves = outcomes.last_moves(chain(pending, older), about)
        for version in sorted(moves):
            record, read = ledger.merged(version), ledger.objects.read_blob
            files = {name: read(blob) for name, blob in record.files.items()}
            purge = line_state.purged.get(version)
            outcome = outcomes.outcome_of(record, moves[version], purge)
            run, shown = projection_merged.project_merged(record, files, outcome, purge)
            experiment = self._writer.experiment(line_state.line)
            run_id = self._writer.write_run(experiment, run)
            source = None
            if as_models:
                source = merged_models.source_of(self.home, line_state.line, version, run_id)
            self._writer.write_version(shown, run_id, source)
            if extras is not None:
                self._writer.write_artifacts(run_id, extras(version))

    def _show_chart(
        self,
        ledger: Ledger,
        line_state: LineState,
        chart: projection_merged.Chart,
        done: str | None,
        pending: list[Entry],
        *,
        full: bool,
    ) -> None:
        """Write a run with metrics over versions; its own tag says how far it is."""
        experiment = self._writer.experiment(line_state.line, "history")
        digest = projection_merged.chart_digest(line_state.line, chart)
        runs = self._writer.runs(experiment, digest)
        complete = _completed(runs[0].data.tags) if len(runs) == 1 and not full else None
        if complete != done:  # it was deleted, or a repair was killed
            pending = _since(ledger.entries(), line_state, complete)
        if not pending:
            return
        run = projection_merged.project_chart(line_state.line, chart, pending[-1].time)
        run_id = self._writer.write_run(experiment, run)
        points = [
            point
            for entry in reversed(pending)
            for point in projection_merged.points_of(
                entry, chart, [ledger.merged(v) for v in projection_merged.charted(entry, chart)]
            )
        ]
        self._writer.write_points(run_id, points)
        self.client.set_tag(run_id, _COMPLETE_TAG, _complete(line_state))

    def _describe_models(self, line_state: LineState, pending: Iterable[Entry]) -> None:
        """Describe the line's registered model, and those of the tasks that acts are about."""
        tasks = {key.task for entry in pending for key in outcomes.touched_models(entry)}
        for task in (None, *sorted(tasks)):
            description = descriptions.of_model(line_state, task, self.home.store_name)
            self._writer.describe_model(projection.model_name(line_state.line, task), description)

    def _archive_line(self, line_state: LineState) -> None:
        """Archive the merged models of a line that was dropped; its acts stay in sight."""
        line, dropped = line_state.line, line_state.dropped is not None
        self._writer.archive_model(projection.model_name(line), archived=dropped)
        if dropped:
            parts: tuple[projection.Part, ...] = (None, "models", "history", "studies")
            for part in parts:
                self._writer.archive_experiment(projection.experiment_name(line, part))

    def _registered(self, line_state: LineState) -> "_Registered | None":
        """What the line's model has in MLflow; None if it has versions and is missing."""
        if not line_state.versions:
            return _NOTHING
        name = projection.model_name(line_state.line)
        model = or_none(self.client.get_registered_model, name)
        if model is None:
            return None
        self._writer.models.add(model.name)
        aliases = {alias: int(version) for alias, version in model.aliases.items()}
        return _Registered(aliases, merged_models.tagged(model.tags))

    def _add_models(
        self,
        line_state: LineState,
        models: merged_models.Models,
        about: frozenset[int],
        present: frozenset[int],
        *,
        again: bool,
    ) -> frozenset[int]:
        """Write the MLflow models of versions, and the weights that are missing.

        Args:
            line_state: the line.
            models: makes the files.
            about: the versions to write.
            present: the versions whose weights are there.
            again: write weights although they are there.

        Returns:
            The versions whose weights are there now.
        """
        made = merged_models.MergedModels(self.client, self.home, line_state, models)
        wanted = merged_models.keeps_weights(line_state)
        missing = wanted if again else wanted - present
        for version in sorted(about | missing):
            for shown in self._versions(line_state, version)[:1]:
                if version not in missing:
                    made.write(shown, version, weights=version in present)
                elif made.add(shown, version):
                    present |= {version}
                    merged_models.tag_model(self.client, line_state.line, present)
                else:
                    made.write(shown, version, weights=False)
                    present -= {version}
        return present

    def _remove_weights(
        self, line_state: LineState, models: merged_models.Models, present: frozenset[int]
    ) -> None:
        """Remove the weights of versions that do not keep them any more."""
        made = merged_models.MergedModels(self.client, self.home, line_state, models)
        for version in sorted(present - merged_models.keeps_weights(line_state)):
            if all(made.remove(shown, version) for shown in self._versions(line_state, version)):
                present -= {version}
                merged_models.tag_model(self.client, line_state.line, present)

    def _set_aliases(self, line_state: LineState, present: Mapping[str, int]) -> None:
        name = projection.model_name(line_state.line)
        for alias in ("champion", "candidate"):
            version = getattr(line_state, alias)
            if version is None:
                if alias in present:
                    self.client.delete_registered_model_alias(name, alias)
                continue
            versions = self._versions(line_state, version)
            if versions and int(versions[0].version) != present.get(alias):
                self.client.set_registered_model_alias(name, alias, str(versions[0].version))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one worker of this host at a time search and create."""
        path = self.home.root / "mlflow.lock"
        with explained(path, "write"):
            self.home.root.mkdir(parents=True, exist_ok=True)
            path.touch()
        with locked(path):
            yield


@dataclass(frozen=True)
class _Registered:
    """What MLflow has of a line's registered model.

    Attributes:
        aliases: MLflow's numbers of versions.
        weights: the merged versions that have their weights in MLflow; None if none ever had.
    """

    aliases: Mapping[str, int]
    weights: frozenset[int] | None


_NOTHING = _Registered({}, None)


def _versions_about(line_state: LineState, acts: Iterable[Entry]) -> frozenset[int]:
    """The merged versions that acts are about."""
    about = frozenset(version for entry in acts for version in outcomes.merges_about(entry))
    return about & line_state.versions.keys()


def _completed(tags: Mapping[str, str]) -> str | None:
    """The act up to which a projection is complete, from its tags."""
    version, _, entry = tags.get(_COMPLETE_TAG, "").partition(":")
    return entry if version == _PROJECTION_VERSION else None


def _version(number: int | None) -> str:
    return "nothing" if number is None else "something else" if number < 0 else f"version {number}"


def _complete(line_state: LineState) -> str:
    return f"{_PROJECTION_VERSION}:{line_state.entry}"


def _since(
    newest_first: Iterator[Entry], line_state: LineState, complete_to: str | None
) -> list[Entry]:
    """The acts after the last complete one; the rest stays in the iterator."""
    if line_state.entry == complete_to:
        return []
    pending = []
    for entry in newest_first:
        pending.append(entry)
        if entry.previous is not None and entry.previous == complete_to:
            break
    return pending
