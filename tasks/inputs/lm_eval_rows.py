"""Keep the rows of an lm-eval task, so that workers need neither lm-eval nor its data set."""

import json
import tempfile
from pathlib import Path
from typing import Any

from restitch.merging.digests import digest_json
from restitch.merging.errors import BadInput
from restitch.modeling.data.lm_eval_tasks import LmEvalTask, read_lm_eval
from restitch.registry.access_policy import check_path
from restitch.registry.specs.data import DataSpec
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.runtime.console import say, working
from restitch.tasks.runtime.workspace import workspace

PROMPT, CHOICES, ANSWER = "{prompt}", "choices", "answer"


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
    data = DataSpec(path=str(folder), **{split: f"{split}.jsonl" for split in task.splits})
    # The name is the same wherever its file lies.
    return spec.model_copy(update={"lm_eval": task.name, "data": data, **_scoring(spec, task)})


def _scoring(spec: TaskSpec, task: LmEvalTask) -> dict[str, Any]:
    """How the rows are scored."""
    chosen = "score" in spec.model_fields_set
    if task.generate is None and task.per is None:
        score = spec.score if chosen else task.score
        return {"prompt": PROMPT, "choices_column": CHOICES, "score": score}
    if chosen:
        raise BadInput(
            f"task {spec.task}: 'score' says how choices are compared",
            expected=f"no score: {task.name} has no choices",
            found=spec.score,
            hint="leave it out",
        )
    if task.generate is not None:
        metric = {"metric": "exact_match", "answer": ANSWER, "generate": task.generate}
        return {"prompt": PROMPT, **metric}
    return {"metric": "perplexity", "per": task.per}


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
