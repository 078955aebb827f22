"""Memory of registering a language model: with evaluation, and with masks and merging alone.

`python -m benchmarks.memory [--params 1.1e9] [--mode dataless] [--parts PART,PART] [--json FILE]
[--folder DIR]` makes a Llama-shaped bf16 base and a finetuned model with random weights in a
temporary folder (about four bytes per parameter) and runs `restitch register` in processes of
their own:

- `rows`: with a task of choices, 50 rows, once with `compute: float32` and once with `bfloat16`;
- `masks` and `subspaces`: with a task without data, which is localized, merged and published, and
  not evaluated. What a tiny model needs for the same, which is Python with its libraries, is
  subtracted;
- `grams`: with the task of choices; then the Gram matrices of the inputs of all linear layers are
  measured in processes of their own, part by part, and as a reference with the whole model;
- `gradients`: one backward pass of all localizable weights, in processes of their own: with all
  gradients kept or with each dropped as soon as it is complete, and both with activations that
  are computed again.

Memory is the peak of anonymous pages (`RssAnon`) of the whole process, sampled every few
milliseconds. Mapped files do not count: the system reclaims their pages.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.speed import (
    HIDDEN,
    INTERMEDIATE,
    KV,
    VOCABULARY,
    Figure,
    Shapes,
    count,
    llama_shapes,
    make_models,
    show,
)
from restitch.merging.files.checkpoint import Checkpoint

ROWS = 50
HEAD = 64  # the width of an attention head
MODEL = "tuned"
SIZES = ("large", "tiny")
PARTS = ("rows", "masks", "subspaces", "grams", "gradients")
GRAM_LIMIT = 1.5e9  # bytes
# Measures the Gram matrices of the one model of a line, as `register` does.
GRAMS = """
import sys, time
from pathlib import Path
from restitch.flows.promotion.versions import member_of
from restitch.merging.errors import BadInput
from restitch.registry.ledger.ledger import Ledger
from restitch.tasks import statistics
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import workspace

def whole(*_):
    raise BadInput("the reference")

file, mode = sys.argv[1:]
if mode == "whole":
    statistics.streamed_base = whole
space = workspace()
state = Ledger(space.objects, "memory").state()
statistic = statistics.Statistic(statistics.GRAM, (member_of(state, "parity", 1),))
began = time.perf_counter()
statistics.write_statistic_of(Path(file), LineRef(state.spec, state.base), statistic, space)
print(time.perf_counter() - began)
"""
# Runs one backward pass; weights are not counted.
GRADIENTS = """
import sys
from contextlib import ExitStack
from pathlib import Path
import torch
from restitch.merging.files.coordinates import select_tensors
from restitch.merging.localize.live_weights import consuming_gradients, requiring_gradients
from restitch.modeling.families.family import get_family
from restitch.modeling.gradients import checkpointed
from restitch.tasks.runtime.memory import memory_added

folder, mode, tokens = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
family = get_family("causal-lm")
model = family.load(folder, torch.bfloat16)
live = family.parameters(model)
names = select_tensors(list(live), family.localizable)
given = torch.arange(4 * tokens).view(4, tokens) % 1000
with ExitStack() as block:
    block.enter_context(requiring_gradients(live, names))
    if not mode.startswith("kept"):
        pairs = [(name, live[name]) for name in names]
        block.enter_context(consuming_gradients(pairs, lambda name: None))
    if mode.endswith("again"):
        block.enter_context(checkpointed(model))
    peak = block.enter_context(memory_added())
    output = model.inner(input_ids=given, labels=given, use_cache=False)
    torch.autograd.backward(output.loss)
