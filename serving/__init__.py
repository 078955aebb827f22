"""Use merged versions where models run: complete folders, MLflow models, a followed version.

`tasks` and all packages above it import it, and so does the process that serves a model; it knows
no Prefect. `Follower` is public.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from restitch.serving.follower import Follower

__all__ = ["Follower"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'restitch.serving' has no attribute {name!r}")
    from restitch.serving.follower import Follower

    return Follower
