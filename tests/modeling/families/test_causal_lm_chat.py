"""Prompts of causal language models as turns of a chat."""

import json
from datetime import date
from pathlib import Path

import pytest
import torch

from restitch.merging.errors import BadInput
from restitch.modeling.data.rows import Example, Prompt, Rows
from restitch.modeling.data.tables import ListTable
from restitch.modeling.families.family import get_family
from restitch.modeling.pretrained_files import load_tokenizer
from restitch.registry.specs.head import HeadSpec
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.checkpoints import assets_digest
from restitch.tasks.inputs.task_data import description_digest
from tests.tiny_models import tiny_decoder

FAMILY = get_family("causal-lm")
TURNS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
ANSWER = "{% if add_generation_prompt %}[assistant]{% endif %}"


def chat_folder(folder: Path, template: str | None, *, bos: bool = False) -> Path:
    """A decoder with a chat template, or without one."""
    tiny_decoder(folder, bos=bos)
    file = folder / "chat_template.jinja"
    if template is None:
        file.unlink()
    else:
        file.write_text(template)
    return folder


def asked(text: str, *choices: str, chat: bool = True) -> Example:
    return Example((text,), None, f"row {text!r}", choices, chat)


def read(folder: Path, example: Example) -> tuple[str, list[str]]:
    """The prompt and the answers as the model reads them."""
    tokenizer, batch = load_tokenizer(folder), FAMILY.preprocessor(folder)([example])
    lengths = batch["answer_length"][0].tolist()
    answers = [row[:length] for row, length in zip(batch["answers"][0], lengths, strict=True)]
    return tokenizer.decode(batch["prompt"][0]), [tokenizer.decode(answer) for answer in answers]


def test_the_prompt_is_a_turn_of_the_user_and_the_answer_follows_without_a_space(tmp_path) -> None:
    folder = chat_folder(tmp_path, TURNS + ANSWER)
    prompt, answers = read(folder, asked("is it ", "blue", "red"))
    assert prompt == "[user]is it \n[assistant]"
    assert answers == ["blue", "red"]


def test_white_space_at_the_end_of_the_template_belongs_to_the_answer(tmp_path) -> None:
    folder = chat_folder(tmp_path, TURNS + ANSWER.replace("]{%", "]\n{%"))
    assert read(folder, asked("is it", "blue", "red")) == (
        "[user]is it\n[assistant]",
        ["\nblue", "\nred"],
    )


@pytest.mark.parametrize("bos", [False, True])
def test_bos_comes_once_from_the_template_or_the_tokenizer(tmp_path, bos) -> None:
    for name, start in (("with", "{{ bos_token }}"), ("without", "")):
        folder = chat_folder(tmp_path / name, start + TURNS + ANSWER, bos=bos)
        prompt, _ = read(folder, asked("is it", "blue", "red"))
        assert prompt.count("<s>") == (1 if bos or start else 0)


def test_a_date_in_a_template_is_the_same_every_day(tmp_path) -> None:
    for name, today in (
        (
            "llama",
            "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y')"
            " %}{% endif %}{{ date_string }}",
        ),
        ("own", "{{ strftime_now('%d %b %Y') }}"),
    ):
        folder = chat_folder(tmp_path / name, today + ANSWER)
        prompt, _ = read(folder, asked("is it", "blue", "red"))
        assert prompt == "26 Jul 2024[assistant]"
        assert str(date.today().year) not in prompt


def test_scores_are_those_of_the_whole_chat_as_a_prompt(tmp_path) -> None:
    folder = chat_folder(tmp_path, TURNS + ANSWER.replace("]{%", "]\n{%"))
    model, spec = FAMILY.load(folder), HeadSpec(labels=("a", "b"))
    head, preprocess = FAMILY.build_head(model, folder, spec), FAMILY.preprocessor(folder)
    chats = preprocess([asked("is it", "blue", "red")])
    whole = preprocess([asked("[user]is it\n[assistant]\n", "blue", "red", chat=False)])
    with torch.no_grad():
        found, expected = (FAMILY.logits(model, batch, head) for batch in (chats, whole))
    assert torch.equal(found, expected)


def test_a_long_chat_loses_its_beginning(tmp_path) -> None:
    folder = chat_folder(tmp_path, TURNS + ANSWER)
    batch = FAMILY.preprocessor(folder)([asked("x" * 200, "blue", "red")])
    assert int(batch["cut"][0]) > 100
    assert load_tokenizer(folder).decode(batch["prompt"][0]).endswith("xx\n[assistant]")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template, which chat: true needs"),
        ("{{ raise_exception('system first') }}", "cannot be applied to a turn of the user"),
    ],
)
def test_a_base_without_a_usable_template_is_refused(tmp_path, template, message) -> None:
    folder = chat_folder(tmp_path, template)
    with pytest.raises(BadInput, match=message):
        FAMILY.resolve(folder, HeadSpec(labels=("a", "b"), chat=True))
    FAMILY.resolve(folder, HeadSpec(labels=("a", "b")))


def test_the_template_belongs_to_the_digest_of_the_base_wherever_it_lies(tmp_path) -> None:
    folder = chat_folder(tmp_path, TURNS + ANSWER)
    digests = [assets_digest(FAMILY, folder)]
    (folder / "chat_template.jinja").write_text(TURNS)
    digests.append(assets_digest(FAMILY, folder))
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for template in (TURNS, ANSWER):
        changed = json.dumps({**config, "chat_template": template})
        (folder / "tokenizer_config.json").write_text(changed)
        digests.append(assets_digest(FAMILY, folder))
    assert len(set(digests)) == 4


def test_rows_say_if_they_are_turns_of_a_chat() -> None:
    table = ListTable("rows", Path(), {"q": ["one"]})
    for chat in (False, True):
        rows = Rows(table, ("q",), None, ("a", "b"), "text", prompt=Prompt("{q}?", chat=chat))
        assert rows[0].inputs == ("one?",)
        assert rows[0].chat is chat


def task(**values: object) -> TaskSpec:
    return TaskSpec.model_validate({"task": "t", "prompt": "{q}", "choices": ["a", "b"], **values})


def test_a_task_without_a_chat_keeps_its_digest() -> None:
    assert description_digest(task()) == description_digest(task(chat=False))
    assert description_digest(task()) != description_digest(task(chat=True))
    assert task().head_spec == task(chat=False).head_spec
    assert task(chat=True).head_spec.chat is True


def test_a_chat_needs_a_prompt() -> None:
    with pytest.raises(ValueError, match="'chat' needs 'prompt'"):
        TaskSpec.model_validate({"task": "t", "chat": True})
