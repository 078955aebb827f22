"""Generate texts greedily; a model's own settings for generation have no effect."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from restitch.modeling.pretrained import NamedModel
from restitch.registry.specs.head import GenerateSpec

# What generation needs of a model's own settings; all others would make it less than greedy. One
# that forces the last token would change an answer that is as long as allowed.
_KEPT = (
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
)


def generated(
    model: NamedModel, inputs: Mapping[str, Any], start: int, spec: GenerateSpec
) -> list[str]:
    """The likeliest next token, again and again, until a text ends.

    Args:
        model: the model.
        inputs: of its `generate`: tokens, the attention mask, and the keys and values of tokens
            before these.
        start: the number of these tokens before the first one that is generated.
        spec: when to end.

    Returns:
        The texts without the stop text and all after it.
    """
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    inner, tokenizer = model.inner, model.tokenizer
    own = inner.generation_config
    ends = _ends(own.eos_token_id, tokenizer.eos_token_id)
    kept = {name: getattr(own, name, None) for name in _KEPT}
    # Set on the model: `generate` fills what an argument leaves out from there.
    inner.generation_config = GenerationConfig(
        **{**kept, "eos_token_id": ends or None},
        pad_token_id=ends[0] if ends else 0,
        do_sample=False,
        num_beams=1,
    )

    def text(tokens: Sequence[int]) -> str:
        until = next((place for place, one in enumerate(tokens) if one in ends), len(tokens))
        found: str = tokenizer.decode(
            tokens[:until], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return found

    class Stop(StoppingCriteria):  # type: ignore[misc, unused-ignore]
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            written = [text(row) for row in input_ids[:, start:].tolist()]
            done = [any(stop in one for stop in spec.stop) for one in written]
            return torch.tensor(done, device=input_ids.device)

    found = inner.generate(
        **inputs,
        max_new_tokens=spec.max_new_tokens,
        stopping_criteria=StoppingCriteriaList([Stop()]),
    )
    return [until_stop(text(row), spec.stop) for row in found[:, start:].tolist()]


def until_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop text in it."""
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]


def _ends(*given: int | list[int] | None) -> list[int]:
    """All ids that end a text."""
    each = [[] if one is None else one if isinstance(one, list) else [one] for one in given]
    return list(dict.fromkeys(end for some in each for end in some))
