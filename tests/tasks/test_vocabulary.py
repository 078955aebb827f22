"""Finetuned models whose vocabulary has more tokens than their base's."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from restitch.merging.errors import CannotJoin
from restitch.merging.files.sparse import SparseFile
from restitch.modeling.families.family import get_family
from restitch.modeling.pretrained import NamedModel
from restitch.registry.ledger.finetuned_models import ModelRef
from restitch.registry.specs.line import LineSpec
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.checkpoints import describe_model, open_base
from restitch.tasks.inputs.live_base import live_base
from restitch.tasks.localize import localize
from restitch.tasks.runtime.refs import LineRef, WeightsRef
from restitch.tasks.runtime.workspace import workspace
from restitch.tasks.validate import validate
from tests.shell import Shell
from tests.tiny_models import (
    tiny_bert,
    tiny_classifier,
    tiny_decoder,
    tiny_encoder,
    tiny_masked,
    tiny_seq2seq,
    tweaked,
    with_more_tokens,
)

BLOCKS = ("*layer.*", "*layers.*", "*h.*", "*block.*")
TASK = TaskSpec(task="colour")
CASES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "llama": ("causal-lm", tiny_decoder),
    "qwen2": ("causal-lm", partial(tiny_decoder, kind="qwen2")),
    "gpt2": ("causal-lm", partial(tiny_decoder, kind="gpt2")),
    "t5": ("seq2seq-lm", tiny_seq2seq),
    "flan-t5": ("seq2seq-lm", partial(tiny_seq2seq, kind="flan-t5")),
    "bart": ("seq2seq-lm", partial(tiny_seq2seq, kind="bart")),
    "roberta": ("masked-lm", tiny_masked),
    "bert": ("masked-lm", partial(tiny_masked, kind="bert")),
    "deberta": ("masked-lm", partial(tiny_masked, kind="deberta-v2")),
    "encoder": ("text-encoder", tiny_bert),
    "classifier": ("text-classifier", tiny_encoder),
}


@dataclass(frozen=True)
class Models:
    """A base, a finetuned model, and the same one with more tokens."""

    family: str
    base: Path
    tuned: Path
    more: Path
    shell: Shell

    def line(self, **localize: Any) -> LineRef:
        """A line with this base."""
        spec = LineSpec.model_validate(
            {
                "line": "demo",
                "base": str(self.base),
                "family": self.family,
                "method": {"name": "localize-and-stitch"},
                "localize": {"mode": "dataless", "density": 0.5, **localize},
            }
        )
        return LineRef(spec, self.described(self.base))

    def described(self, folder: Path) -> ModelRef:
        """A registered model."""
        return describe_model(str(folder), get_family(self.family), workspace())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Models]:
    """The models of a case, made once."""
    root, known = tmp_path_factory.mktemp("vocabulary"), dict[str, Models]()

    def make(case: str) -> Models:
        if case not in known:
            family, base = CASES[case]
            base(root / case / "base")
            tuned = root / case / "tuned"
            if family == "text-classifier":
                tiny_classifier(root / case / "base", tuned, ("no", "yes"))
            else:
                tweaked(root / case / "base", tuned, seed=1, globs=BLOCKS)
            more = with_more_tokens(tuned, root / case / "more")
            (root / case / "home").mkdir()
            shell = Shell(root / case / "home")
            known[case] = Models(family, root / case / "base", tuned, more, shell)
        return known[case]

    return make


@pytest.mark.parametrize("case", CASES)
def test_a_model_with_more_tokens_has_the_mask_of_the_weights_that_the_base_has(made, case):
    models = made(case)
    with models.shell.inside():
        line = models.line()
        checked = validate(line, TASK, models.described(models.more))
        own = localize(line, TASK, models.described(models.more))
        plain = localize(line, TASK, models.described(models.tuned))
    assert own.mask == plain.mask
    lacks = "texts are read without 2 tokens that the base's tokenizer lacks: '<a>', '<b>'"
    assert lacks in checked.notes
    assert checked.notes[-1].startswith("5 rows more than the base's ")


@pytest.mark.parametrize("case", [case for case in CASES if case != "classifier"])
def test_the_finetuned_model_is_evaluated_with_all_of_its_rows(made, case):
    models, family = made(case), get_family(CASES[case][0])
    with models.shell.inside():
        base = open_base(models.line(), workspace())
        live, more = live_base(base, "test"), models.described(models.more)
        before = {name: tensor.clone() for name, tensor in live.parameters.items()}
        with live.wearing(WeightsRef("finetuned", more.weights, more.uri), workspace()):
            found = outputs(live.model)
        assert torch.equal(found, outputs(family.load(models.more)))
        assert all(torch.equal(before[n], t) for n, t in live.parameters.items())
        assert torch.equal(outputs(live.model), outputs(family.load(models.base)))


def outputs(model: torch.nn.Module) -> torch.Tensor:
    """The scores of all tokens, or else the hidden states."""
    inner = NamedModel.of(model).inner
    ids = torch.tensor([[7, 9, 11]])
    more = {"decoder_input_ids": ids} if inner.config.is_encoder_decoder else {}
    with torch.inference_mode():
        found: torch.Tensor = inner(input_ids=ids, **more)[0]
    return found


@pytest.mark.parametrize(
    ("case", "embedding"),
    [("llama", "model.embed_tokens.weight"), ("t5", "shared.weight")],
)
def test_an_included_embedding_merges_the_rows_of_the_base(made, tmp_path, case, embedding):
    models = made(case)
    other = tweaked(models.tuned, tmp_path / "other", seed=3, globs=(embedding,))
    more = with_more_tokens(other, tmp_path / "more")
    with models.shell.inside():
        line = models.line(include=[embedding])
        validate(line, TASK, models.described(more))
        own = localize(line, TASK, models.described(more))
        assert own.mask == localize(line, TASK, models.described(other)).mask
        delta = SparseFile.open(workspace().objects.blob_path(own.blob))
        assert delta.info(embedding).kept > 0


@pytest.mark.parametrize("case", ["llama", "bart", "bert", "encoder"])
def test_rows_without_a_token_are_padding(made, tmp_path, case):
    models = made(case)
    padded = with_more_tokens(models.tuned, tmp_path / "padded", tokens=(), rows=3)
    with models.shell.inside():
        (note,) = validate(models.line(), TASK, models.described(padded)).notes
    assert note.startswith("3 rows more than the base's ")


@pytest.mark.parametrize("case", ["llama", "bart", "bert", "encoder", "classifier"])
def test_fewer_rows_than_the_base_has_are_refused(made, tmp_path, case):
    models = made(case)
    fewer = with_more_tokens(models.tuned, tmp_path / "fewer", tokens=(), rows=-2)
    with models.shell.inside(), pytest.raises(CannotJoin) as caught:
        validate(models.line(), TASK, models.described(fewer))
    assert any(line.startswith("vocab_size: base ") for line in caught.value.details)
    assert any(line.startswith("shape differs: ") for line in caught.value.details)


def test_a_configuration_with_another_number_of_tokens_than_the_weights_is_refused(made, tmp_path):
    models = made("llama")
    folder = shutil.copytree(models.tuned, tmp_path / "wrong")
    config = json.loads((folder / "config.json").read_text())
    size = config["vocab_size"]
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": size + 1}))
    with models.shell.inside(), pytest.raises(CannotJoin) as caught:
        validate(models.line(), TASK, models.described(folder))
    assert caught.value.details == (
        f"vocab_size: base {size}, finetuned {size + 1}, but its embeddings have {size} rows",
    )