print(peak.added)
"""
TOKENS = 256  # of each of the four rows


@dataclass(frozen=True)
class Run:
    """A registration: its peak of anonymous memory in bytes, and its seconds."""

    peak: int
    seconds: float


def make_large(folder: Path, params: float) -> int:
    """Make `base` and a finetuned model of about this many weights; return their number."""
    shapes = llama_shapes(params)
    make_models(folder, shapes, (MODEL,), torch.bfloat16)
    config = llama_config(shapes)
    for name in ("base", MODEL):
        config.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return count(shapes)


def llama_config(shapes: Shapes) -> LlamaConfig:
    """The configuration of a Llama with these tensors, in bfloat16."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=sum(name.endswith("q_proj.weight") for name in shapes),
        num_attention_heads=HIDDEN // HEAD,
        num_key_value_heads=KV // HEAD,
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def make_tiny(folder: Path) -> None:
    """Make a base and a finetuned model of a few thousand weights."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name in ("base", MODEL):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.model.layers.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*alphabet, "<unk>"))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<unk>", model_max_length=2048
    )


def choice_task(folder: Path) -> dict[str, Any]:
    """A task of choices with the same rows for test and train."""
    folder.mkdir()
    rows = [json.dumps({"n": f"{7919 * n % 1009}", "label": n % 2}) for n in range(ROWS)]
    for split in ("test", "train"):
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {
        "task": "parity",
        "data": {"path": str(folder), "train": "train.jsonl", "test": "test.jsonl"},
        "prompt": "Is {n} odd?",
        "choices": ["no", "yes"],
    }


def register(folder: Path, task: Mapping[str, Any], **line: Any) -> Run:
    """Run `restitch register` in a fresh home on the models of a folder, and watch its memory."""
    with registered(folder, task, **line) as (_, run):
        return run


@contextmanager
def registered(folder: Path, task: Mapping[str, Any], **line: Any) -> Iterator[tuple[Path, Run]]:
    """A fresh home where the finetuned model of a folder is registered, within a block."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="home-") as home:
        values = {"line": "memory", "base": str(folder / "base"), "family": "causal-lm"}
        files = {"line": {**values, "method": "localize-and-stitch", **line}, "task": dict(task)}
        for name, content in files.items():
            text = yaml.safe_dump(content, sort_keys=False)
            (Path(home) / f"{name}.yaml").write_text(text, encoding="utf-8")
        start = [sys.executable, "-c", "from restitch.cli.main import main; main()"]
        run_in_home([*start, "init", Path(home) / "line.yaml"], Path(home))
        options = ["--task", Path(home) / "task.yaml", "--model", folder / MODEL]
        # Random weights have no skill.
        options += ["--accept-no-gain", "--reason", "benchmark"]
        yield Path(home), run_in_home([*start, "register", "memory", *options], Path(home))


def run_in_home(command: Sequence[object], home: Path) -> Run:
    """Run a process in a home, and watch its memory."""
    environment = {**os.environ, "RESTITCH_HOME": str(home), "RESTITCH_DEVICE": "cpu"}
    log = home / "log"
    began = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=out, stderr=subprocess.STDOUT
        )
        peak = watched(process)
    if process.returncode:
        raise SystemExit(log.read_text(encoding="utf-8"))
    return Run(peak, time.perf_counter() - began)


