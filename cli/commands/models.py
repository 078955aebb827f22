"""Commands about models: register, export, follow, evaluate, retire and restore them."""

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from restitch.cli.app import FollowedLine, Json, Line, Task, Version, show_result
from restitch.cli.commands.audit import OptionalReason, Reason, Remerge
from restitch.cli.commands.lines import ReplaceTask, TaskFile
from restitch.cli.render import models as render
from restitch.cli.render.audit import decided
from restitch.cli.render.formats import console
from restitch.merging.errors import UsageError
from restitch.registry.home import Home
from restitch.registry.ledger.finetuned_models import NO_GAIN, PREPROCESSING


class Alias(StrEnum):
    """The versions of a line that a folder can follow."""

    CHAMPION = "champion"
    CANDIDATE = "candidate"


class AdapterForm(StrEnum):
    """The kinds of adapters that a version can be written as."""

    LORA = "lora"


def _existing(context: typer.Context, model: str) -> str:
    """Refuse a local path that does not exist before the command imports what it needs."""
    if not context.resilient_parsing and model.startswith(("/", ".", "~")):
        from restitch.registry.sources.resolve import resolve_source

        resolve_source(model, Home.from_environment())
    return model


def register(
    line: Line,
    task: TaskFile,
    model: Annotated[
        str,
        typer.Option(
            "--model", help="Folder, s3://bucket/folder, hub id or MLflow URI.", callback=_existing
        ),
    ],
    remerge: Annotated[bool, typer.Option(help="Merge the model as well.")] = True,
    replace_task: ReplaceTask = False,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the model to the store.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the workers.")] = False,
    timeout: Annotated[
        float | None, typer.Option(help="Wait this many seconds at most; then exit with 6.")
    ] = None,
    here: Annotated[bool, typer.Option("--here", help="Work here, not in the workers.")] = False,
    accept_no_gain: Annotated[
        bool,
        typer.Option(
            "--accept-no-gain",
            help="Merge it even if it is worse than the base on its own task; needs --reason.",
        ),
    ] = False,
    accept_preprocessing: Annotated[
        bool,
        typer.Option(
            "--accept-preprocessing",
            help="Allow another tokenizer or image processor than the base's; needs --reason.",
        ),
    ] = False,
    reason: OptionalReason = "",
    as_json: Json = False,
) -> None:
    """Register a finetuned model.

    With workers, they do the work and the command returns at once; with --wait, it returns when
    the model is in the champion or was refused. Without workers the command does the work.
    """
    accepted = _accepted({NO_GAIN: accept_no_gain, PREPROCESSING: accept_preprocessing}, reason)
    from restitch.flows.register import register as run

    outcome = run(
        line,
        task,
        model,
        merge=remerge,
        replace_task=replace_task,
        copy=copy,
        here=here,
        wait=wait,
        timeout=timeout,
        accepted=accepted,
    )
    show_result(outcome, as_json, render.registered)


def _accepted(checks: dict[str, bool], reason: str) -> dict[str, str]:
    """The checks that are switched off, with the reason for it."""
    chosen = [check for check, accepted in checks.items() if accepted]
    if chosen and not reason.strip():
        raise UsageError(
            f"{_option(chosen[0])} needs a reason, which the audit trail keeps",
            hint="add --reason WHY",
        )
    if reason and not chosen:
        raise UsageError(
            "--reason says why a check is switched off, and none is",
            hint=f"add {' or '.join(map(_option, checks))}",
        )
    return dict.fromkeys(chosen, reason)


def _option(check: str) -> str:
    return f"--accept-{check.replace(' ', '-')}"


