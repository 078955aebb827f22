"""A copy of the store is enough to continue, as docs/how-to/recover.md says."""

import shutil
from pathlib import Path

from restitch.registry.home import Home
from restitch.registry.mlflow.connection import connect
from tests.conftest import NewHome, Three


def test_a_copy_of_the_store_restores_a_line_and_its_projection_in_mlflow(
    three: Three, new_home: NewHome, tmp_path: Path
) -> None:
    restored = new_home("restored")
    # Heads first: all that they name is there before them, so the rest may be copied later.
    source = three.shell.home / "store"
    shutil.copytree(source / "lines", restored.home / "store" / "lines")
    shutil.copytree(source, restored.home / "store", dirs_exist_ok=True)

    assert restored.json("remerge", "demo")["action"] == "unchanged"
    assert restored.head_bytes() == three.shell.head_bytes()
    assert restored.patch_bytes() == three.shell.patch_bytes()
    for shell, name in ((three.shell, "expected"), (restored, "out")):
        shell("export", "demo", "champion", tmp_path / name)
    weights = [tmp_path / name / "model.safetensors" for name in ("expected", "out")]
    assert weights[0].read_bytes() == weights[1].read_bytes()

    def image(home: Path) -> dict[str, list[dict[str, str]]]:
        client = connect(Home(home))
        named = sorted(client.search_registered_models(), key=lambda model: model.name)
        return {
            model.name: [
                {k: v for k, v in one.tags.items() if "uri" not in k}
                for one in sorted(
                    client.search_model_versions(f"name='{model.name}'"),
                    key=lambda one: int(one.version),
                )
            ]
            for model in named
        }

    assert image(restored.home) == image(three.shell.home)