def watched(process: subprocess.Popen[bytes]) -> int:
    """The peak of a process's anonymous memory until it ends."""
    peak = 0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines()
        except OSError:
            break
        peak = max([peak, *(int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon:"))])
        time.sleep(0.005)
    process.wait()
    return peak


def with_rows(folder: Path, numbers: int, mode: str) -> list[Figure]:
    """Register with a task of choices in both types."""
    size, task = 4 * numbers, choice_task(folder / "data")
    most = (1.3 * size + 1e9) / 1e9 if mode == "dataless" else None
    figures = []
    for compute in ("float32", "bfloat16"):
        run = register(folder / "large", task, compute=compute, localize={"mode": mode})
        what = f"register, mode: {mode}, compute: {compute}"
        figures += [
            Figure(what, run.peak / 1e9, "GB", most),
            Figure(f"{what}, over the float32 model", run.peak / size, "x"),
            Figure(f"{what}, time", run.seconds, "s"),
        ]
    return figures


def without_data(folder: Path, what: str, most: float, **line: Any) -> list[Figure]:
    """Register without data, and compare with a tiny model; `most` is in GB."""
    large, tiny = (register(folder / name, {"task": "parity"}, **line) for name in SIZES)
    return [
        Figure(f"{what}: register without data", large.peak / 1e9, "GB"),
        Figure(f"{what}: the same with a tiny model", tiny.peak / 1e9, "GB"),
        Figure(f"{what}: localizing and merging", (large.peak - tiny.peak) / 1e9, "GB", most),
        Figure(f"{what}: register without data, time", large.seconds, "s"),
    ]


def with_grams(folder: Path) -> list[Figure]:
    """Measure Gram matrices part by part and with the whole model, and compare them."""
    task = choice_task(folder / "rows-of-grams")
    runs, files = {}, {name: folder / f"{name}.safetensors" for name in ("parts", "whole")}
    # Ten rows: each costs seconds, and memory hardly depends on them.
    few = {"mode": "dataless", "shots": 5}
    with registered(folder / "large", task, localize=few) as (home, _):
        for name, file in files.items():
            runs[name] = run_in_home([sys.executable, "-c", GRAMS, file, name], home)
    apart = largest_difference(*map(Checkpoint.open, files.values()))
    size = files["parts"].stat().st_size
    return [
        Figure("grams: the matrices in a file", size / 1e9, "GB"),
        Figure("grams: part by part", runs["parts"].peak / 1e9, "GB", GRAM_LIMIT / 1e9),
        Figure("grams: with the whole model in float32", runs["whole"].peak / 1e9, "GB"),
        Figure("grams: part by part, time", runs["parts"].seconds, "s"),
        Figure("grams: with the whole model, time", runs["whole"].seconds, "s"),
        Figure("grams: largest difference, of a matrix's largest entry", apart, "x", 1e-5),
    ]


def with_gradients(folder: Path) -> list[Figure]:
    """Measure one backward pass in bfloat16 in four ways."""
    base, added = folder / "large" / "base", {}
    for mode in ("kept", "dropped", "kept again", "dropped again"):
        command = [sys.executable, "-c", GRADIENTS, str(base), mode, str(TOKENS)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        added[mode] = int(done.stdout.split()[-1])
    return [
        Figure("gradients: kept, beyond the weights", added["kept"] / 1e9, "GB"),
        Figure("gradients: each dropped at once", added["dropped"] / 1e9, "GB"),
        Figure("gradients: kept, activations again", added["kept again"] / 1e9, "GB"),
        Figure("gradients: dropped, activations again", added["dropped again"] / 1e9, "GB"),
        Figure("gradients: dropped, of kept", added["dropped"] / added["kept"], "x"),
        Figure(
            "gradients: dropped and again, of kept", added["dropped again"] / added["kept"], "x"
        ),
    ]


def largest_difference(one: Checkpoint, other: Checkpoint) -> float:
    """The largest difference of two statistics, relative to the largest entry of its tensor."""
    assert one.names == other.names
    pairs = ((one.tensor(name), other.tensor(name)) for name in one.names)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def measure(
    folder: Path, params: float, mode: str, parts: Sequence[str], console: Console
) -> list[Figure]:
    """Make the models and measure the parts."""
    for name in SIZES:
        (folder / name).mkdir()
    numbers = make_large(folder / "large", params)
    console.print(f"made two models of {numbers / 1e9:.2f} B weights")
    make_tiny(folder / "tiny")
    largest = 2 * VOCABULARY * HIDDEN
    made: dict[str, Callable[[], list[Figure]]] = {
        "rows": lambda: with_rows(folder, numbers, mode),
        "masks": lambda: without_data(
            folder, "masks", (0.6e9 + largest) / 1e9, localize={"mode": "dataless"}
        ),
        "subspaces": lambda: without_data(
            folder, "subspaces", 1.0, method="tsv-m", localize={"mode": "subspace"}
        ),
        "grams": lambda: with_grams(folder),
        "gradients": lambda: with_gradients(folder),
    }
    figures = [Figure("float32 model", 4 * numbers / 1e9, "GB")]
    for part in parts:
        console.print(f"measuring {part}")
        figures += made[part]()
    return figures


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--params", type=float, default=1.1e9, help="number of weights")
    parser.add_argument("--mode", default="dataless", help="how masks are found with the task")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder")
    arguments = parser.parse_args()
    console = Console(width=100)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="restitch-memory-") as name:
        figures = measure(
            Path(name), arguments.params, arguments.mode, arguments.parts.split(","), console
        )
    show(figures, console)
    if arguments.json:
        text = json.dumps([asdict(figure) for figure in figures], indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if any(figure.limit is not None and figure.value > figure.limit for figure in figures):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
