"""restitch keeps one merged model that holds the skills of many finetuned models.

    import restitch

    merged = restitch.merge("base", {"sst2": "models/a", "trec": "models/b"}, "tsv-m")
    merged.save("merged")

    line = restitch.Line.create({"line": "texts", "base": "models/base", "method": "tsv-m", ...})
    line.register({"task": "sst2", "data": {...}, "head": {...}}, "models/a")
    model = line.champion.load()

The names in `__all__` are public: they stay, or change with a note in the changelog. Everything
else may change at any time. State lies in the folder that `RESTITCH_HOME` names. Importing this
package is cheap: a name's module is imported when the name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from restitch.flows.api.line import Line, Version
    from restitch.flows.merge_once import Merge, merge
    from restitch.merging.errors import (
        BadInput,
        CannotJoin,
        Damage,
        GateFailed,
        RestitchError,
        Unavailable,
    )
    from restitch.tasks.runtime.console import Reporter, reporting_to

__version__ = "0.1.0"
__all__ = [
    "BadInput",
    "CannotJoin",
    "Damage",
    "GateFailed",
    "Line",
    "Merge",
    "Reporter",
    "RestitchError",
    "Unavailable",
    "Version",
    "merge",
    "reporting_to",
]

_MODULES = {
    "Line": "restitch.flows.api.line",
    "Version": "restitch.flows.api.line",
    "Merge": "restitch.flows.merge_once",
    "merge": "restitch.flows.merge_once",
    "Reporter": "restitch.tasks.runtime.console",
    "reporting_to": "restitch.tasks.runtime.console",
}
_ERRORS = "restitch.merging.errors"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'restitch' has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, _ERRORS)), name)
