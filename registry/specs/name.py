"""The names of lines and tasks."""

import re
from typing import Annotated

from pydantic import BeforeValidator, Field

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}\Z")


def check_name(name: str) -> str:
    """Return the name of a line or a task.

    Raises:
        ValueError: it is not a valid name.
    """
    if not NAME.match(name):
        raise ValueError(
            f"{name[:80]!r} is not a name: use 1 to 63 of a-z, 0-9, '_' and '-', "
            "starting with a letter or digit"
        )
    return name


Name = Annotated[
    str,
    BeforeValidator(
        lambda value: check_name(value) if isinstance(value, str) else value,
        json_schema_input_type=Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")],
    ),
]
