"""Decorators for steps and flows, which run in Prefect's engine or as plain functions.

The engine is on when a server is named: by `PREFECT_API_URL`, or by a live server in
`RESTITCH_HOME/stack.json`, never by the user's own Prefect profile. Otherwise steps and flows are
plain function calls, because starting an ephemeral server takes twelve seconds or more. Their code
is the same in both modes.

A step that finds its result in the store returns `Cached(value)`: callers get `value`, and Prefect
shows the run in the state "Cached". A step called outside of a flow is a plain function call.
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
from restitch.registry.redaction import without_credentials
from restitch.registry.stack import StackFile

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True)
class Cached(Generic[R]):
    """The result of a step that was already in the store."""

    value: R


class Run(Protocol[P, R_co]):
    """A step or a flow: `body` is the function itself, `engine_object` makes Prefect's object."""

    body: Callable[..., Any]
    engine_object: Callable[[], Any]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Run it in the engine if that is on, otherwise call it directly."""


def engine_url() -> str | None:
    """The API address of the Prefect server, or None without the engine."""
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
    """Make a function a step.

    Args:
        name: of the task in Prefect.
        run_name: template for the names of runs, filled from the function's parameters; None
            lets Prefect make them from the task's name.
    """
    return _decorator(name, "task", run_name)


def flow(name: str, run_name: str) -> Callable[[Callable[P, R | Cached[R]]], Run[P, R]]:
    """Make a function a flow; the arguments are those of `step`."""
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
                    with _explained(url), _using(url):
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
def _using(url: str) -> Iterator[None]:
    """Make Prefect use this server even if it read its settings earlier.

    Otherwise it would start a server of its own and wait for it.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if PREFECT_API_URL.value() == url:
        yield
        return
    with temporary_settings({PREFECT_API_URL: url}):
        yield


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn connection errors into `Unavailable`; other errors pass unchanged."""
    import httpx

    try:
        yield
    except (httpx.HTTPError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "Failed to reach API" not in str(error):
            raise
        raise Unavailable(
            f"the Prefect server at {without_credentials(url)} cannot be used",
            found=without_credentials(str(error))[:300],
            hint="start the server, or unset PREFECT_API_URL to work without one",
        ) from None


def _inside_a_flow() -> bool:
    from prefect.context import FlowRunContext

    return FlowRunContext.get() is not None


def _value(returned: Any) -> Any:
    """The value of a run, also when Prefect returns its state instead."""
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
            # The message explains it: the caller gets the error, the log no traceback.
            return Failed(message=error.message(), data=error)
        if isinstance(returned, Cached):
            # Our store is the cache, with verified digests; Prefect only keeps a reference.
            return Completed(name="Cached", message="found in the store", data=returned.value)
        return returned

    if kind == "flow":
        return prefect.flow(name=name, flow_run_name=run_name, persist_result=False)(run)
    return prefect.task(
        name=name, task_run_name=run_name, cache_policy=NO_CACHE, persist_result=False
    )(run)
