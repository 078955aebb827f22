"""The folder of an installation, and the environment variables of its libraries.

Everything lies under one folder, `RESTITCH_HOME` (default `.restitch` in the working
directory): store, caches, scratch space, the MLflow database and its artifacts.
`prepare_environment` must run before torch, Prefect, MLflow or the Hugging Face libraries are
imported, because they read their settings at import. It keeps them from writing to the user's
home and from sending telemetry.
"""

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from restitch.merging.errors import BadInput, Unavailable
from restitch.registry.redaction import without_credentials
from restitch.registry.s3.client import parse_address
from restitch.registry.s3.store import S3Store
from restitch.registry.stack import Databases, StackFile
from restitch.registry.store.base import Store
from restitch.registry.store.disk import explained, sweep
from restitch.registry.store.folder import FolderStore
from restitch.registry.store.format import check_format

HOME_VARIABLE = "RESTITCH_HOME"
STORE_VARIABLE = "RESTITCH_STORE"


@dataclass(frozen=True)
class Home:
    """The folder of an installation.

    Args:
        root: the folder, absolute.
        store_url: a folder or `s3://bucket/prefix` in place of `root/store`.
        tracking_uri: an MLflow server or database in place of `root/mlflow.db`.
        stack_mlflow_uri: the server of `restitch up`, or its database while it is down.
    """

    root: Path
    store_url: str | None = None
    tracking_uri: str | None = None
    stack_mlflow_uri: str | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "Home":
        """The home that the environment names; creates nothing."""
        environment = os.environ if environment is None else environment
        root = Path(environment.get(HOME_VARIABLE) or ".restitch").expanduser().absolute()
        return cls(
            root=root,
            store_url=environment.get(STORE_VARIABLE) or None,
            tracking_uri=environment.get("MLFLOW_TRACKING_URI") or None,
            stack_mlflow_uri=StackFile.read(root).mlflow_uri or Databases.read(root).mlflow,
        )

    @property
    def store_is_local(self) -> bool:
        """True if the store is a folder."""
        return self.store_url is None or not self.store_url.startswith("s3://")

    @property
    def store_name(self) -> str:
        """The address of the store, without credentials, for a reader."""
        return without_credentials(self.store_url or str(self.store_path))

    @property
    def store_path(self) -> Path:
        """The folder of the store.

        Raises:
            BadInput: the store is not a folder.
        """
        if self.store_url is None:
            return self.root / "store"
        scheme, separator, rest = self.store_url.partition("://")
        if not separator:
            return Path(self.store_url).expanduser().absolute()
        if scheme == "file":
            return Path("/" + rest.lstrip("/"))
        raise BadInput(
            f"{STORE_VARIABLE} is not an address that this version of restitch supports",
            expected="a folder, or s3://bucket/prefix",
            found=f"{scheme}://...",
            hint=f"set {STORE_VARIABLE} to a store that all workers share, or unset it",
        )

    @property
    def cache(self) -> Path:
        """Files that can be fetched or made again; may be emptied while nothing runs."""
        return self.root / "cache"

    @property
    def scratch(self) -> Path:
        """Temporary files of running work, on the same disk as the default store."""
        return self.root / "scratch"

    @property
    def mlartifacts(self) -> Path:
        """MLflow's artifacts, if its database is in this home."""
        return self.root / "mlartifacts"

    @property
    def mlflow_uri(self) -> str:
        """The tracking and registry address of MLflow."""
        database = f"sqlite:///{self.root / 'mlflow.db'}"
        return self.tracking_uri or self.stack_mlflow_uri or database

    @property
    def owns_mlflow(self) -> bool:
        """True if MLflow stores its artifacts in this home."""
        return self.tracking_uri is None

    def create(self) -> None:
        """Create the missing folders.

        Raises:
            Unavailable: the folder cannot be created or written to.
        """
        for folder in (self.root, self.cache, self.scratch):
            with explained(folder, "create the folder"):
                folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise Unavailable(
                f"cannot write to {self.root}",
                hint=f"give yourself write permission, or set {HOME_VARIABLE} to another folder",
            )

    def open_store(self) -> Store:
        """The store of this home.

        Raises:
            BadInput: its address is malformed, or the store has another format.
            Unavailable: the store cannot be read.
        """
        store: Store
        if self.store_url is not None and not self.store_is_local:
            store = S3Store(*parse_address(self.store_url), cache=self.cache / "store")
        else:
            store = FolderStore(self.store_path)
        check_format(store)
        return store

    def sweep(self, older_than: float) -> int:
        """Remove leftovers of killed work of this age in seconds; returns how many."""
        leftovers = [*self.scratch.glob("*"), *self.cache.glob("sources/.tmp/*")]
        with explained(self.root, "remove leftovers in"):
            removed = sweep(leftovers, older_than)
        return removed + self.open_store().sweep(older_than)


def prepare_environment(
    home: Home, environment: MutableMapping[str, str] | None = None
) -> dict[str, str]:
    """Point the libraries at the home's folders and switch their telemetry off.

    Variables that are already set stay. Returns the others, for processes that are started.
    """
    environment = os.environ if environment is None else environment
    variables = {
        "PREFECT_HOME": str(home.root / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
        "PREFECT_CLI_PROMPT": "false",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        # The default waits two minutes for an unreachable server.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
        "GIT_PYTHON_REFRESH": "quiet",
        "HF_HOME": str(home.cache / "huggingface"),
        "HF_DATASETS_CACHE": str(home.cache / "datasets"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Threads that wait for each other sleep. By default they keep their cores busy meanwhile,
        # which is many times slower where other processes need these cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TORCH_HOME": str(home.cache / "torch"),
        "MPLCONFIGDIR": str(home.cache / "matplotlib"),
        # Everything else that would write to ~/.cache.
        "XDG_CACHE_HOME": str(home.cache / "xdg"),
    }
    token = _user_token(environment)
    if token is not None:
        variables["HF_TOKEN_PATH"] = str(token)
    added = {name: value for name, value in variables.items() if name not in environment}
    environment.update(added)
    return added


def _user_token(environment: Mapping[str, str]) -> Path | None:
    # A moved HF_HOME would log the user out, so the token file is still read at its old path.
    if "HF_HOME" in environment or "HF_TOKEN" in environment or "HOME" not in environment:
        return None
    cache = environment.get("XDG_CACHE_HOME") or str(Path(environment["HOME"]) / ".cache")
    token = Path(cache) / "huggingface" / "token"
    try:
        return token if token.is_file() else None
    except OSError:
        return None
