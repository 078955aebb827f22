"""Studies as MLflow shows them."""

from typing import Any

from restitch.registry.home import Home
from restitch.registry.mlflow.sync import MlflowProjection
from tests.shell import Shell


def study_runs(shell: Shell) -> dict[str, tuple[Any, set[str]]]:
    """The first run of each name, with the paths of its files."""
    with shell.inside():
        client = MlflowProjection(Home.from_environment()).client
        experiment = client.get_experiment_by_name("demo.studies")
        assert experiment is not None
        newest_first = client.search_runs([experiment.experiment_id], order_by=["start_time DESC"])
        files = [client.list_artifacts(run.info.run_id) for run in newest_first]
    pairs = zip(newest_first, files, strict=True)
    return {run.info.run_name: (run, {file.path for file in listed}) for run, listed in pairs}
