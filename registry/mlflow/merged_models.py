"""Merged versions as MLflow models: their small files, and the weights of those that keep them.

Each version is an MLflow model of a few kilobytes. The line's key `mlflow` says which versions have
their weights there too; a tag of the registered model names those that have them now. The files lie
with the version's run, or in the store if that is a bucket: the version's source names the place,
and never changes.
"""

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

from restitch.merging.errors import RestitchError, Unavailable
from restitch.registry.home import Home
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.references import S3_SCHEME
from restitch.registry.mlflow.projection import model_name
from restitch.registry.redaction import first_line
from restitch.registry.store.base import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

# The tag of a registered model with the versions of its line that have their weights in MLflow.
WEIGHTS_TAG = "restitch.weights"
# The folder of a model in the artifacts of its version's run, and in the store.
IN_RUN, IN_STORE = "restitch", "models"
# The folders of a model that are there only with its weights.
WEIGHT_FOLDERS = ("model", "components")
MODEL_FILE = "MLmodel"


class Models(Protocol):
    """Makes the MLflow models of a line's merged versions."""

    def files(self, version: int, *, weights: bool) -> Mapping[str, bytes]:
        """The small files of a version; no files if they cannot be made now."""

    def weights(self, version: int) -> AbstractContextManager[Path | None]:
        """A folder with the weights of a version; None if they cannot be made now."""

    def failed(self, version: int, reason: str) -> None:
        """Report weights that could not be written or removed."""


class Place(Protocol):
    """Where the MLflow model of a version lies."""

    def write(self, folder: Path) -> None:
        """Write all files of a folder, replacing existing ones."""

    def names(self) -> set[str]:
        """The names of the files and folders at the top."""

    def remove(self, name: str) -> None:
        """Remove a folder, if it is there."""

    def fetch(self, folders: Sequence[str], scratch: Path) -> Path:
        """The folder on this machine that holds these folders as they are now: `scratch` or not."""


class RunPlace:
    """The artifacts of a run."""

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        self.client = client
        self.run_id = run_id

    def write(self, folder: Path) -> None:
        """Write all files of a folder; see `Place.write`."""
        self.client.log_artifacts(self.run_id, str(folder), IN_RUN)

    def names(self) -> set[str]:
        """The names at the top; see `Place.names`."""
        listed = self.client.list_artifacts(self.run_id, IN_RUN)
        return {file.path.rpartition("/")[2] for file in listed}

    def remove(self, name: str) -> None:
        """Remove a folder; see `Place.remove`."""
        if name in self.names():
            self._repository().delete_artifacts(f"{IN_RUN}/{name}")

    def fetch(self, folders: Sequence[str], scratch: Path) -> Path:
        """Artifacts on this machine are read in place; see `Place.fetch`."""
        from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

        repository = self._repository()
        if isinstance(repository, LocalArtifactRepository):
            return Path(repository.artifact_dir) / IN_RUN
        for name in folders:
            repository.download_artifacts(f"{IN_RUN}/{name}", str(scratch))
        return scratch / IN_RUN

    def _repository(self) -> "ArtifactRepository":
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        address = self.client.get_run(self.run_id).info.artifact_uri
        return get_artifact_repository(address, tracking_uri=self.client.tracking_uri)


class StorePlace:
    """A part of a store in a bucket."""

    def __init__(self, store: Store, prefix: str) -> None:
        self.store = store
        self.prefix = prefix

    def write(self, folder: Path) -> None:
        """Write all files of a folder; see `Place.write`."""
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.store.mend(f"{self.prefix}/{file.relative_to(folder).as_posix()}", file)

    def names(self) -> set[str]:
        """The names at the top; see `Place.names`."""
        listed = self.store.list(self.prefix)
        return {name.removeprefix(f"{self.prefix}/").partition("/")[0] for name in listed}

    def remove(self, name: str) -> None:
        """Remove a folder; see `Place.remove`."""
        for each in list(self.store.list(f"{self.prefix}/{name}")):
            self.store.remove(each)

    def fetch(self, folders: Sequence[str], scratch: Path) -> Path:
        """Links to fresh copies in the cache; see `Place.fetch`."""
        for folder in folders:
            for name in self.store.list(f"{self.prefix}/{folder}"):
                link = scratch / name.removeprefix(f"{self.prefix}/")
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(self.store.local_path(name, fresh=True))
        return scratch


