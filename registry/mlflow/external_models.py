"""External models: finetuned models that a user or a training job registered in MLflow.

A version of the registered model `<line>.<task>` that projects one of our models has our tag;
any other is external. The flows decide what to do with it.
"""

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

from restitch.registry.ledger.finetuned_models import MlflowVersion
from restitch.registry.mlflow import projection
from restitch.registry.mlflow.connection import mlflow_explained
from restitch.registry.mlflow.sync import MlflowProjection
from restitch.registry.mlflow.writer import or_none, pages
from restitch.registry.specs.name import NAME

# The tag by which a training job describes the task: a path of a task file, or its YAML.
TASK_TAG = "restitch.task"
NOBODY = "mlflow"

log = logging.getLogger("restitch")


@dataclass(frozen=True)
class ExternalModel:
    """A version that was registered in MLflow only.

    Attributes:
        task: the part of the model's name after the line.
        source: where its artifacts are, as MLflow records it.
        actor: who registered it, as far as MLflow knows.
        task_tag: its tag `restitch.task`.
        accept_tag: its tag `restitch.accept_no_gain`, a reason.
        own_version: the version of the task that it projects by now.
    """

    line: str
    task: str
    mlflow: MlflowVersion
    source: str
    actor: str
    task_tag: str | None
    accept_tag: str | None
    own_version: int | None

    @property
    def uri(self) -> str:
        """The address by which its files are read."""
        return f"models:/{projection.model_name(self.line, self.task)}/{self.mlflow.number}"


def external_models_of(mlflow: MlflowProjection, line: str) -> list[ExternalModel]:
    """All external versions of a line's tasks, oldest first.

    Raises:
        Unavailable: MLflow cannot be used.
    """
    with mlflow_explained(mlflow.home):
        models = []
        for version in pages(partial(mlflow.client.search_model_versions, f"name LIKE '{line}.%'")):
            # In a LIKE pattern, the `_` of a line matches any character.
            owner, task = task_of(version.name) or (None, "")
            is_ours = projection.VERSION_TAG in version.tags
            if owner == line and version.status == "READY" and not is_ours:
                models.append(_external(mlflow.client, line, task, version))
    return sorted(models, key=lambda m: (m.mlflow.created, m.task, m.mlflow.number))


def external_model(
    mlflow: MlflowProjection, line: str, task: str, number: int
) -> ExternalModel | None:
    """One version by its number, even if it projects one of our models by now.

    Raises:
        Unavailable: MLflow cannot be used.
    """
    with mlflow_explained(mlflow.home):
        name = projection.model_name(line, task)
        version = or_none(mlflow.client.get_model_version, name, str(number))
        return None if version is None else _external(mlflow.client, line, task, version)


def has_no_files(mlflow: MlflowProjection, model: ExternalModel) -> bool:
    """Return True if the artifact location of a version can be listed and is empty.

    A download from a bucket fails alike if the bucket is unreachable and if it is empty.
    """
    from mlflow.artifacts import list_artifacts

    name, number = projection.model_name(model.line, model.task), str(model.mlflow.number)
    try:
        place = mlflow.client.get_model_version_download_uri(name, number)
        return not list_artifacts(artifact_uri=place, tracking_uri=mlflow.home.mlflow_uri)
    except Exception as error:  # any library may read there: the location is unreachable
        log.debug("%s: %s", model.uri, type(error).__name__)
        return False


def link(mlflow: MlflowProjection, model: ExternalModel, version: int) -> None:
    """Tag an external version whose weights another version of the task already has.

    It gets no digest tag: the tags that identify a projection are on one version each.

    Raises:
        Unavailable: MLflow cannot be used.
    """
    name, number = projection.model_name(model.line, model.task), str(model.mlflow.number)
    with mlflow_explained(mlflow.home):
        reason = f"the same weights as version {version} of the task"
        mlflow.client.set_model_version_tag(name, number, projection.REASON_TAG, reason)
        mlflow.client.set_model_version_tag(name, number, projection.VERSION_TAG, str(version))


def task_of(name: str) -> tuple[str, str] | None:
    """Line and task of a registered model's name; None if it is not a finetuned model's."""
    line, dot, task = name.partition(".")
    return (line, task) if dot and NAME.match(line) and NAME.match(task) else None


def _external(client: Any, line: str, task: str, version: Any) -> ExternalModel:
    number = version.tags.get(projection.VERSION_TAG, "")
    return ExternalModel(
        line,
        task,
        MlflowVersion(number=int(version.version), created=int(version.creation_timestamp)),
        str(version.source or ""),
        _actor(client, version),
        version.tags.get(TASK_TAG),
        version.tags.get(projection.ACCEPT_TAG),
        int(number) if number.isdigit() else None,
    )


def _actor(client: Any, version: Any) -> str:
    """The user who registered a version, or who made the run that it came from."""
    from mlflow.exceptions import MlflowException

    known = version.user_id or version.tags.get("mlflow.user")
    if not known and version.run_id:
        try:
            run = client.get_run(version.run_id)
            known = run.data.tags.get("mlflow.user") or run.info.user_id
        except MlflowException as error:
            log.debug("run %s: %s", version.run_id, error.error_code)
    return str(known or NOBODY)
