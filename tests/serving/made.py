"""Served versions made directly in a store: one member, whose weights the version has."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from restitch.merging.digests import digest_json
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.whole_weights import WholeWeights
from restitch.merging.rules.stitch import write_patch
from restitch.modeling.families.family import get_family
from restitch.registry.home import Home
from restitch.registry.ledger.finetuned_models import ModelRef
from restitch.registry.ledger.records import MergedRecord
from restitch.registry.sources.verified import assets_digest
from restitch.registry.specs.head import HeadSpec
from restitch.registry.store.format import mark_format
from restitch.registry.store.objects import ObjectStore
from restitch.serving.served_version import ServedTask, ServedVersion


def made(
    root: Path,
    family_name: str,
    base: Path,
    finetuned: Path,
    tasks: Mapping[str, dict[str, Any]],
    heads_of: Path | None = None,
) -> ServedVersion:
    """A version whose merged weights are those of one finetuned model.

    Args:
        root: a folder for the store and the home.
        family_name: the family.
        base: the base's folder.
        finetuned: the folder of the one member.
        tasks: for each task the description of its head, and `columns` and `metric`.
        heads_of: the folder of the classifier that has the heads.
    """
    family = get_family(family_name)
    home = replace(Home(root / "home"), store_url=str(root / "store"))
    objects = ObjectStore(home.open_store())
    mark_format(objects.store)
    opened, other = Checkpoint.open(base), Checkpoint.open(finetuned)
    names = tuple(n for n in opened.names if n in set(other.names) and opened.floating)
    write_patch(root / "patch", opened, WholeWeights(other, names), {})
    patch = objects.put_blob(root / "patch")
    record = MergedRecord(
        line="demo",
        version=1,
        recipe={},
        recipe_digest=digest_json({}),
        patch=patch,
        patch_bytes=1,
        kept=1,
        members={},
        created_at="2026-11-30T10:00:00+00:00",
    )
    served = {}
    for task, given in tasks.items():
        values = dict(given)
        columns, metric = values.pop("columns", ("text",)), values.pop("metric", "accuracy")
        spec = HeadSpec(**values)
        head = None
        if not family.reads_prompts:
            built = family.build_head(family.load(base), base, spec, finetuned=heads_of)
            head = objects.put_blob(built.to_bytes())
        served[task] = ServedTask(
            metric=metric, columns=tuple(columns), head=head, spec=None if head else spec
        )
    return ServedVersion(
        store=str(root / "store"),
        line="demo",
        version=1,
        record=objects.put_blob(record.to_bytes()),
        created_at=record.created_at,
        family=family_name,
        compute="auto",
        base=ModelRef(
            uri=str(base),
            weights=opened.digest(),
            config=assets_digest(base, family.asset_files(base)),
        ),
        patch=patch,
        tasks=served,
    )
