"""MLflow loads a merged version of each kind of model, and answers as an evaluation does."""

import base64
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from PIL import Image

from restitch.merging.errors import Damage
from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import get_family
from restitch.modeling.heads import Head
from restitch.registry.store.objects import ObjectStore
from restitch.serving.mlflow_model import model_files, write_weights
from restitch.serving.served_version import ServedTask, ServedVersion
from tests.serving.made import made
from tests.tiny_models import (
    tiny_bert,
    tiny_classifier,
    tiny_clip,
    tiny_decoder,
    tiny_encoder,
    tiny_masked,
    tiny_seq2seq,
    tweaked,
)

KINDS = ("clip", "text-encoder", "text-classifier", "causal-lm", "masked-lm", "seq2seq-lm")
CHOICES = ("red", "blu", "are")


@pytest.fixture(autouse=True)
def home(tmp_path: Path) -> Iterator[None]:
    with patch.dict(os.environ, {"RESTITCH_HOME": str(tmp_path / "home")}):
        yield


def version_of(kind: str, root: Path) -> ServedVersion:
    """A version of a family with one task."""
    base, finetuned, heads_of = root / "base", root / "finetuned", None
    labels: dict[str, Any] = {"labels": ("red", "green", "blue")}
    if kind == "clip":
        tiny_clip(base)
        labels |= {"columns": ("image",)}
    elif kind == "text-encoder":
        tiny_bert(base)
    elif kind == "text-classifier":
        tiny_encoder(base)
        heads_of = tiny_classifier(base, root / "classifier", ("red", "green", "blue"))
    elif kind == "causal-lm":
        tiny_decoder(base)
        labels = {"labels": CHOICES, "prompt": "Kind:\n{text}", "score": "sum"}
    elif kind == "masked-lm":
        tiny_masked(base)
        labels = {"labels": ("red", "blue"), "prompt": "{text} is {mask}", "score": "sum"}
    else:
        tiny_seq2seq(base)
        labels = {"labels": CHOICES, "prompt": "Kind:\n{text}", "score": "sum"}
    tweaked(base, finetuned, seed=1, size=0.05)
    return made(root, kind, base, finetuned, {"colour": labels}, heads_of)


def saved(version: ServedVersion, folder: Path, *, weights: bool = False) -> Path:
    folder.mkdir()
    if weights:
        write_weights(version, folder)
    for name, data in model_files(version, weights=weights).items():
        (folder / name).write_bytes(data)
    return folder


def loaded(version: ServedVersion, folder: Path) -> Any:
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model(str(saved(version, folder)), suppress_warnings=True)


