"""Run the commands of docs/tutorial.md; the page holds their output.

python -m tests.docs.tutorial        (writes the output into the page)
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.shell import ROOT

PAGE = ROOT / "docs" / "tutorial.md"
FOLDER = ROOT / ".demo" / "tutorial"
_BLOCK = re.compile(r"(?<=```console\n).*?(?=```\n)", re.DOTALL)


def run(page: str) -> str:
    """The page with the output that its commands print now."""
    for name in (".restitch", "merged"):  # the world takes minutes and is made once
        shutil.rmtree(FOLDER / name, ignore_errors=True)
    (FOLDER / "line.yaml").unlink(missing_ok=True)
    folder = ROOT

    def outputs(block: "re.Match[str]") -> str:
        nonlocal folder
        parts = []
        for command in re.findall(r"^\$ (.*)\n", block[0], re.MULTILINE):
            parts.append(f"$ {command}\n")
            if command.startswith("cd "):
                folder = folder / command.removeprefix("cd ")
            else:
                parts.append(_output(command, folder))
        return "".join(parts)

    return _BLOCK.sub(outputs, page)


def _output(command: str, folder: Path) -> str:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "100",
        "RESTITCH_ACTOR": "you",
    }
    done = subprocess.run(
        ["bash", "-c", f"{command} 2>&1"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    text = done.stdout.replace(str(FOLDER), ".../tutorial").replace(str(ROOT), "...")
    lines = [line.rstrip() for line in text.splitlines() if "━" not in line]  # no progress bars
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(run(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
