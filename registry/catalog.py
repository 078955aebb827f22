"""The one owner of MLflow: the readable image of what the store holds.

MLflow is derived: whatever is missing there is completed from the ledger (`repair`), and
nothing is created before a search by the digest in a tag has not found it, so that calls
that are repeated, killed in between or made by two workers leave one image of each thing.
An experiment tag remembers up to which act the image is complete, which makes a repair
with nothing to do cost two queries. Credentials in an address never reach a message.
"""

import contextlib
import fcntl
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from merging.errors import BadInput, Unavailable
from registry import image
from registry.head import Head, ModelVersion
from registry.history import Entry, MergedRecord
from registry.home import Home
from registry.ledger import Ledger
from registry.store import explained

if TYPE_CHECKING:
    from mlflow import MlflowClient

_COMPLETE_TAG = "restitch.complete_to"
_IMAGE_VERSION = "1"  # raised when images change, so that all are looked at again


class Catalog:
    """MLflow's view of the lines of a home.

    Nothing is imported or connected before the first call. Every method raises
    `Unavailable` when MLflow cannot be used; the store is then as true as before.
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        self._experiments: dict[str, str] = {}
        self._models: set[str] = set()

    @cached_property
    def client(self) -> "MlflowClient":
        """MLflow's own client, for what this class does not do."""
        with self._explained():
            return connect(self.home)

    def repair(self, ledger: Ledger, *, full: bool = False) -> int:
        """Complete the image of a line from its ledger.

        Args:
            ledger: the line.
            full: look at every act, not only at those since the last complete repair.

        Returns:
            How many acts were looked at.

        Raises:
            Unavailable: MLflow is away; what is missing is completed by the next repair.
            Damage: the audit trail or a record is damaged.
        """
        with self._explained(), self._alone():
            head = ledger.head()  # not before the lock: an old one would turn aliases back
            audit = self._experiment(image.audit_experiment_name(head.line))
            complete_to = None if full else self._complete_to(audit)
            aliases = self._aliases(head)
            if aliases is None:
                complete_to, aliases = None, {}
            pending = self._pending(ledger, head, complete_to)
            models: set[tuple[str, int]] = set()
            for entry in reversed(pending):
                self._write_run(audit, image.of_act(entry))
                models.update(image.touched_models(entry))
                for version in image.touched_merges(entry):
                    record = ledger.merged(version)
                    read = ledger.objects.read_blob
                    self._write_merged(record, {n: read(d) for n, d in record.files.items()})
            for task, version in sorted(models):
                model = head.tasks[task].versions.get(version) if task in head.tasks else None
                if model is not None:
                    self._write_model(head, task, version, model)
            self._set_aliases(head, aliases)
            if pending:
                value = f"{_IMAGE_VERSION}:{head.entry}"
                self.client.set_experiment_tag(audit, _COMPLETE_TAG, value)
        return len(pending)

    def act(self, entry: Entry) -> str:
        """Show one act; returns the id of its run."""
        with self._explained(), self._alone():
            audit = self._experiment(image.audit_experiment_name(entry.line))
            return self._write_run(audit, image.of_act(entry))

    def model(self, head: Head, task: str, version: int) -> None:
        """Show one finetuned model in its present state."""
        with self._explained(), self._alone():
            self._write_model(head, task, version, head.tasks[task].versions[version])

    def merged(self, record: MergedRecord, files: Mapping[str, bytes] | None = None) -> str:
        """Show one merged version; returns the id of its run."""
        with self._explained(), self._alone():
            return self._write_merged(record, dict(files or {}))

    def set_aliases(self, head: Head) -> None:
        """Let `champion` and `candidate` point where the head says."""
        with self._explained(), self._alone():
            self._set_aliases(head, self._aliases(head) or {})

    def run_of(self, record: MergedRecord) -> str | None:
        """The id of the run that shows a merged version, if there is one."""
        with self._explained():
            experiment = self._experiment(image.experiment_name(record.line))
            runs = self._runs(experiment, record.digest)
            return runs[0].info.run_id if runs else None

    def _pending(self, ledger: Ledger, head: Head, complete_to: str | None) -> list[Entry]:
        if head.entry == complete_to:
            return []
        found = []
        for entry in ledger.entries():
            found.append(entry)
            if entry.previous is not None and entry.previous == complete_to:
                break
        return found

    def _complete_to(self, experiment: str) -> str | None:
        value = self.client.get_experiment(experiment).tags.get(_COMPLETE_TAG, "")
        version, _, entry = value.partition(":")
        return entry if version == _IMAGE_VERSION else None

    def _write_merged(self, record: MergedRecord, files: dict[str, bytes]) -> str:
        run, version = image.of_merged(record, files)
        run_id = self._write_run(self._experiment(image.experiment_name(record.line)), run)
        self._write_version(version, run_id)
        return run_id

    def _write_model(self, head: Head, task: str, version: int, model: ModelVersion) -> None:
        run, shown = image.of_model(head.line, task, version, model, head.base.weights)
        experiment = self._experiment(image.models_experiment_name(head.line))
        self._write_version(shown, self._write_run(experiment, run))

    def _write_run(self, experiment: str, run: image.RunImage) -> str:
        from mlflow.entities import Metric, Param, RunTag

        found = self._runs(experiment, run.digest)
        if found:
            first, *others = found
            for other in others:  # two workers searched at the same moment
                self.client.delete_run(other.info.run_id)
            if first.info.status == "FINISHED" and run.metrics.keys() <= first.data.metrics.keys():
                return str(first.info.run_id)
        else:
            tags = {**run.tags, image.DIGEST_TAG: run.digest}
            first = self.client.create_run(experiment, start_time=run.time, tags=tags)
        run_id = str(first.info.run_id)
        # Writing the same values once more changes nothing, so an unfinished run is rewritten.
        metrics = [Metric(k, v, run.time, run.step) for k, v in run.metrics.items()]
        params = [Param(k, v) for k, v in run.params.items()]
        for some in range(0, max(len(metrics), len(params), 1), 100):
            self.client.log_batch(
                run_id,
                metrics=metrics[some : some + 100],
                params=params[some : some + 100],
                tags=[RunTag(k, v) for k, v in run.tags.items()] if some == 0 else [],
            )
        self._write_artifacts(run_id, run.artifacts)
        self.client.set_terminated(run_id, "FINISHED", end_time=run.time)
        return run_id

    def _write_artifacts(self, run_id: str, artifacts: Mapping[str, bytes]) -> None:
        import tempfile
        from pathlib import Path

        if not artifacts:
            return
        self.home.scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.home.scratch) as folder:
            for name, data in artifacts.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            self.client.log_artifacts(run_id, folder)

    def _write_version(self, version: image.VersionImage, run_id: str) -> None:
        found = self._versions(version.name, version.identity)
        if version.existing is not None:
            number = version.existing.number
            # A version that somebody made is never the one that is removed as a double.
            found = sorted(found, key=lambda v: int(v.version) != number) or self._taken(version)
        if not found:
            self._make_model(version.name)
            self.client.create_model_version(
                version.name,
                source=f"runs:/{run_id}/restitch",
                run_id=run_id,
                tags={**version.tags, **version.identity},
                description=version.description,
                await_creation_for=0,
            )
            return
        first, *others = found
        for other in others:
            self.client.delete_model_version(version.name, str(other.version))
        for key, value in version.tags.items():
            if first.tags.get(key) != value:
                self.client.set_model_version_tag(version.name, str(first.version), key, value)
        own = version.existing is not None and first.description
        if own and not first.description.startswith(version.opening):
            return  # what somebody wrote there themselves stays
        if first.description != version.description:
            self.client.update_model_version(version.name, str(first.version), version.description)

    def _taken(self, version: image.VersionImage) -> list[Any]:
        """The version that was made in MLflow alone, from now on the image of ours."""
        from mlflow.exceptions import MlflowException

        assert version.existing is not None
        number = str(version.existing.number)
        try:
            there = self.client.get_model_version(version.name, number)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return []
            raise
        if there.creation_timestamp != version.existing.created:
            return []
        for key, value in version.identity.items():
            self.client.set_model_version_tag(version.name, number, key, value)
        return [there]

    def _aliases(self, head: Head) -> dict[str, int] | None:
        """The aliases of the line's model; None where it should have versions and is gone."""
        from mlflow.exceptions import MlflowException

        if not head.versions:
            return {}
        try:
            model = self.client.get_registered_model(image.model_name(head.line))
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        self._models.add(model.name)
        return {alias: int(version) for alias, version in model.aliases.items()}

    def _set_aliases(self, head: Head, present: Mapping[str, int]) -> None:
        name = image.model_name(head.line)
        for alias in ("champion", "candidate"):
            version = getattr(head, alias)
            if version is None:
                if alias in present:
                    self.client.delete_registered_model_alias(name, alias)
                continue
            identity = {
                image.DIGEST_TAG: head.versions[version],
                image.VERSION_TAG: str(version),
            }
            found = self._versions(name, identity)
            if found and int(found[0].version) != present.get(alias):
                self.client.set_registered_model_alias(name, alias, str(found[0].version))

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        if name in self._experiments:
            return self._experiments[name]
        found = self.client.get_experiment_by_name(name)
        if found is None:
            location = self.home.mlartifacts / name if self.home.owns_mlflow else None
            with contextlib.suppress(MlflowException):  # another worker makes it now
                self.client.create_experiment(
                    name, artifact_location=None if location is None else location.as_uri()
                )
            found = self.client.get_experiment_by_name(name)
        if found is None:
            raise Unavailable(f"MLflow has no experiment {name} and does not make it")
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        self._experiments[name] = found.experiment_id
        return str(found.experiment_id)

    def _make_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        if name in self._models:
            return
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        self._models.add(name)

    def _runs(self, experiment: str, digest: str) -> list[Any]:
        runs = self.client.search_runs(
            [experiment],
            f"tags.`{image.DIGEST_TAG}` = '{digest}'",
            max_results=10,
        )
        # The same first one for everybody, and never an unfinished one before a finished.
        return sorted(runs, key=lambda r: (r.info.status != "FINISHED", r.info.run_id))

    def _versions(self, name: str, identity: Mapping[str, str]) -> list[Any]:
        wanted = [f"name = '{name}'", *(f"tags.`{k}` = '{v}'" for k, v in identity.items())]
        found = self.client.search_model_versions(" and ".join(wanted), max_results=10)
        return sorted(found, key=lambda v: int(v.version))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep the workers of one host from searching and creating at the same time."""
        path = self.home.root / "mlflow.lock"
        with explained(path, "write"):
            self.home.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _explained(self) -> AbstractContextManager[None]:
        return mlflow_explained(self.home)


@contextlib.contextmanager
def mlflow_explained(home: Home, missing: str | None = None) -> Iterator[None]:
    """Turn MLflow's failures into errors that say what to do.

    Args:
        home: whose MLflow it is.
        missing: what to say when MLflow answers that something is not there.

    Raises:
        BadInput: something is not there, and `missing` was given.
        Unavailable: MLflow cannot be used now.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        first = without_credentials((str(error).splitlines() or [type(error).__name__])[0])[:300]
        absent = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE")
        if missing is not None and getattr(error, "error_code", None) in absent:
            raise BadInput(missing, found=first, hint="check the name and the version") from None
        # Not chained: the original may hold an address with its password.
        raise Unavailable(
            f"MLflow at {without_credentials(home.mlflow_uri)} cannot be used",
            found=first,
            hint="check MLFLOW_TRACKING_URI and that the server runs; the store is complete, "
            "and the next remerge completes MLflow",
        ) from None


def without_credentials(text: str) -> str:
    """A text in which addresses have lost user and password."""
    return re.sub(r"(\w://)[^/@\s'\"]+@", r"\1***@", text)


def connect(home: Home) -> "MlflowClient":
    """MLflow's client for a home; nothing global in the process is set."""
    # The first connection migrates a new database and would tell every step of it.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    import mlflow

    if home.owns_mlflow:
        home.root.mkdir(parents=True, exist_ok=True)
    return mlflow.MlflowClient(tracking_uri=home.mlflow_uri, registry_uri=home.mlflow_uri)
