"""A small line and everything that MLflow holds of it, for the tests of `registry.mlflow.sync`."""

from typing import Any

from mlflow import MlflowClient

from restitch.registry.home import Home
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.mlflow.sync import MlflowProjection
from tests.registry.builders import digest, ledger, merge, model, with_task


def small_line(home: Home) -> Ledger:
    """A line with a model that joined and one that could not, and two merged versions."""
    made = ledger(home.store_path)
    made.act("registered", "ann", "new", lambda line_state: with_task(line_state, "a", model("a")))
    made.act(
        "localized",
        "worker",
        "done",
        lambda line_state: line_state.with_state(
            "a", 1, "ready", mask=digest("mask"), delta=digest("delta"), facts={"density": 0.05}
        ),
    )
    made.act("registered", "ann", "new", lambda line_state: with_task(line_state, "b", model("b")))
    made.act(
        "quarantined",
        "worker",
        "NaN",
        lambda line_state: line_state.with_state("b", 1, "quarantined", "NaN"),
    )
    merge(made, tasks=("a",))
    merge(made, tasks=("a",), files={"report.html": made.objects.put_blob(b"<p>report</p>")})
    return made


def shown(mlflow: MlflowProjection, line: str = "line") -> dict[str, Any]:
    """Everything that MLflow holds of a line, without its own ids."""
    client = mlflow.client
    found: dict[str, Any] = {}
    for experiment in (line, f"{line}.audit", f"{line}.models", f"{line}.history"):
        exists = client.get_experiment_by_name(experiment)
        runs = client.search_runs([exists.experiment_id]) if exists else []
        found[experiment] = sorted(repr(whole(client, run)) for run in runs)
    for name in (line, f"{line}.a", f"{line}.b"):
        found[f"model {name}"] = sorted(
            repr((sorted(version.tags.items()), version.description))
            for version in client.search_model_versions(f"name = '{name}'")
        )
    found["descriptions"] = descriptions(mlflow, line)
    models = client.search_registered_models(f"name = '{line}'")
    found["aliases"] = {
        alias: client.get_model_version(line, str(version)).tags["restitch.version"]
        for made in models
        for alias, version in made.aliases.items()
    }
    return found


def descriptions(mlflow: MlflowProjection, line: str = "line") -> dict[str, str]:
    """The descriptions of a line's experiments and registered models, without the store's place."""
    client = mlflow.client
    found = {e.name: e.tags.get("mlflow.note.content") for e in client.search_experiments()}
    found |= {f"model {m.name}": m.description for m in client.search_registered_models()}
    return {
        name: (text or "").replace(mlflow.home.store_name, "STORE")
        for name, text in found.items()
        if f"{name.removeprefix('model ')}.".startswith(f"{line}.")
    }


def whole(client: MlflowClient, run: Any) -> tuple[Any, ...]:
    """All that a run holds; of tags, what is ours."""
    tags = {k: v for k, v in run.data.tags.items() if k.startswith("restitch.")}
    inputs = [
        (one.dataset.name, one.dataset.digest, one.dataset.source, [t.value for t in one.tags])
        for one in run.inputs.dataset_inputs
    ]
    points = sorted(
        (point.key, point.step, point.timestamp, point.value)
        for name in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, name)
    )
    facts = (run.info.run_name, run.info.status)
    return facts, sorted(run.data.params.items()), sorted(tags.items()), inputs, points


def chart(mlflow: MlflowProjection, name: str) -> Any:
    """The run of the line's charts with this name."""
    experiment = mlflow.client.get_experiment_by_name("line.history")
    query = f"attributes.run_name = '{name}'"
    (run,) = mlflow.client.search_runs([experiment.experiment_id], query)
    return run


def points(
    mlflow: MlflowProjection, metric: str, name: str = "champions of line"
) -> list[tuple[int, float]]:
    """(step, value) of a metric in a run of the line's charts."""
    found = mlflow.client.get_metric_history(chart(mlflow, name).info.run_id, metric)
    return sorted((point.step, point.value) for point in found)


def run_of(mlflow: MlflowProjection, version: int) -> Any:
    experiment = mlflow.client.get_experiment_by_name("line").experiment_id
    query = f"tags.`restitch.version` = '{version}'"
    (run,) = mlflow.client.search_runs([experiment], query)
    return run


class KilledError(BaseException):
    """The process is gone."""


class DyingClient:
    """A client whose process dies before its n-th write."""

    WRITES = ("create", "log", "set", "delete", "update")

    def __init__(self, client: Any, writes: int) -> None:
        self._client, self._left = client, writes

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if not name.startswith(self.WRITES):
            return found

        def write(*arguments: Any, **keywords: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                raise KilledError
            return found(*arguments, **keywords)

        return write
