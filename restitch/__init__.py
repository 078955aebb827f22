"""restitch keeps one merged model that holds the skills of many finetuned models.

The functions below are those behind the commands of the same names. State lies in the folder
that `RESTITCH_HOME` names. Importing this package is cheap: a function's module is imported
when the function is first used.

    import restitch
    from pathlib import Path

    restitch.merge("base", {"sst2": "models/a", "trec": "models/b"}, "tsv-m", "merged")

    restitch.init_line(Path("line.yaml"))
    restitch.register("photos", Path("eurosat.yaml"), "models/eurosat")
    restitch.export_version("photos", "champion", Path("merged"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from restitch.flows.evaluate import evaluate_version
    from restitch.flows.export import export_version
    from restitch.flows.lines.init_line import init_line
    from restitch.flows.merge_once import merge
    from restitch.flows.register import register
    from restitch.flows.remerge import remerge
    from restitch.merging.errors import RestitchError

__version__ = "0.1.0"
__all__ = [
    "RestitchError",
    "evaluate_version",
    "export_version",
    "init_line",
    "merge",
    "register",
    "remerge",
]

_MODULES = {
    "RestitchError": "restitch.merging.errors",
    "evaluate_version": "restitch.flows.evaluate",
    "export_version": "restitch.flows.export",
    "init_line": "restitch.flows.lines.init_line",
    "merge": "restitch.flows.merge_once",
    "register": "restitch.flows.register",
    "remerge": "restitch.flows.remerge",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'restitch' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
