"""Which engine a flow uses: Prefect where a server runs, and none otherwise."""

import json
from pathlib import Path

import pytest

from tests.conftest import NewHome, Three
from tests.servers import free_port
from tests.shell import Shell
from tests.worlds import World


def test_a_stopped_server_in_the_stack_file_means_embedded_mode(
    world: World, new_home: NewHome, tmp_path: Path
) -> None:
    shell = new_home("home")
    url = f"http://127.0.0.1:{free_port()}/api"
    (shell.home / "stack.json").write_text(json.dumps({"prefect_api_url": url}))
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    assert shell.add(world, "colour")["merged"]["action"] == "promoted"


def test_a_named_server_that_cannot_be_reached_is_exit_code_6(three: Three) -> None:
    url = f"http://user:secret@127.0.0.1:{free_port()}/api"
    shell = Shell(three.shell.home, {"PREFECT_API_URL": url})
    done = shell.process("remerge", "demo", code=6)
    assert "Prefect server" in done.err
    assert "secret" not in done.err


def test_a_server_named_after_prefect_was_imported_is_used(three: Three) -> None:
    from prefect.settings import PREFECT_API_URL

    from restitch.flows.remerge import remerge
    from restitch.merging.errors import Unavailable

    url = f"http://127.0.0.1:{free_port()}/api"
    shell = Shell(three.shell.home, {"PREFECT_API_URL": url})
    assert PREFECT_API_URL.value() != url, "Prefect has read its settings before"
    with shell.inside(), pytest.raises(Unavailable, match=url):
        remerge("demo")
    assert PREFECT_API_URL.value() != url


@pytest.mark.parametrize("text", ["", "{", "[]", '{"prefect_api_url": 7}', '{"url": "x"}'])
def test_a_broken_stack_file_means_embedded_mode(tmp_path: Path, text: str) -> None:
    from restitch.tasks.runtime.engine import engine_url

    (tmp_path / "stack.json").write_text(text)
    with Shell(tmp_path).inside():
        assert engine_url() is None


def test_the_users_own_prefect_profile_is_not_used(tmp_path: Path) -> None:
    from restitch.tasks.runtime.engine import engine_url

    profile = 'active = "x"\n[profiles.x]\nPREFECT_API_URL = "http://127.0.0.1:1/api"\n'
    (tmp_path / "profiles.toml").write_text(profile)
    with Shell(tmp_path, {"PREFECT_HOME": str(tmp_path)}).inside():
        assert engine_url() is None