def merge(
    file: Annotated[
        Path | None, typer.Argument(help="A file with the merge, in our form or mergekit's.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base of all models.")] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="A finetuned model, as TASK=SOURCE.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="The merge method.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the method, as KEY=VALUE.")
    ] = None,
    localize: Annotated[
        list[str] | None,
        typer.Option("--localize", help="What is kept of each model, as density=0.2."),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", help="Glob of more tensors to merge.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Glob of tensors not to merge.")
    ] = None,
    family: Annotated[str | None, typer.Option(help="The family of the base.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Type of the merged weights: float32, bfloat16 or float16."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; absent or empty.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, and write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Merge checkpoints into a folder, without a line: no store, no MLflow, no evaluation."""
    if out is None and not dry_run:
        raise UsageError("nothing says where to write", hint="add --out FOLDER, or --dry-run")
    options = (base, model, method, set_, localize, include, exclude, family, dtype)
    if (file is None) == (base is None):
        raise UsageError("a merge is a file, or options", hint="give FILE, or --base and --model")
    if file is not None and any(options):
        raise UsageError("a merge is a file, or options", hint="write the options into the file")
    if file is None and not (model and method):
        raise UsageError("a merge needs models and a method", hint="add --model and --method")
    from restitch.registry.specs.files import load_merge, merge_of

    if file is not None:
        request = load_merge(file)
    else:
        request = merge_of(
            {
                "base": base,
                "models": _pairs(model, "--model", "TASK=SOURCE"),
                "method": {"name": method, "settings": _values(set_, "--set")},
                "localize": _values(localize, "--localize"),
                "include": include or [],
                "exclude": exclude or [],
                "family": family,
                "dtype": dtype,
            }
        )
    if device is not None:
        os.environ["RESTITCH_DEVICE"] = device
    from restitch.merging.files.mapped_file import hashing_ahead

    with hashing_ahead(request.sources):  # while the imports take a core
        from restitch.flows.merge_once import merge_as

        merged = merge_as(request, out, overwrite=overwrite, dry_run=dry_run)
    show_result(merged, as_json, render.merged_once)


def _pairs(given: list[str] | None, option: str, form: str) -> dict[str, str]:
    """The options of the form KEY=VALUE."""
    found: dict[str, str] = {}
    for each in given or ():
        key, separator, value = each.partition("=")
        if not (key and separator and value) or key in found:
            problem = "twice" if key in found else "in another form"
            raise UsageError(f"{option} {each!r} is given {problem}", hint=f"write {option} {form}")
        found[key] = value
    return found


def _values(given: list[str] | None, option: str) -> dict[str, Any]:
    """The options of the form KEY=VALUE, with values as in YAML."""
    import yaml

    return {k: yaml.safe_load(v) for k, v in _pairs(given, option, "KEY=VALUE").items()}


def export(
    line: Line,
    version: Version,
    out: Annotated[
        Path | None,
        typer.Argument(help="Folder to write; absent or empty. Not needed with --push."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model in the folder or on the hub.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload to the hub, in one commit."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push: the repository must be private.")
    ] = False,
    shard_size: Annotated[
        str | None, typer.Option(help="Largest file, such as 5GB or 500MB; default: as the base.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="For this task: with its head in a line of classifiers, else specialist."
        ),
    ] = None,
    specialist: Annotated[
        bool, typer.Option("--specialist", help="With --task: the specialist; see `experts`.")
    ] = False,
    form: Annotated[
        AdapterForm | None,
        typer.Option("--as", help="Write the change alone, as a LoRA adapter for the base."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="With --as lora: the mean rank of the layers; default: 16."),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="With --as lora: the share of the squared change, instead of a rank."),
    ] = None,
    with_workers: Annotated[
        bool,
        typer.Option("--with-workers", help="Idle workers write files, through the store."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a merged version, or the model of it for one task, as a Hugging Face folder.

    With --as lora, write its change alone as one adapter, which peft and servers of adapters load.
    A line with `space` merges (IA)³ adapters, and its versions are written as one.
    With --push, upload the folder to the hub; what the hub already holds of it is not sent again.
    """
    if private and push is None:
        raise UsageError("--private is for a repository on the hub", hint="add --push OWNER/NAME")
    if out is None and push is None:
        raise UsageError(
            "the folder to write is missing", hint="name it, or upload with --push OWNER/NAME"
        )
    if specialist and task is None:
        raise UsageError("--specialist needs the task that it is for", hint="add --task TASK")
    if with_workers and (push is not None or form is not None or task is not None):
        raise UsageError(
            "--with-workers writes a whole merged version into a folder",
            hint="leave out --push, --as and --task",
        )
    if form is None and (rank is not None or keep is not None):
        raise UsageError("--rank and --keep are for adapters", hint="add --as lora")
    if form is not None:
        if task is not None or shard_size is not None:
            raise UsageError("an adapter has one file, and is for all tasks")
        if rank is not None and keep is not None:
            raise UsageError("--rank and --keep are two ways to choose the size", hint="give one")
        if keep is not None and not 0 < keep <= 1:
            raise UsageError(f"--keep {keep:g} is no share", hint="give a number up to 1, as 0.99")
        from restitch.flows.export_adapter import export_adapter, push_adapter

        size: Any = {"rank": 16 if rank is None and keep is None else rank, "keep": keep}
        size["overwrite"] = overwrite
        if push is not None:
            adapter = push_adapter(line, version, push, out, private=private, **size)
        else:
            assert out is not None
            adapter = export_adapter(line, version, out, **size)
        show_result(adapter, as_json, render.exported_adapter)
    from restitch.flows.export import export_version, push_version

    options: Any = {
        "overwrite": overwrite,
        "shard_size": shard_size,
        "task": task,
        "specialist": specialist,
    }
    if push is not None:
        outcome = push_version(line, version, push, out, private=private, **options)
    else:
        assert out is not None
        outcome = export_version(line, version, out, with_workers=with_workers, **options)
    show_result(outcome, as_json, render.exported)


def follow(
    line: FollowedLine,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to keep; absent or empty at first.")
    ],
    alias: Annotated[Alias, typer.Option(help="The version to follow.")] = Alias.CHAMPION,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    every: Annotated[
        int | None,
        typer.Option(min=1, max=86_400, help="Seconds between two looks; default: 60."),
    ] = None,
    command: Annotated[
        str | None,
        typer.Option(
            "--exec", metavar="COMMAND", help="Shell command to run after each new version."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Keep a Hugging Face folder at the champion of a line: DIR/current.

    The first look writes everything. A later one reads the patch of the new version and writes the
    shards that changed. `DIR/current` is a link, which switches when the new folder is complete;
    the version before it stays. Without --once, it looks until it is stopped, and prints every
    change; with --json each is a document on a line of its own.

    The command finds RESTITCH_LINE, RESTITCH_VERSION and RESTITCH_FOLDER in its environment. If it
    fails, or is killed, it runs again at the next look.
    """
    if once and every is not None:
        raise UsageError("--once looks once, and --every again and again", hint="give one of them")
    from restitch.flows.follow import follow as following
    from restitch.flows.follow import follow_once

    followed: Any = {"alias": alias.value, "command": command}
    if once:
        show_result(follow_once(line, folder, **followed), as_json, render.followed)
    for outcome in following(line, folder, every=every or 60, **followed):
        if as_json:
            typer.echo(json.dumps(outcome.as_dict(), ensure_ascii=False))
        else:
            render.followed(outcome.as_dict(), console())
        sys.stdout.flush()


def evaluate(line: Line, version: Version = "champion", as_json: Json = False) -> None:
    """Evaluate a merged version on every task and on the general benchmark."""
    from restitch.flows.evaluate import evaluate_version

    show_result(evaluate_version(line, version), as_json, render.evaluated)


def retire(
    line: Line, task: Task, reason: Reason, remerge: Remerge = True, as_json: Json = False
) -> None:
    """Leave a task out of all future merges, and merge without it."""
    from restitch.flows.decisions import retire as run

    show_result(run(line, task, reason, merge=remerge), as_json, decided)


def restore(
    line: Line,
    task: Task,
    reason: OptionalReason = "",
    remerge: Remerge = True,
    as_json: Json = False,
) -> None:
    """Take a retired task back, and merge with it."""
    from restitch.flows.decisions import restore as run

    show_result(run(line, task, reason, merge=remerge), as_json, decided)