class MergedModels:
    """Writes the MLflow models of one line; the caller explains MLflow's errors.

    Args:
        client: MLflow's client.
        home: the installation.
        line_state: the line.
        models: makes the files.
    """

    def __init__(
        self, client: "MlflowClient", home: Home, line_state: LineState, models: Models
    ) -> None:
        self.client = client
        self.home = home
        self.line_state = line_state
        self.models = models

    def write(self, shown: Any, version: int, *, weights: bool) -> None:
        """Write the small files of a version, which say whether its weights are there."""
        files = self.models.files(version, weights=weights)
        if files:
            with self._folder() as folder:
                for name, data in files.items():
                    (folder / name).write_bytes(data)
                place_of(self.client, self.home, shown).write(folder)

    def add(self, shown: Any, version: int) -> bool:
        """Write the weights of a version; returns False, and leaves none, if that fails."""
        from mlflow.exceptions import MlflowException

        place = place_of(self.client, self.home, shown)
        with self.models.weights(version) as folder:
            if folder is None:
                return False
            try:
                place.write(folder)
            except (MlflowException, RestitchError, OSError) as error:
                self.models.failed(version, first_line(error))
                with contextlib.suppress(MlflowException, RestitchError, OSError):
                    self._remove(place)
                return False
        self.write(shown, version, weights=True)
        return True

    def remove(self, shown: Any, version: int) -> bool:
        """Remove the weights of a version; returns False if that fails."""
        from mlflow.exceptions import MlflowException

        self.write(shown, version, weights=False)
        try:
            self._remove(place_of(self.client, self.home, shown))
        except (MlflowException, RestitchError, OSError) as error:
            self.models.failed(version, first_line(error))
            return False
        return True

    def _remove(self, place: Place) -> None:
        for name in WEIGHT_FOLDERS:
            place.remove(name)

    @contextlib.contextmanager
    def _folder(self) -> Any:
        self.home.scratch.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.home.scratch) as folder:
            yield Path(folder)


def source_of(home: Home, line: str, version: int, run_id: str) -> str:
    """The source of a new version in MLflow: a part of a bucket, or of the artifacts of its run."""
    if home.store_is_local:
        return f"runs:/{run_id}/{IN_RUN}"
    return f"{home.open_store().address}/{IN_STORE}/{line}/{version}"


def place_of(client: "MlflowClient", home: Home, shown: Any) -> Place:
    """Where the MLflow model of a version lies.

    Raises:
        Unavailable: the version's source is in another store than this home's.
    """
    if not str(shown.source).startswith(S3_SCHEME):
        return RunPlace(client, shown.run_id)
    store = home.open_store()
    if not shown.source.startswith(f"{store.address}/"):
        raise Unavailable(
            f"the model of version {shown.version} of {shown.name} lies in another store",
            expected=f"a source below {store.address}",
            found=shown.source,
            hint="set RESTITCH_STORE to that store",
        )
    return StorePlace(store, shown.source.removeprefix(f"{store.address}/"))


def keeps_weights(line_state: LineState) -> frozenset[int]:
    """The versions of a line that have their weights in MLflow."""
    chosen = line_state.spec.mlflow.weights
    if line_state.dropped is not None or chosen == "none":
        return frozenset()
    champion = () if line_state.champion is None else (line_state.champion,)
    versions = line_state.versions if chosen == "all" else champion
    return frozenset(version for version in versions if version not in line_state.purged)


def tagged(tags: Mapping[str, str]) -> frozenset[int] | None:
    """The versions that the tag of a registered model names; None without the tag."""
    text = tags.get(WEIGHTS_TAG)
    if text is None:
        return None
    return frozenset(int(number) for number in text.split(",") if number.isdigit())


def tag_model(client: "MlflowClient", line: str, versions: frozenset[int]) -> None:
    """Set the tag of a registered model."""
    text = ",".join(map(str, sorted(versions)))
    client.set_registered_model_tag(model_name(line), WEIGHTS_TAG, text)
