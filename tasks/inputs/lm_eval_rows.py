"""Keep the rows of an lm-eval task, so that workers need neither lm-eval nor its data set."""

import json
import tempfile
from pathlib import Path

from restitch.merging.digests import digest_json
from restitch.modeling.data.lm_eval_tasks import LmEvalTask, read_lm_eval
from restitch.registry.access_policy import check_path
from restitch.registry.specs.task import DataSpec, TaskSpec
from restitch.tasks.runtime.console import say, working
from restitch.tasks.runtime.workspace import workspace

PROMPT, CHOICES = "{prompt}", "choices"


def rows_folder() -> Path:
    """The folder with the rows of all lm-eval tasks, below the home."""
    return workspace().home.root / "lm-eval"


def with_lm_eval_rows(spec: TaskSpec) -> TaskSpec:
    """Turn a task that names one of lm-eval into a task with rows; others stay as they are.

    Raises:
        BadInput: lm-eval is not installed, or its task cannot be used.
    """
    if spec.lm_eval is None or spec.data is not None:
        return spec
    with working(f"reading the lm-eval task of {spec.task}"):
        task = read_lm_eval(spec.lm_eval, f"task {spec.task}: lm_eval", check_path)
    folder = _kept(task)
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in sorted(task.splits.items()))
    say(f"{spec.task}: lm-eval task {task.name} (version {task.version}) has {counts} rows")
    files = {split: f"{split}.jsonl" for split in task.splits}
    return spec.model_copy(
        update={
            "lm_eval": task.name,  # the same wherever its file lies
            "data": DataSpec(path=str(folder), **files),
            "prompt": PROMPT,
            "choices_column": CHOICES,
            "score": spec.score if "score" in spec.model_fields_set else task.score,
        }
    )


def _kept(task: LmEvalTask) -> Path:
    """Write the rows to a folder that is named after them."""
    folder = rows_folder() / digest_json([task.name, task.version, dict(task.splits)])
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="writing-") as name:
        whole = Path(name) / "rows"
        whole.mkdir()
        for split, rows in task.splits.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (whole / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was faster
                raise
    return folder
