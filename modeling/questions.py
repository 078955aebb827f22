"""Questions as tokens: the prompt of a row and its choices, for families that read prompts.

The rules are those of lm-eval: a space stands between prompt and choice unless the prompt ends with
white space or is a turn of a chat, and white space at the end of the prompt is tokenized with the
choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restitch.merging.errors import BadInput
from restitch.modeling.configs import read_config
from restitch.modeling.data.rows import Example
from restitch.modeling.pretrained_files import load_tokenizer

# The embedding at this index is read and has no effect: it stands after all tokens that count.
PADDING = 0
# A chat template that writes today's date would give other scores every day: this macro replaces
# the function with a date that Llama's template names as well.
_DATE = {
    "%Y": "2024",
    "%m": "07",
    "%d": "26",
    "%b": "Jul",
    "%B": "July",
    "%A": "Friday",
    "%a": "Fri",
}
_SAME_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f".replace({key!r}, {value!r})" for key, value in _DATE.items())
    + " }}{% endmacro %}{{ '' }}"
)
# Where nothing else limits them, as in lm-eval.
_POSITIONS = 2048
_POSITION_KEYS = (
    "max_position_embeddings",
    "max_encoder_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
)


@dataclass(frozen=True)
class Question:
    """The tokens of a row.

    Attributes:
        prompt: its tokens, at least one.
        answers: the tokens of each choice; none for a choice that the row lacks.
        cut: the number of tokens that the prompt lost.
    """

    prompt: Sequence[int]
    answers: Sequence[Sequence[int]]
    cut: int


@dataclass(frozen=True)
class QuestionText:
    """The texts of a row.

    Attributes:
        prompt: without white space at its end.
        choices: each with the white space before it; None for a choice that the row lacks.
    """

    prompt: str
    choices: tuple[str | None, ...]

    @classmethod
    def of(cls, example: Example, tokenizer: Any) -> "QuestionText":
        """The texts of a row with one prompt, by the chat template if it is a turn of a chat."""
        if len(example.inputs) != 1:
            raise BadInput(
                f"{example.where}: a language model reads one prompt per row",
                found=f"{len(example.inputs)} input columns",
            )
        prompt = example.inputs[0]
        if example.chat:
            prompt = user_turn(tokenizer, prompt)
        context = prompt.rstrip()
        # The space between prompt and answer is tokenized with the answer. A chat template says
        # itself what stands before an answer.
        space = prompt[len(context) :] or ("" if example.chat else " ")
        choices = (None if choice is None else space + choice for choice in example.choices)
        return cls(context, tuple(choices))


def user_turn(tokenizer: Any, text: str) -> str:
    """A chat in which the user said a text and the model is to answer, by the chat template.

    Raises:
        BadInput: the tokenizer has no chat template, or it cannot be applied.
    """
    if not tokenizer.chat_template:
        raise BadInput(
            "the tokenizer of the base has no chat template, which chat: true needs",
            expected="chat_template.jinja, or chat_template in tokenizer_config.json",
            hint="leave out chat:, or use a base that was trained for chats",
        )
    try:
        found: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            chat_template=_SAME_DATE + tokenizer.get_chat_template(),
        )
    except Exception as error:  # a template of somebody else can raise any error
        raise BadInput(
            "the chat template of the base cannot be applied to a turn of the user",
            found=f"{type(error).__name__}: {error}",
            hint="leave out chat:, and write the whole chat into the prompt",
        ) from error
    return found


def tokens_of(tokenizer: Any, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """The tokens of texts, which go through the tokenizer at once.

    Args:
        tokenizer: of the base.
        texts: any number of them.
        special: with the tokens that the tokenizer puts around a text by itself.
    """
    if not texts:
        return []
    found: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=special, verbose=False
    ).input_ids
    return found


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and after every text by itself."""
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    starts = range(len(whole) - len(bare) + 1)
    at = next((s for s in starts if whole[s : s + len(bare)] == bare), 0)
    return whole[:at], whole[at + len(bare) :]


def check_answers(example: Example, answers: Sequence[Sequence[int]], limit: int) -> None:
    """Refuse answers that cannot be scored.

    Args:
        example: the row.
        answers: the tokens of its choices.
        limit: the most tokens that an answer may have.

    Raises:
        BadInput: an answer has no tokens, those of another one, or too many.
    """
    for index, (choice, answer) in enumerate(zip(example.choices, answers, strict=True)):
        if choice is None:
            continue
        if not answer or answer in answers[:index]:
            problem = "has no tokens" if not answer else "has the tokens of another choice"
            raise BadInput(
                f"{example.where}: the choice {choice!r} {problem}",
                expected="choices with different tokens of the base's tokenizer",
                found=f"tokens {answer}",
                hint="write the choice with other characters, or leave out the row",
            )
        if len(answer) > limit:
            raise BadInput(
                f"{example.where}: the choice {choice[:40]!r} is longer than the model reads",
                expected=f"at most {limit} tokens; an answer is never cut",
                found=f"{len(answer)} tokens",
                hint="raise max_length if the model reads more, or leave out the row",
            )


def first_of_nothing(tokenizer: Any) -> int | None:
    """The token before a text without a prompt: BOS, or else EOS; None if there is neither."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    found: int | None = eos if bos is None else bos
    return found


def not_empty(prompt: Sequence[int], tokenizer: Any, example: Example) -> Sequence[int]:
    """The tokens of a prompt; a prompt without any gets BOS, or else EOS.

    Raises:
        BadInput: the tokenizer has neither.
    """
    if prompt:
        return prompt
    first = first_of_nothing(tokenizer)
    if first is None:
        raise BadInput(
            f"{example.where}: the prompt has no tokens, and the tokenizer has no BOS",
            expected="at least one token before the answer",
            found=repr(example.inputs[0]),
            hint="write a prompt with more than a column",
        )
    return [first]


def prompt_limit(folder: Path) -> int:
    """The most tokens of a prompt: the smaller limit of tokenizer and positions."""
    config = read_config(folder).get_text_config()
    known = (getattr(config, key, None) for key in _POSITION_KEYS)
    positions = next((int(value) for value in known if value), _POSITIONS)
    return min(int(load_tokenizer(folder).model_max_length), positions)


def question_batch(questions: Sequence[Question], examples: Sequence[Example]) -> dict[str, Tensor]:
    """The tensors of questions, padded at the end, with `labels` if the examples have them."""
    most = max((len(one.answers) for one in questions), default=0)
    answers = padded([answer for one in questions for answer in one.answers])
    batch = {
        "prompt": padded([one.prompt for one in questions]),
        "prompt_length": integers([len(one.prompt) for one in questions]),
        "answers": answers.view(len(questions), most, answers.shape[1]),
        "answer_length": integers([[len(a) for a in one.answers] for one in questions]),
        "characters": integers([[len(c or "") for c in e.choices] for e in examples]),
        "cut": integers([one.cut for one in questions]),
    }
    if all(example.label is not None for example in examples):
        batch["labels"] = torch.tensor([example.label for example in examples])
    return batch


def integers(values: Sequence[Any]) -> Tensor:
    """A tensor of indices."""
    return torch.tensor(values, dtype=torch.int64)


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of tokens as a tensor, padded at the end."""
    longest = max(map(len, rows), default=0)
    each = [[*row, *[PADDING] * (longest - len(row))] for row in rows]
    return integers(each).view(len(rows), longest)
