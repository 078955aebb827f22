"""Commands of an operator: servers and workers on this machine or for a team."""

import json
import os
import sys
from typing import Annotated

import typer

from restitch.cli.app import AnyLine, Json, show_result
from restitch.cli.render import operations as render
from restitch.merging.errors import Unavailable
from restitch.registry.home import Home
from restitch.tasks.runtime.console import say


def up(
    workers: Annotated[
        int | None, typer.Option(min=0, help="Number of workers; by default as before, first one.")
    ] = None,
    pool: Annotated[str, typer.Option(help="The work pool of the workers.")] = "gpu",
    as_json: Json = False,
) -> None:
    """Start servers and workers on this machine, or restart those that died."""
    from restitch.deployments.local.stack import up as run

    outcome = run(Home.from_environment(), workers, pool, say)
    show_result(outcome, as_json, render.up)


def down(as_json: Json = False) -> None:
    """Stop the servers and workers of `up`; all data stays."""
    from restitch.deployments.local.stack import down as run

    show_result({"stopped": list(run(Home.from_environment()))}, as_json, render.down)


def doctor(as_json: Json = False) -> None:
    """Check versions, servers, workers, triggers, store and device, and name each remedy."""
    from restitch.deployments.local.doctor import examine

    show_result(examine(), as_json, render.doctor)


def deploy(
    pool: Annotated[str, typer.Option(help="The work pool for onboarding.")] = "gpu",
    remerge_pool: Annotated[
        str | None, typer.Option(help="The work pool for remerging; the same by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make pools, deployments, triggers and schedules on a team's Prefect server."""
    from restitch.deployments.server.deploy import deploy as run

    show_result(run(pool, remerge_pool), as_json, render.deployed)


def assist(
    line: AnyLine = None,
    idle: Annotated[
        float | None,
        typer.Option(min=0, help="End after so many seconds without work; default: never."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Take a part of long work that other processes on this store do: merges, evaluations, exports.

    For hosts without a Prefect worker, such as the pods of one Kubernetes Job.

    Workers of Prefect need no command: long work asks those that are idle.

    With --json each help is a document on a line of its own.
    """
    from restitch.flows.assist import assist_all

    for outcome in assist_all(line, idle=idle):
        if as_json:
            typer.echo(json.dumps(outcome.as_dict(), ensure_ascii=False))
            sys.stdout.flush()


def webhook(
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default is loopback.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 4280,
    receiver: Annotated[
        str | None,
        typer.Option(
            "--register",
            metavar="URL",
            help="Only tell MLflow to send its webhooks to the receiver at this address.",
        ),
    ] = None,
) -> None:
    """Receive MLflow's webhooks and pass new models to Prefect as events.

    Listens on loopback by default. RESTITCH_WEBHOOK_SECRET holds the secret shared with MLflow.
    `POST /webhook` takes deliveries, `GET /health` answers.
    """
    from restitch.deployments.webhook import SECRET_VARIABLE, register_webhook, serve
    from restitch.tasks.runtime.engine import engine_url

    secret = os.environ.get(SECRET_VARIABLE, "")
    if receiver is not None:
        action = register_webhook(Home.from_environment().mlflow_uri, receiver, secret)
        typer.echo(f"MLflow's webhook to {receiver}: {action}")
        return
    prefect = engine_url()
    if prefect is None:
        raise Unavailable(
            "there is no Prefect server to send events to",
            hint="set PREFECT_API_URL, or start one with `restitch up`",
        )
    serve(
        host,
        port,
        secret=secret,
        prefect_api_url=prefect,
        started=lambda address: typer.echo(f"receiving at {address}"),
    )
