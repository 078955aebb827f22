"""Help, mistakes and looking at a line need no heavy library and no server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from restitch import __version__
from restitch.cli.main import PANELS
from tests.conftest import Three
from tests.shell import Shell
from tests.tiny_models import tiny_decoder, tweaked
from tests.worlds import World

HEAVY = ("mlflow", "torch", "transformers", "prefect", "datasets", "sqlalchemy", "numpy", "PIL")

# Every command runs in a process of its own, which is forked when the command line is imported.
PROBE = f"""
import json, os, sys, tempfile
from restitch.cli.main import main

def run(words):
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as found:
        child = os.fork()
        if not child:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            sys.argv[1:] = words
            code = 0
            try:
                main()
            except SystemExit as end:
                code = end.code or 0
            sys.stdout.flush()
            sys.stderr.flush()
            json.dump([code, sorted(set({HEAVY!r}) & set(sys.modules))], found)
            found.flush()
            os._exit(0)
        os.waitpid(child, 0)
        printed.seek(0)
        found.seek(0)
        return [*json.loads(found.read() or "[null, []]"), printed.read()]

print(json.dumps([run(words) for words in json.load(sys.stdin)]))
"""

TASK = "TASK"  # stands for the path of a task file
COMMANDS = {
    ("--help",): (0, "Get started"),
    ("--version",): (0, f"restitch {__version__}"),
    ("register", "--help"): (0, "--replace-task"),
    ("status",): (0, "champion 3"),
    ("history", "demo"): (0, "promoted"),
    ("show", "demo", "--json"): (0, '"version": 3'),
    ("rgister",): (2, "register"),
    ("remerge", "demo", "--forced"): (2, "--force"),
    ("export", "demo", "champion"): (2, "the folder to write is missing"),
    ("status", "dmeo"): (3, "there is no line 'dmeo'"),
    ("remerge", "dmeo"): (3, "there is no line 'dmeo'"),
    ("export", "dmeo", "champion", "out"): (3, "there is no line 'dmeo'"),
    ("export", "demo", "9", "out"): (3, "line demo has no version 9"),
    ("diff", "demo", "1", "nine"): (3, "'nine' is not a version"),
    ("retire", "demo", "colur", "--reason", "old"): (3, "line demo has no task colur"),
    ("retire", "dmeo", "colour", "--reason", "old"): (3, "there is no line 'dmeo'"),
    ("register", "dmeo", "--task", TASK, "--model", "org/name"): (3, "there is no line 'dmeo'"),
    ("register", "demo", "--task", "no.yaml", "--model", "org/name"): (3, "no.yaml"),
    ("register", "demo", "--task", TASK, "--model", "./no-model"): (3, "./no-model"),
    ("task", "demo", "--task", "no.yaml"): (3, "no.yaml"),
    ("init", "no.yaml"): (3, "no.yaml"),
    ("analyze", "demo", "--densities", "few"): (3, "'few' is not a number"),
}


Probed = dict[tuple[str, ...], tuple[int, list[str], str]]


@pytest.fixture(scope="module")
def probed(three: Three, world: World) -> Probed:
    """The exit code, the heavy modules and the output of each command."""
    task = str(world.task("colour"))
    asked = [[task if word == TASK else word for word in words] for words in COMMANDS]
    with three.shell.inside():
        done = subprocess.run(
            [sys.executable, "-c", PROBE],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    return dict(zip(COMMANDS, map(tuple, json.loads(done.stdout)), strict=True))


@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_nothing_heavy_is_imported_before_the_arguments_are_checked(
    probed: Probed, args: tuple[str, ...]
) -> None:
    code, text = COMMANDS[args]
    assert probed[args][:2] == (code, [])
    assert text in probed[args][2]


def test_a_known_base_is_merged_without_transformers(shell: Shell, tmp_path: Path) -> None:
    base, finetuned = tmp_path / "base", tmp_path / "finetuned"
    tiny_decoder(base, "llama")
    tweaked(base, finetuned, seed=1, size=0.2, globs=("*",))
    file = finetuned / "config.json"
    config = json.loads(file.read_text()) | {"_name_or_path": "base", "use_cache": False}
    file.write_text(json.dumps(config))
    words = ["merge", "--base", base, "--model", f"a={finetuned}", "--method", "ties", "--out"]
    first = shell(*words, tmp_path / "first").out
    script = "import sys; from restitch.cli.main import main\ntry: main()\n"
    script += "finally: print('transformers' in sys.modules)"
    second = shell.python(script, *words, tmp_path / "second").out.splitlines()
    assert second[-1] == "False"
    assert second[:-1] == first.replace("first", "second").splitlines()


def test_looking_needs_no_mlflow(three: Three) -> None:
    shell = Shell(three.shell.home, {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"})
    assert shell.json("status", "demo")["lines"][0]["champion"] == 3


def test_help_shows_every_command_in_its_panel(three: Three) -> None:
    page = three.shell("--help").out
    panels = [page.index(f"─ {panel} ─") for panel in PANELS]
    assert panels == sorted(panels)
    for start, commands in zip(panels, PANELS.values(), strict=True):
        for command in commands:
            assert f"│ {command.__name__} " in page[start:]


def test_without_a_command_the_first_three_steps_are_shown(tmp_path: Path) -> None:
    page = Shell(tmp_path)().out
    steps = [page.index(f"restitch {command}") for command in ("init", "register", "status")]
    assert steps == sorted(steps)
    assert "restitch --help" in page


def completed(shell: Shell, instruction: str, **variables: str) -> str:
    environment = {**os.environ, **variables, "_RESTITCH_COMPLETE": instruction}
    return shell.process(environment=environment).out


@pytest.mark.parametrize(
    ("name", "sign"),
    [("bash", "complete -o default"), ("zsh", "#compdef restitch"), ("fish", "complete --command")],
)
def test_each_shell_gets_a_completion_script(three: Three, name: str, sign: str) -> None:
    script = completed(three.shell, f"source_{name}")
    assert sign in script
    assert "_RESTITCH_COMPLETE" in script


@pytest.mark.parametrize(
    ("words", "expected"),
    [("restitch remer", "remerge"), ("restitch status d", "demo"), ("restitch show demo ch", "ch")],
)
def test_commands_and_names_of_lines_are_completed(three: Three, words: str, expected: str) -> None:
    last = str(len(words.split()) - 1)
    out = completed(three.shell, "complete_bash", COMP_WORDS=words, COMP_CWORD=last)
    assert out.splitlines()[0].startswith(expected)


def test_tables_in_a_pipe_are_not_wrapped(three: Three) -> None:
    members = three.shell.json("show", "demo")["members"]
    lines = three.shell.process("show", "demo").out.splitlines()
    for task, member in members.items():
        (row,) = [line for line in lines if line.startswith(task) and member["uri"] in line]
        assert len(row) > 80
        assert member["weights"][:12] in row
