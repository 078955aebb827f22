"""Read the files of the team's set-up as Docker does, and run their services as processes.

Addresses in compose.yaml are variables, so each service's command runs here on loopback: with the
environment of the file and of the image, a folder as its volume, and this checkout as its image.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.shell import ROOT

FOLDER = ROOT / "deployments"
FILE = FOLDER / "compose.yaml"
HOME = "/var/lib/restitch"  # in the image
STARTS_WITHIN = 120.0

_VARIABLE = re.compile(r"\$(?:(\$)|\{([A-Z0-9_]+)(?::([-?])([^}]*))?\})")


@cache
def composed() -> dict[str, Any]:
    """The file with its anchors resolved, and its variables left as they are."""
    found: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return found


def services() -> dict[str, dict[str, Any]]:
    """The services by name."""
    found: dict[str, dict[str, Any]] = composed()["services"]
    return found


def filled_in(value: Any, variables: Mapping[str, str]) -> Any:
    """A part of the file with its variables replaced, by Docker's rules.

    Raises:
        KeyError: a variable that has no default is missing.
    """
    if isinstance(value, dict):
        return {key: filled_in(each, variables) for key, each in value.items()}
    if isinstance(value, list):
        return [filled_in(each, variables) for each in value]
    if not isinstance(value, str):
        return value

    def replaced(found: re.Match[str]) -> str:
        dollar, name, kind, text = found.groups()
        if dollar:
            return "$"
        if variables.get(name):
            return variables[name]
        if kind == "-":
            return str(text)
        raise KeyError(f"{name}: {text}")

    return _VARIABLE.sub(replaced, value)


def variables_of(value: Any) -> dict[str, str | None]:
    """The variables that a part of the file reads, each with its default; None where required."""
    found: dict[str, str | None] = {}
    for text in _strings(value):
        for dollar, name, kind, default in _VARIABLE.findall(text):
            if not dollar:
                found[name] = default if kind == "-" else None
    return found


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def example() -> dict[str, str]:
    """The variables of .env.example with their values."""
    lines = (FOLDER / ".env.example").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}


def image_environment() -> dict[str, str]:
    """The variables that the Dockerfile sets."""
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    pairs = [
        pair.partition("=")
        for line in text.splitlines()
        if line.startswith("ENV ")
        for pair in shlex.split(line.removeprefix("ENV "))
    ]
    return {name: value for name, _, value in pairs}


@dataclass
class Team:
    """The services of the file as processes on this machine.

    Attributes:
        root: a folder for their homes and logs.
        variables: what stands in `.env`.
    """

    root: Path
    variables: Mapping[str, str]

    def environment(self, service: str, **more: str) -> dict[str, str]:
        """The environment of a service's processes."""
        home = self.root / service
        home.mkdir(parents=True, exist_ok=True)
        foreign = ("RESTITCH_", "PREFECT_", "MLFLOW_", "AWS_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        image = {k: v.replace(HOME, str(home)) for k, v in image_environment().items()}
        own = filled_in(services()[service].get("environment", {}), {**self.variables, **more})
        # This machine's own accounts and folders stay out, as they would with an image.
        fixed = {
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        return {**kept, **fixed, **image, **own}

    def command(self, service: str) -> list[str]:
        """The command of a service, which listens on loopback instead of the network."""
        words = filled_in(services()[service]["command"], self.variables)
        return ["127.0.0.1" if word == "0.0.0.0" else word for word in words]

    def run(self, service: str, *command: object) -> "subprocess.CompletedProcess[str]":
        """Run a service to its end, or another command in its container."""
        return subprocess.run(
            [str(word) for word in command] or self.command(service),
            env=self.environment(service),
            cwd=self.root / service,
            capture_output=True,
            text=True,
            timeout=240,
        )

    @contextmanager
    def started(self, service: str, **more: str) -> Iterator[None]:
        """Start a service; `healthy` waits for it."""
        environment = self.environment(service, **more)
        with (self.root / f"{service}.log").open("wb") as out:
            process = subprocess.Popen(
                self.command(service),
                env={**environment, "MLFLOW_WEBHOOK_CACHE_TTL": "1"},
                cwd=self.root / service,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_hear_interrupts,
            )
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def healthy(self, service: str, **more: str) -> None:
        """Wait until the health check of a service passes."""
        kind, *probe = filled_in(
            services()[service]["healthcheck"]["test"], {**self.variables, **more}
        )
        assert kind == "CMD"
        environment = self.environment(service, **more)
        deadline = time.monotonic() + STARTS_WITHIN
        while subprocess.run(probe, env=environment, capture_output=True).returncode != 0:
            log = (self.root / f"{service}.log").read_text(errors="replace")[-4000:]
            assert time.monotonic() < deadline, f"{service} is not healthy:\n{log}"
            time.sleep(0.3)


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