def encoded(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def rows_of(version: ServedVersion) -> pd.DataFrame:
    if get_family(version.family).modality == "image":
        return pd.DataFrame({"image": [encoded(1), encoded(2), encoded(3)]})
    return pd.DataFrame({"text": ["one", "a much longer text", "two two"]})


@pytest.mark.parametrize("kind", KINDS)
def test_a_version_of_each_family_is_loaded_and_answers_its_task(kind: str, tmp_path: Path) -> None:
    version = version_of(kind, tmp_path)
    model = loaded(version, tmp_path / "model")
    found = model.predict(rows_of(version), params={"task": "colour"})
    assert list(found.columns) == ["label", "score", "scores"]
    assert len(found) == 3
    for _, row in found.iterrows():
        assert sum(row["scores"].values()) == pytest.approx(1)
        assert row["score"] == max(row["scores"].values()) == row["scores"][row["label"]]
    # The example of the model is a request that it answers.
    example = model.input_example
    params = Model.load(str(tmp_path / "model")).load_input_example_params(str(tmp_path / "model"))
    assert len(model.predict(example, params=params)) == 1


@pytest.mark.parametrize("kind", ["clip", "text-encoder", "text-classifier"])
def test_scores_are_those_of_the_merged_weights_with_the_stored_head(
    kind: str, tmp_path: Path
) -> None:
    version = version_of(kind, tmp_path)
    found = loaded(version, tmp_path / "model").predict(rows_of(version), params={"task": "colour"})
    family = get_family(kind)
    objects = ObjectStore(version.home.open_store())
    digest = version.tasks["colour"].head
    assert digest is not None
    head = Head.from_bytes(objects.read_blob(digest))
    values = rows_of(version).iloc[:, 0].tolist()
    if family.modality == "image":
        values = [Image.open(io.BytesIO(value)).convert("RGB") for value in values]
    batch = family.preprocessor(tmp_path / "base", head.spec.most_read)(
        [Example((value,), None, "") for value in values]
    )
    with torch.inference_mode():
        scores = family.logits(family.load(tmp_path / "finetuned"), batch, head)
    expected = scores.double().softmax(1).tolist()
    for row, one in zip(found["scores"], expected, strict=True):
        assert list(row.values()) == pytest.approx(one, abs=1e-6)


@pytest.mark.parametrize("kind", ["clip", "text-encoder", "text-classifier"])
def test_without_a_task_an_encoder_gives_embeddings(kind: str, tmp_path: Path) -> None:
    version = version_of(kind, tmp_path)
    found = loaded(version, tmp_path / "model").predict(rows_of(version))
    assert list(found.columns) == ["embedding"]
    sizes = {len(row) for row in found["embedding"]}
    assert len(sizes) == 1
    assert min(sizes) > 4
    assert np.isfinite(found["embedding"].tolist()).all()


@pytest.mark.parametrize("kind", ["causal-lm", "seq2seq-lm"])
def test_without_a_task_a_language_model_writes(kind: str, tmp_path: Path) -> None:
    model = loaded(version_of(kind, tmp_path), tmp_path / "model")
    asked = pd.DataFrame({"prompt": ["one two", "three"]})
    long = model.predict(asked, params={"max_new_tokens": 12})
    short = model.predict(asked, params={"max_new_tokens": 2})
    assert list(long.columns) == ["text"]
    assert all(
        one.startswith(other) for one, other in zip(long["text"], short["text"], strict=True)
    )
    assert any(one != other for one, other in zip(long["text"], short["text"], strict=True))


def test_a_masked_model_needs_a_task(tmp_path: Path) -> None:
    model = loaded(version_of("masked-lm", tmp_path), tmp_path / "model")
    with pytest.raises(MlflowException, match="answers tasks only"):
        model.predict(pd.DataFrame({"text": ["one"]}))


def test_a_masked_model_of_tasks_without_rows_is_a_model_too(tmp_path: Path) -> None:
    version = version_of("masked-lm", tmp_path)
    for tasks in ({"colour": ServedTask(metric="accuracy", columns=())}, {}):
        bare = version.model_copy(update={"tasks": tasks})
        model = loaded(bare, tmp_path / f"{len(tasks)} tasks")
        assert model.metadata.get_input_schema().input_names() == ["text"]
        with pytest.raises(MlflowException, match="answers tasks only"):
            model.predict(model.input_example)


def test_requests_that_cannot_be_answered_say_why(tmp_path: Path) -> None:
    version = version_of("causal-lm", tmp_path)
    model = loaded(version, tmp_path / "model")
    with pytest.raises(MlflowException, match="did you mean 'colour'"):
        model.predict(pd.DataFrame({"text": ["one"]}), params={"task": "color"})
    with pytest.raises(MlflowException, match="row 0 of the request has no 'text'"):
        model.predict(pd.DataFrame({"prompt": ["one"]}), params={"task": "colour"})
    with pytest.raises(MlflowException, match="row 0 of the request has no 'prompt'"):
        model.predict(pd.DataFrame({"text": ["one"]}))


def test_an_image_comes_as_bytes_or_base64_and_never_as_a_path(tmp_path: Path) -> None:
    model = loaded(version_of("clip", tmp_path), tmp_path / "model")
    bytes_of = encoded(1)
    text = base64.b64encode(bytes_of).decode()
    one, other = (
        model.predict(pd.DataFrame({"image": [value]}), params={"task": "colour"})
        for value in (bytes_of, text)
    )
    assert one.equals(other)
    (tmp_path / "image.png").write_bytes(bytes_of)
    for path in (str(tmp_path / "image.png"), "image.png", "abcd"):
        with pytest.raises(MlflowException, match="image"):
            model.predict(pd.DataFrame({"image": [path]}), params={"task": "colour"})


def test_the_artifact_is_small_and_the_same_each_time(tmp_path: Path) -> None:
    version = version_of("text-encoder", tmp_path)
    files = model_files(version)
    assert files == model_files(version)
    assert sum(map(len, files.values())) < 10_000
    assert set(Model.from_dict(yaml.safe_load(files["MLmodel"])).flavors) == {"python_function"}


def test_a_damaged_patch_is_refused_when_the_model_is_loaded(tmp_path: Path) -> None:
    version = version_of("text-encoder", tmp_path)
    blob = tmp_path / "store" / "blobs" / version.patch
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(Damage, match=version.patch):
        loaded(version, tmp_path / "model")


CLASSES = {
    "clip": "CLIPModel",
    "text-encoder": "BertModel",
    "text-classifier": "BertModel",
    "causal-lm": "LlamaForCausalLM",
    "masked-lm": "RobertaForMaskedLM",
    "seq2seq-lm": "T5ForConditionalGeneration",
}


@pytest.mark.parametrize("kind", KINDS)
def test_with_weights_mlflow_loads_the_merged_model_of_transformers(
    kind: str, tmp_path: Path
) -> None:
    import mlflow.transformers
    import transformers

    version = version_of(kind, tmp_path)
    folder = saved(version, tmp_path / "model", weights=True)
    components = mlflow.transformers.load_model(str(folder), return_type="components")
    assert type(components["model"]).__name__ == CLASSES[kind]
    expected = getattr(transformers, CLASSES[kind]).from_pretrained(tmp_path / "finetuned")
    own = expected.state_dict()
    found = components["model"].state_dict()
    # A classifier's pooler lies in the heads, and is the base's here.
    assert all(torch.equal(found[name], own[name]) for name in own if "pooler" not in name)
    if kind != "seq2seq-lm":
        pipeline = mlflow.transformers.load_model(str(folder))
        assert type(pipeline.model).__name__ == CLASSES[kind]


def test_a_request_for_a_pipeline_that_transformers_lacks_says_what_to_do(tmp_path: Path) -> None:
    import mlflow.transformers

    version = version_of("seq2seq-lm", tmp_path)
    folder = saved(version, tmp_path / "model", weights=True)
    with pytest.raises(MlflowException, match="'return_type'='components'"):
        mlflow.transformers.load_model(str(folder))


WITHOUT_RESTITCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "restitch":
            raise ModuleNotFoundError("restitch is not installed here")
sys.meta_path.insert(0, Blocked())
import mlflow.transformers
print(len(mlflow.transformers.load_model(sys.argv[1])("a text")[0][0]))
"""


@pytest.mark.slow
def test_transformers_loads_it_where_restitch_is_not_installed(tmp_path: Path) -> None:
    folder = saved(version_of("text-encoder", tmp_path), tmp_path / "model", weights=True)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RESTITCH, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.splitlines()[-1]) > 4
