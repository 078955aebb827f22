"""Finetuned models that somebody registered in MLflow and not here.

A version of the registered model `<line>.<task>` that is the image of one of ours has our
tag; any other was made by a training job or a person with MLflow's own client. Nothing is
decided here: what becomes of such a version is for the flows to say.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from restitch.registry.ledger.line_state import MlflowVersion
from restitch.registry.mlflow import projection
from restitch.registry.mlflow.sync import MlflowProjection, mlflow_explained
from restitch.registry.specs.task import NAME

# How a training job says, on its version, what the task is: a path or the YAML itself.
TASK_TAG = "restitch.task"
NOBODY = "mlflow"

log = logging.getLogger("restitch")


@dataclass(frozen=True)
class ExternalModel:
    """A version that was made in MLflow alone.

    Attributes:
        task: the name behind the line's.
        source: where its artifacts are, as whoever made it said.
        actor: who that was, as far as MLflow knows.
        described: its tag `restitch.task`.
        image_of: the version of ours whose image it has become.
    """

    line: str
    task: str
    mlflow: MlflowVersion
    source: str
    actor: str
    described: str | None
    image_of: int | None

    @property
    def uri(self) -> str:
        """The address by which its files are read."""
        return f"models:/{projection.model_name(self.line, self.task)}/{self.mlflow.number}"


def external_models_of(catalog: MlflowProjection, line: str) -> list[ExternalModel]:
    """All versions of a line's tasks that are not the image of one of ours, oldest first.

    Raises:
        Unavailable: MLflow cannot be used.
    """
    with mlflow_explained(catalog.home):
        found = []
        for version in _pages(catalog.client, f"name LIKE '{line}.%'"):
            task = _task(line, version.name)
            if task is not None and version.status == "READY" and not _is_ours(version):
                found.append(_foreign(catalog.client, line, task, version))
    return sorted(found, key=lambda f: (f.mlflow.created, f.task, f.mlflow.number))


def external_model(
    catalog: MlflowProjection, line: str, task: str, number: int
) -> ExternalModel | None:
    """One version by its number, also when it has become the image of ours since.

    Raises:
        Unavailable: MLflow cannot be used.
    """
    from mlflow.exceptions import MlflowException

    with mlflow_explained(catalog.home):
        try:
            name = projection.model_name(line, task)
            version = catalog.client.get_model_version(name, str(number))
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return _foreign(catalog.client, line, task, version)


def has_no_files(catalog: MlflowProjection, foreign: ExternalModel) -> bool:
    """Whether the place of a version's files answers that nothing is there.

    A download from a bucket fails alike where the bucket is away and where it holds nothing.
    """
    from mlflow.artifacts import list_artifacts

    name, number = projection.model_name(foreign.line, foreign.task), str(foreign.mlflow.number)
    try:
        place = catalog.client.get_model_version_download_uri(name, number)
        return not list_artifacts(artifact_uri=place, tracking_uri=catalog.home.mlflow_uri)
    except Exception as error:  # of whatever library that reads there: it has not answered
        log.debug("%s: %s", foreign.uri, type(error).__name__)
        return False


def link(catalog: MlflowProjection, foreign: ExternalModel, version: int) -> None:
    """Note on a version that these weights are there already, as another version's image.

    It gets no digest: the tags that make an image are on one version each.

    Raises:
        Unavailable: MLflow cannot be used.
    """
    name, number = projection.model_name(foreign.line, foreign.task), str(foreign.mlflow.number)
    with mlflow_explained(catalog.home):
        reason = f"the same weights as version {version} of the task"
        catalog.client.set_model_version_tag(name, number, projection.REASON_TAG, reason)
        catalog.client.set_model_version_tag(name, number, projection.VERSION_TAG, str(version))


def task_of(name: str) -> tuple[str, str] | None:
    """Line and task of a registered model's name; None where it is none of a finetuned model."""
    line, dot, task = name.partition(".")
    return (line, task) if dot and NAME.match(line) and NAME.match(task) else None


def _task(line: str, name: str) -> str | None:
    found = task_of(name)  # in a pattern of LIKE, a line's `_` stands for any letter
    return found[1] if found is not None and found[0] == line else None


def _is_ours(version: Any) -> bool:
    return projection.VERSION_TAG in version.tags


def _pages(client: Any, wanted: str) -> Iterator[Any]:
    token: str | None = None
    while True:
        page = client.search_model_versions(wanted, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _foreign(client: Any, line: str, task: str, version: Any) -> ExternalModel:
    number = version.tags.get(projection.VERSION_TAG, "")
    return ExternalModel(
        line,
        task,
        MlflowVersion(number=int(version.version), created=int(version.creation_timestamp)),
        str(version.source or ""),
        _actor(client, version),
        version.tags.get(TASK_TAG),
        int(number) if number.isdigit() else None,
    )


def _actor(client: Any, version: Any) -> str:
    """Who made a version; MLflow's open server does not say, the run that it came from may."""
    from mlflow.exceptions import MlflowException

    known = version.user_id or version.tags.get("mlflow.user")
    if not known and version.run_id:
        try:
            run = client.get_run(version.run_id)
            known = run.data.tags.get("mlflow.user") or run.info.user_id
        except MlflowException as error:
            log.debug("run %s: %s", version.run_id, error.error_code)
    return str(known or NOBODY)
