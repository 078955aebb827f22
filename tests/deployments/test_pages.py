"""The pages for operators match the code."""

import ast
import re
from uuid import uuid4

import pytest
import yaml

from restitch.deployments.local.doctor import VERSIONS
from restitch.deployments.server.definitions import WORKER_ENVIRONMENT, automations
from tests.deployments.compose import FOLDER, services
from tests.shell import ROOT

OPERATIONS = ROOT / "docs" / "operations.md"
KUBERNETES = FOLDER / "kubernetes.md"


def words(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def warnings() -> list[str]:
    """The longest fixed piece of each warning in the code that runs unattended."""
    found = []
    for package in ("flows", "tasks", "deployments"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id == "warn"
                    and isinstance(node.args[0], ast.JoinedStr)
                ):
                    pieces = [
                        str(part.value).strip(" :(")
                        for part in node.args[0].values
                        if isinstance(part, ast.Constant)
                    ]
                    found.append(max(pieces, key=len))
    return [piece for piece in found if len(piece) > 4]


def test_there_are_warnings_to_explain() -> None:
    assert len(warnings()) >= 10


@pytest.mark.parametrize("piece", warnings())
def test_every_warning_is_explained(piece: str) -> None:
    start = words(piece).split(",")[0].split(";")[0]
    assert start in words(OPERATIONS.read_text(encoding="utf-8"))


def test_every_automation_and_check_is_explained() -> None:
    page = words(OPERATIONS.read_text(encoding="utf-8"))
    for wanted in automations(uuid4(), uuid4()):
        if "registered model" not in wanted.name and "new mask" not in wanted.name:
            assert f"`{wanted.name}`" in page
    for name in ("python", "home", "disk", "store", "device", *(name for name, *_ in VERSIONS)):
        assert f"`{name}`" in page


def test_the_objects_for_kubernetes_give_workers_what_compose_gives_them() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", KUBERNETES.read_text(encoding="utf-8"), re.DOTALL)
    objects = [each for block in blocks for each in yaml.safe_load_all(block)]
    by_kind = {each["kind"]: each for each in objects}
    [container] = by_kind["Deployment"]["spec"]["template"]["spec"]["containers"]
    own = {each["name"]: each.get("value") for each in container["env"]}
    assert WORKER_ENVIRONMENT.items() <= own.items()
    names = {*own, *by_kind["Secret"]["stringData"], *by_kind["ConfigMap"]["data"]}
    composed = services()["worker-gpu"]
    assert names >= set(composed["environment"]) - {"HF_TOKEN"}
    assert container["image"].startswith("restitch-gpu:")
    flags = set(re.findall(r"--[a-z-]+", composed["command"][-1]))
    assert flags == set(re.findall(r"--[a-z-]+", container["args"][0]))
