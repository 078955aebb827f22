"""The page about notifications: Prefect accepts its automation, and its events exist."""

import re
from typing import get_args

import yaml

from restitch.registry.specs.line import NotifyEvent
from tests.docs.site import DOCS

PAGE = (DOCS / "how-to" / "notify.md").read_text(encoding="utf-8")


def test_prefect_accepts_the_automation_of_the_page() -> None:
    from prefect.events.schemas.automations import AutomationCore

    (text,) = (
        block for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "trigger" in block
    )
    automation = AutomationCore.model_validate(yaml.safe_load(text))
    known = {f"restitch.line.{event}" for event in get_args(NotifyEvent)}
    assert automation.trigger.model_dump()["expect"] <= known


def test_the_page_explains_every_event() -> None:
    assert re.findall(r"^\| `([\w-]+)` \|", PAGE, re.MULTILINE) == list(get_args(NotifyEvent))
