"""Scores of choices against lm-eval's `HFLM`: the same numbers, and the time of each, in one run.

    pip install lm-eval==0.4.13 accelerate
    python -m benchmarks.lm_eval --model DIR --data DIR [--tasks sst2 words] [--rows 500]

Both read the same model in float32 on the CPU, and the same rows of each task: the prompt, and a
space with each choice. With `--shots` all prompts begin with the same examples: validation rows
with their right choices. `DIR` of the data has a folder for each task with `task.json` (`prompt`,
and `choices` or `choices_column`), `test.jsonl` and `validation.jsonl`. lm-eval first tries some
batch sizes on a part of the rows and keeps the fastest. Then the two take turns, so that a busy
moment affects both. Times include tokenizing. The goal is for the time of all tasks together.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from restitch.modeling.data.rows import Example
from restitch.modeling.evaluation import BATCH_SIZE
from restitch.modeling.families.family import get_family
from restitch.modeling.heads import Head
from restitch.registry.specs.head import HeadSpec

BATCH_SIZES = (4, 16, 64)
TRIED_ROWS = 48
MOST_DIFFERENCE, MOST_TIME = 1e-3, 0.6

Scores = list[list[float]]
Score = Callable[[Sequence[Example]], Scores]


@dataclass(frozen=True)
class Compared:
    """One task: the largest difference of two log-likelihoods, accuracies, and median seconds."""

    task: str
    rows: int
    difference: float
    accuracy: float
    accuracy_lm_eval: float
    seconds: float
    seconds_lm_eval: float
    batch_size: int

    @property
    def share(self) -> float:
        """Our time over that of lm-eval."""
        return self.seconds / self.seconds_lm_eval

    @property
    def is_same(self) -> bool:
        """True if the scores agree."""
        return self.difference <= MOST_DIFFERENCE and self.accuracy == self.accuracy_lm_eval


def read_rows(folder: Path, count: int, shots: int) -> list[Example]:
    """The first test rows of a task as questions, after examples that are the same for all."""
    asked = _questions(folder, "validation", shots)
    examples = "".join(f"{row.inputs[0]} {row.choices[row.label or 0]}\n\n" for row in asked)
    rows = _questions(folder, "test", count)
    return [replace(row, inputs=(examples + row.inputs[0],)) for row in rows]


def _questions(folder: Path, split: str, count: int) -> list[Example]:
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    found = []
    for number, row in enumerate(map(json.loads, lines)):
        choices = task["choices"] if "choices" in task else row[task["choices_column"]]
        prompt = task["prompt"].format(**row).strip()
        found.append(Example((prompt,), row["label"], f"row {number}", tuple(choices)))
    return found


def ours(model: Path) -> Score:
    """Score rows with the family `causal-lm`, in batches of similar length."""
    family = get_family("causal-lm")
    live, preprocess = family.load(model), family.preprocessor(model)
    head = Head({}, family.resolve(model, HeadSpec(labels=("a", "b"))))

    def score(rows: Sequence[Example]) -> Scores:
        order = sorted(range(len(rows)), key=lambda row: len(rows[row].inputs[0]))
        found: Scores = [[] for _ in rows]
        with torch.inference_mode():
            for start in range(0, len(order), BATCH_SIZE):
                part = order[start : start + BATCH_SIZE]
                scores = family.logits(live, preprocess([rows[row] for row in part]), head)
                for row, values in zip(part, scores.tolist(), strict=True):
                    found[row] = values[: len(rows[row].choices)]
        return found

    return score


def theirs(model: Path, batch_size: int) -> Score:
    """Score rows with lm-eval's HFLM."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    live: Any = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=batch_size)

    def score(rows: Sequence[Example]) -> Scores:
        requests = [
            Instance("loglikelihood", {}, (row.inputs[0], f" {choice}"), number)
            for row in rows
            for number, choice in enumerate(row.choices)
        ]
        values = iter(live.loglikelihood(requests, disable_tqdm=True))
        return [[float(next(values)[0]) for _ in row.choices] for row in rows]

    return score


def fastest(model: Path, rows: Sequence[Example], sizes: Sequence[int]) -> tuple[int, Score]:
    """The batch size with which lm-eval is fastest on some rows."""
    if len(sizes) == 1:
        return sizes[0], theirs(model, sizes[0])
    found = []
    for size in sizes:
        score = theirs(model, size)
        score(rows[:4])  # the first call is slower
        found.append((timed(score, rows)[0], size, score))
    _, size, score = min(found, key=lambda one: one[:2])
    return size, score


def timed(score: Score, rows: Sequence[Example]) -> tuple[float, Scores]:
    """Seconds and scores."""
    began = time.perf_counter()
    scores = score(rows)
    return time.perf_counter() - began, scores


def compare(
    task: str, model: Path, rows: Sequence[Example], repeats: int, sizes: Sequence[int]
) -> Compared:
    """Score the rows with both, in turns."""
    size, other = fastest(model, rows[:TRIED_ROWS], sizes)
    own = ours(model)
    for score in (own, other):
        score(rows[:4])  # the first call is slower
    runs = [(timed(own, rows), timed(other, rows)) for _ in range(repeats)]
    (_, mine), (_, reference) = runs[0]
    pairs = [p for a, b in zip(mine, reference, strict=True) for p in zip(a, b, strict=True)]
    return Compared(
        task,
        len(rows),
        max(abs(a - b) for a, b in pairs),
        accuracy(mine, rows),
        accuracy(reference, rows),
        median(first[0] for first, _ in runs),
        median(second[0] for _, second in runs),
        size,
    )


def accuracy(scores: Scores, rows: Sequence[Example]) -> float:
    """The share of rows whose right choice has the highest score."""
    best = [values.index(max(values)) for values in scores]
    return sum(a == row.label for a, row in zip(best, rows, strict=True)) / len(rows)


def share_of_all(found: Sequence[Compared]) -> float:
    """Our time for all tasks over that of lm-eval."""
    return sum(one.seconds for one in found) / sum(one.seconds_lm_eval for one in found)


def show(found: Sequence[Compared]) -> None:
    """Print the figures as a table."""
    table = Table("task", "rows", "difference", "accuracy", "lm-eval", "s", "lm-eval", "share")
    for one in found:
        table.add_row(
            one.task,
            str(one.rows),
            f"{one.difference:.1e}",
            f"{one.accuracy:.4f}",
            f"{one.accuracy_lm_eval:.4f}",
            f"{one.seconds:.1f}",
            f"{one.seconds_lm_eval:.1f} (batch {one.batch_size})",
            f"{one.share:.2f}",
            style=None if one.is_same else "red",
        )
    Console(width=100).print(table)
    share = share_of_all(found)
    print(f"all tasks: {share:.2f} of lm-eval's time, goal: at most {MOST_TIME}")


def main() -> None:
    """Run the comparison from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lm_eval")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "words"])
    parser.add_argument("--rows", type=int, default=500, help="test rows of each task")
    parser.add_argument("--shots", type=int, default=0, help="examples before each prompt")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES)
    parser.add_argument("--repeats", type=int, default=3, help="turns for each median")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    found = []
    for task in options.tasks:
        rows = read_rows(options.data / task, options.rows, options.shots)
        sizes = options.batch_sizes
        found.append(compare(task, options.model, rows, options.repeats, sizes))
        print(found[-1], flush=True)
    show(found)
    if options.json is not None:
        tasks = [asdict(one) | {"share": one.share} for one in found]
        text = json.dumps({"tasks": tasks, "share": share_of_all(found)}, indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")
    if not all(one.is_same for one in found) or share_of_all(found) > MOST_TIME:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
