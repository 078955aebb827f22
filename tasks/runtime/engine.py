"""One decorator for steps and flows: under Prefect's engine, or called as they are.

The engine is on where a server is named (`PREFECT_API_URL`, or a live server in
`RESTITCH_HOME/stack.json`), never because of the user's own Prefect profile. Without it the
same functions run in the calling process: an ephemeral server would cost every command
twelve seconds and more. The code of a step cannot tell the difference.

A step that found its result in the store returns `Cached(value)`: callers get `value`, and
Prefect shows the run in the state "Cached". A step that is called outside of any flow is
called as it is.
"""

import functools
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast
from urllib.parse import urlsplit

from restitch.merging.errors import RestitchError, Unavailable
from restitch.registry.mlflow.sync import without_credentials
from restitch.registry.stack import StackFile

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True)
class Cached(Generic[R]):
    """What a step returns whose result was already in the store."""

    value: R


class Run(Protocol[P, R_co]):
    """A step or a flow.

    Attributes:
        body: the function itself, past the engine.
        engine_object: gives the task or the flow as Prefect has it.
    """

    body: Callable[..., Any]
    engine_object: Callable[[], Any]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Through the engine where it is on, otherwise as it is."""


def engine_url() -> str | None:
    """The API of the Prefect server to use, or None for the embedded mode."""
    url = os.environ.get("PREFECT_API_URL")
    if url:
        return url
    return _live_stack(Path(os.environ.get("RESTITCH_HOME", ".restitch")))


def _live_stack(home: Path) -> str | None:
    url = StackFile.read(home).prefect_api_url
    if url is None:
        return None
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 80), 0.5):
            return url
    except OSError:
        return None


def step(
    name: str, run_name: str | None = None
) -> Callable[[Callable[P, R | Cached[R]]], Run[P, R]]:
    """Make a function one step of a flow.

    Args:
        name: what Prefect calls the task.
        run_name: template of a run's name over the function's parameters; the task's name with
            some letters where it is None.
    """
    return _decorator(name, "task", run_name)


def flow(name: str, run_name: str) -> Callable[[Callable[P, R | Cached[R]]], Run[P, R]]:
    """Make a function a flow.

    Args:
        name: what Prefect calls the flow.
        run_name: template of a run's name over the function's parameters.
    """
    return _decorator(name, "flow", run_name)


def _decorator(
    name: str, kind: str, run_name: str | None
) -> Callable[[Callable[P, R | Cached[R]]], Run[P, R]]:
    def decorate(function: Callable[P, R | Cached[R]]) -> Run[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            url = engine_url()
            if url is not None:
                os.environ["PREFECT_API_URL"] = url  # before Prefect reads its settings
                if kind == "flow" or _inside_a_flow():
                    with _explained(url), _at(url):
                        return cast(R, _value(engine_object()(*args, **kwargs)))
            returned = function(*args, **kwargs)
            return returned.value if isinstance(returned, Cached) else returned

        @functools.cache
        def engine_object() -> Callable[..., Any]:
            return _in_engine(function, name, kind, run_name)

        run = cast(Run[P, R], call)
        run.engine_object = engine_object
        run.body = function
        return run

    return decorate


@contextmanager
def _at(url: str) -> Iterator[None]:
    """Have Prefect use this server, also where it read its settings before one was named.

    It would start one of its own otherwise, and wait for that.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if PREFECT_API_URL.value() == url:
        yield
        return
    with temporary_settings({PREFECT_API_URL: url}):
        yield


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Say in our words that the server is away; whatever else happened stays what it is."""
    import httpx

    try:
        yield
    except (httpx.HTTPError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "Failed to reach API" not in str(error):
            raise
        raise Unavailable(
            f"the Prefect server at {without_credentials(url)} cannot be used",
            found=without_credentials(str(error))[:300],
            hint="start it, or unset PREFECT_API_URL to work without one",
        ) from None


def _inside_a_flow() -> bool:
    from prefect.context import FlowRunContext

    return FlowRunContext.get() is not None


def _value(returned: Any) -> Any:
    """The value of a run: one that ends in a state of its own hands back that state."""
    from prefect.client.schemas.objects import State

    return returned.result() if isinstance(returned, State) else returned


def _in_engine(
    function: Callable[..., Any], name: str, kind: str, run_name: str | None
) -> Callable[..., Any]:
    import prefect
    from prefect.cache_policies import NO_CACHE
    from prefect.states import Completed, Failed

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            returned = function(*args, **kwargs)
        except RestitchError as error:
            # Explained already: the caller gets the error, and no log a traceback.
            return Failed(message=error.message(), data=error)
        if isinstance(returned, Cached):
            # Our store is the cache: its digests are verified, Prefect's record is a pointer.
            return Completed(name="Cached", message="found in the store", data=returned.value)
        return returned

    if kind == "flow":
        return prefect.flow(name=name, flow_run_name=run_name, persist_result=False)(run)
    return prefect.task(
        name=name, task_run_name=run_name, cache_policy=NO_CACHE, persist_result=False
    )(run)
