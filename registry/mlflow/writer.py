"""Writes runs and model versions to MLflow, each once and completely.

Nothing is created before a search for its digest tag, and writing the same content again
changes nothing: calls may be repeated, killed, or made by two workers at once. A run is
finished last; an unfinished one is written again.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from restitch.merging.errors import Unavailable
from restitch.registry.home import Home
from restitch.registry.mlflow import projection
from restitch.registry.mlflow.descriptions import Description, of_experiment
from restitch.registry.mlflow.projection_merged import Point

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

# The most that MLflow accepts in one request.
_MOST_METRICS, _MOST_TEXTS = 1000, 100


class Writer:
    """Writes projections by MLflow's client; the caller explains its errors."""

    def __init__(self, client: "MlflowClient", home: Home) -> None:
        self.client = client
        self.home = home
        self._experiments: dict[str, str] = {}
        self.models: set[str] = set()

    def write_run(
        self, experiment: str, run: projection.RunProjection, *, archived: bool = False
    ) -> str:
        """Write a run; returns its id.

        Args:
            experiment: its id.
            run: the content.
            archived: show it with the deleted runs only, from where MLflow can restore it.
        """
        runs = self.runs(experiment, run.digest, deleted=archived)
        if archived:
            stages = {each.info.lifecycle_stage for each in runs}
            if stages == {"deleted"}:
                return str(runs[0].info.run_id)
            runs = [each for each in runs if each.info.lifecycle_stage != "deleted"]
        run_id = self._write_run(experiment, run, runs)
        if archived:
            self.client.delete_run(run_id)
        return run_id

    def archive_model(self, name: str, *, archived: bool) -> None:
        """Tag a registered model that was taken out of use, or remove the tag; it may not exist."""
        model = or_none(self.client.get_registered_model, name)
        if model is None:
            return
        tags = model.tags
        if archived and projection.ARCHIVED_TAG not in tags:
            self.client.set_registered_model_tag(name, projection.ARCHIVED_TAG, "true")
        elif not archived and projection.ARCHIVED_TAG in tags:
            self.client.delete_registered_model_tag(name, projection.ARCHIVED_TAG)

    def archive_experiment(self, name: str) -> None:
        """Show an experiment with the deleted ones only, from where MLflow can restore it."""
        experiment = self.client.get_experiment_by_name(name)
        if experiment is not None and experiment.lifecycle_stage != "deleted":
            self.client.delete_experiment(experiment.experiment_id)
        self._experiments.pop(name, None)

    def _write_run(self, experiment: str, run: projection.RunProjection, runs: list[Any]) -> str:
        if runs:
            first, *others = runs
            for other in others:  # two workers searched at the same moment
                self.client.delete_run(other.info.run_id)
            if _is_whole(first, run):
                changed = {k: v for k, v in run.current.items() if first.data.tags.get(k) != v}
                self._write_texts(str(first.info.run_id), {}, changed)
                return str(first.info.run_id)
        else:
            tags = {projection.DIGEST_TAG: run.digest}
            first = self.client.create_run(experiment, start_time=run.time, tags=tags)
        run_id = str(first.info.run_id)
        # Writing the same values once more changes nothing, so an unfinished run is rewritten.
        points = [Point(name, value, run.time, run.step) for name, value in run.metrics.items()]
        self.write_points(run_id, points)
        self._write_texts(run_id, run.params, {**run.tags, **run.current})
        if run.inputs:
            self.client.log_inputs(run_id, datasets=[self._input(data) for data in run.inputs])
        self.write_artifacts(run_id, run.artifacts)
        self.client.set_terminated(run_id, "FINISHED", end_time=run.time)
        return run_id

    def write_points(self, run_id: str, points: Sequence[Point]) -> None:
        """Add values of metrics to a run; existing ones change nothing."""
        from mlflow.entities import Metric

        metrics = [Metric(p.metric, p.value, p.time, p.step) for p in points]
        for some in range(0, len(metrics), _MOST_METRICS):
            self.client.log_batch(run_id, metrics=metrics[some : some + _MOST_METRICS])

    def write_artifacts(self, run_id: str, artifacts: Mapping[str, bytes]) -> None:
        """Write artifacts of a run, replacing existing ones."""
        if not artifacts:
            return
        self.home.scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.home.scratch) as folder:
            for name, data in artifacts.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            self.client.log_artifacts(run_id, folder)

    def write_version(
        self, version: projection.VersionProjection, run_id: str, source: str | None = None
    ) -> None:
        """Write a version of a registered model.

        Args:
            version: the content.
            run_id: the id of its run.
            source: where a new version lies; by default with its run.
        """
        versions = self.versions(version.name, version.identity)
        if version.existing is not None:
            number = version.existing.number
            # The version of a user comes first, so that it is not removed as a duplicate.
            versions = sorted(versions, key=lambda v: int(v.version) != number) or self._adopted(
                version
            )
        if not versions:
            self._make_model(version.name)
            self.client.create_model_version(
                version.name,
                source=source or f"runs:/{run_id}/restitch",
                run_id=run_id,
                tags={**version.tags, **version.identity},
                description=version.description,
                await_creation_for=0,
            )
            return
        first, *others = versions
        for other in others:
            self.client.delete_model_version(version.name, str(other.version))
        for key, value in version.tags.items():
            if first.tags.get(key) != value:
                self.client.set_model_version_tag(version.name, str(first.version), key, value)
        own = version.existing is not None and first.description
        if own and not first.description.startswith(version.opening):
            return  # a description that a user wrote stays
        if first.description != version.description:
            self.client.update_model_version(version.name, str(first.version), version.description)

    def runs(self, experiment: str, digest: str, *, deleted: bool = False) -> list[Any]:
        """The runs that show an object; more than one if two workers created it at once."""
        from mlflow.entities import ViewType

        runs = self.client.search_runs(
            [experiment],
            f"tags.`{projection.DIGEST_TAG}` = '{digest}'",
            run_view_type=ViewType.ALL if deleted else ViewType.ACTIVE_ONLY,
            max_results=10,
        )
        # Every worker gets the same first one, a finished one if there is any.
        return sorted(runs, key=lambda r: (r.info.status != "FINISHED", r.info.run_id))

    def versions(self, name: str, identity: Mapping[str, str]) -> list[Any]:
        """The versions of a registered model that show an object."""
        terms = [f"name = '{name}'", *(f"tags.`{k}` = '{v}'" for k, v in identity.items())]
        versions = self.client.search_model_versions(" and ".join(terms), max_results=10)
        return sorted(versions, key=lambda v: int(v.version))

    def experiment(self, line: str, part: projection.Part = None) -> str:
        """The id of a line's experiment, which is created, restored and described if necessary."""
        from mlflow.exceptions import MlflowException

        name = projection.experiment_name(line, part)
        if name in self._experiments:
            return self._experiments[name]
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            location = self.home.mlartifacts / name if self.home.owns_mlflow else None
            with contextlib.suppress(MlflowException):  # another worker creates it now
                self.client.create_experiment(
                    name, artifact_location=None if location is None else location.as_uri()
                )
            experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            raise Unavailable(
                f"MLflow did not create the experiment {name}",
                hint="look at the log of the MLflow server",
            )
        if experiment.lifecycle_stage == "deleted":
            self.client.restore_experiment(experiment.experiment_id)
        description = of_experiment(line, part, self.home.store_name)
        if description.replaces(experiment.tags.get(projection.NOTE_TAG)):
            self.client.set_experiment_tag(
                experiment.experiment_id, projection.NOTE_TAG, description.text
            )
        self._experiments[name] = str(experiment.experiment_id)
        return self._experiments[name]

    def describe_model(self, name: str, description: Description) -> None:
        """Describe a registered model, if it exists and no user has described it."""
        model = or_none(self.client.get_registered_model, name)
        if model is not None and description.replaces(model.description):
            self.client.update_registered_model(name, description.text)

    def _write_texts(self, run_id: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        texts = [
            *(Param(k, v) for k, v in params.items()),
            *(RunTag(k, v) for k, v in tags.items()),
        ]
        for some in range(0, len(texts), _MOST_TEXTS):
            part = texts[some : some + _MOST_TEXTS]
            self.client.log_batch(
                run_id,
                params=[text for text in part if isinstance(text, Param)],
                tags=[text for text in part if isinstance(text, RunTag)],
            )

    def _input(self, data: projection.DataProjection) -> "DatasetInput":
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if data.source.startswith("/"):
            kind, source = "local", {"uri": data.source}
        else:
            path, _, revision = data.source.partition("@")
            kind, source = "hugging_face", {"path": path, "revision": revision}
        shown = Dataset(data.name, data.digest, kind, json.dumps(source))
        return DatasetInput(shown, [InputTag("mlflow.data.context", data.context)])

    def _adopted(self, version: projection.VersionProjection) -> list[Any]:
        """The version that a user registered in MLflow, now tagged as ours."""
        assert version.existing is not None
        number = str(version.existing.number)
        there = or_none(self.client.get_model_version, version.name, number)
        if there is None or there.creation_timestamp != version.existing.created:
            return []
        for key, value in version.identity.items():
            self.client.set_model_version_tag(version.name, number, key, value)
        return [there]

    def _make_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        if name in self.models:
            return
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        self.models.add(name)


def pages(search: Callable[..., Any]) -> Iterator[Any]:
    """All results of a search, which MLflow answers in pages."""
    token: str | None = None
    while True:
        page = search(max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def or_none(get: Callable[..., Any], *names: str) -> Any:
    """The answer of MLflow's client; None if nothing has these names."""
    from mlflow.exceptions import MlflowException

    try:
        return get(*names)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _is_whole(existing: Any, run: projection.RunProjection) -> bool:
    """True if a run is finished and has all metrics and inputs of its projection."""
    inputs = {(one.dataset.name, one.dataset.digest) for one in existing.inputs.dataset_inputs}
    return (
        existing.info.status == "FINISHED"
        and run.metrics.keys() <= existing.data.metrics.keys()
        and {(data.name, data.digest) for data in run.inputs} <= inputs
    )
