"""Write the files of a merged version, each of which is stored under its key.

Several workers can share them (`tasks.runtime.sharing`); the process that exports copies the files
and adds the index.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from restitch.merging.digests import digest_bytes, digest_json
from restitch.merging.files.export import copy_file, planned_files, write_file, write_index
from restitch.registry.ledger.finetuned_models import ModelRef
from restitch.registry.specs.line import LineSpec
from restitch.tasks.inputs.checkpoints import open_base, open_sparse
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.engine import Cached, step
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.sharing import Work, sharing, stored
from restitch.tasks.runtime.workspace import Workspace


class Shards:
    """The files of a merged version.

    Args:
        line: the line.
        patch: the digest of the version's patch.
        limit: the bytes of the largest file; None splits like the base.
        space: the workspace.

    Attributes:
        work: the files as work that workers can share.
    """

    kind = "export"

    def __init__(self, line: LineRef, patch: str, limit: int | None, space: Workspace) -> None:
        self.space = space
        self.base = open_base(line, space)
        self.edits = open_sparse(patch, space, self.base.checkpoint)
        self.files = planned_files(self.base.checkpoint, limit)
        self.work = Work(
            line=line.spec.line,
            kind=self.kind,
            content={
                "spec": line.spec.to_json(),
                "base": line.base.to_json(),
                "patch": patch,
                "limit": limit,
            },
            results="shard",
            keys=tuple(
                digest_json([line.base.weights, patch, digest_bytes(file.header)])
                for file in self.files
            ),
        )

    @classmethod
    def of(cls, content: Mapping[str, Any], space: Workspace) -> "Shards":
        """The files of the work that another process offers."""
        spec, base = LineSpec.from_json(content["spec"]), ModelRef.model_validate(content["base"])
        return cls(LineRef(spec, base), content["patch"], content["limit"], space)

    def do(self, number: int) -> str:
        """Write a file into the store, unless it is there; return its digest."""
        return write_shard(self, number, self.files[number].name)


@step("write shard", "write {name}")
def write_shard(shards: Shards, number: int, name: str) -> str | Cached[str]:
    """The digest of a file of a merged version, from the store or written now."""

    def write(file: Path) -> None:
        with working(f"writing {name}") as progress:
            write_file(shards.base.checkpoint, shards.edits, file, shards.files[number], progress)

    return stored(shards.space, shards.work, number, write)


def export_shared(
    line: LineRef, patch: str, limit: int | None, out: Path, space: Workspace
) -> None:
    """Write the weights of a merged version into a folder, with the workers that are idle."""
    shards = Shards(line, patch, limit, space)
    with sharing(space, shards.work, after=0) as turns:
        for number in turns:
            blob = shards.do(number)
            copy_file(space.objects.blob_path(blob), out / shards.files[number].name)
    write_index(out, shards.files)
