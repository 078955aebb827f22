"""The loader of MLflow models of merged versions; their `python_function` flavor names it.

`mlflow.pyfunc.load_model("models:/LINE@champion")` calls `_load_pyfunc`, and so does `mlflow models
serve`. The artifact holds the description of the version; base and patch come from the store.
"""

from pathlib import Path
from typing import Any

from restitch.merging.errors import BadInput
from restitch.registry.home import Home, prepare_environment
from restitch.serving.answers import MergedModel
from restitch.serving.served_version import FORMAT, ServedVersion


class PyFunc:
    """A merged version behind MLflow's interface."""

    def __init__(self, model: MergedModel) -> None:
        self.model = model

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """The answers for a table, one row each.

        Args:
            model_input: a `pandas.DataFrame`, or a list of texts.
            params: `task`, and `max_new_tokens` where texts are generated.

        Raises:
            MlflowException: the request cannot be answered; MLflow's server reports it as a client
                error.
        """
        import pandas as pd
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

        params = params or {}
        table = pd.DataFrame(model_input)
        rows = [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]
        try:
            answers = self.model.answer(
                rows, params.get("task") or None, params.get("max_new_tokens") or None
            )
        except BadInput as error:
            raise MlflowException(error.message(), INVALID_PARAMETER_VALUE) from error
        return pd.DataFrame(answers)


def _load_pyfunc(path: str) -> PyFunc:
    """Load the version that a file describes.

    Raises:
        RestitchError: it cannot be rebuilt or loaded.
    """
    prepare_environment(Home.from_environment())
    return PyFunc(MergedModel(_described(Path(path))))


def _described(file: Path) -> ServedVersion:
    try:
        return ServedVersion.model_validate_json(file.read_bytes())
    except ValueError as error:
        raise BadInput(
            f"{file} does not describe a merged version that this restitch can load",
            expected=f"format {FORMAT}",
            found=str(error).splitlines()[0],
            hint="install the version of restitch that is in the model's requirements.txt",
        ) from error
