"""What `import restitch` offers."""

import subprocess
import sys
from pathlib import Path

import restitch
from tests.shell import Shell
from tests.worlds import World


def test_importing_restitch_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'mlflow', 'prefect', 'pydantic'}"
    code = f"import restitch, sys; print(*{heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_public_name_is_there() -> None:
    assert all(callable(getattr(restitch, name)) for name in restitch.__all__)


def test_a_line_is_made_merged_and_exported_from_python(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    with shell.inside():
        restitch.init_line(world.line(tmp_path / "line.yaml"))
        outcome = restitch.register("demo", world.task("colour"), str(world.model("colour")))
        assert outcome.onboarded.state == "ready"
        restitch.export_version("demo", "champion", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
