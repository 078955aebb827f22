"""A merged version in MLflow's model format: a few kilobytes, and its weights where they are kept.

The `python_function` flavor rebuilds the version from the store (`serving.pyfunc`). With weights,
the `transformers` flavor loads the folder `model/` without restitch.
"""

import base64
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import restitch
from restitch.merging.progress import Progress
from restitch.modeling.families.family import Family, get_family
from restitch.modeling.kinds import Kind, model_kind
from restitch.registry.mlflow.merged_models import IN_RUN, MODEL_FILE, WEIGHT_FOLDERS
from restitch.registry.sources.resolve import resolve_source
from restitch.serving.answers import IMAGE, PAIR, PROMPT, TEXT, columns_of
from restitch.serving.served_version import ServedVersion
from restitch.serving.version_folder import write_version

VERSION_FILE = "restitch_version.json"
WEIGHTS, COMPONENTS = WEIGHT_FOLDERS
_EXAMPLE, _SERVING_EXAMPLE = "input_example.json", "serving_input_example.json"
_LOADER = "restitch.serving.pyfunc"

# The pipelines of transformers, by the class that loads the model.
_PIPELINES = {
    "AutoModelForCausalLM": ("text-generation", "TextGenerationPipeline"),
    "AutoModelForMaskedLM": ("fill-mask", "FillMaskPipeline"),
    "AutoModelForTextEncoding": ("feature-extraction", "FeatureExtractionPipeline"),
}


def model_files(version: ServedVersion, *, weights: bool = False) -> dict[str, bytes]:
    """The small files of a version's MLflow model, by name; the same version gives the same bytes.

    Args:
        version: the version.
        weights: the files of `write_weights` lie next to these.

    Raises:
        RestitchError: the configuration of the base cannot be read.
    """
    from mlflow.models import Model

    frame, params = _example(version)
    serving: dict[str, Any] = {"dataframe_split": frame}
    stored: dict[str, Any] = frame
    info = {
        "artifact_path": _EXAMPLE,
        "pandas_orient": "split",
        "serving_input_path": _SERVING_EXAMPLE,
        "type": "dataframe",
    }
    if params:
        serving, info = {**serving, "params": params}, {**info, "params": "true"}
        stored = {"inputs": frame, "params": params}
    model = Model(
        artifact_path=IN_RUN,
        utc_time_created=version.created_at,
        model_uuid=version.record[:32],
        signature=_signature(version),
        saved_input_example_info=info,
        metadata={
            "restitch": {
                "line": version.line,
                "version": version.version,
                "record": version.record,
                "patch": version.patch,
                "base": version.base.weights,
            }
        },
    )
    model.add_flavor(
        "python_function",
        loader_module=_LOADER,
        data=VERSION_FILE,
        env={"virtualenv": "python_env.yaml"},
        python_version=_python(),
    )
    if weights:
        model.add_flavor("transformers", **_transformers_flavor(version))
    return {
        MODEL_FILE: model.to_yaml().encode(),
        VERSION_FILE: _json(version.to_json()),
        _EXAMPLE: _json(stored),
        _SERVING_EXAMPLE: _json(serving),
        "requirements.txt": f"restitch=={restitch.__version__}\n".encode(),
        "python_env.yaml": f"python: {_python()}\ndependencies:\n- -r requirements.txt\n".encode(),
    }


def write_weights(version: ServedVersion, out: Path, progress: Progress | None = None) -> None:
    """Write a version's weights as MLflow's transformers flavor reads them, into an empty folder.

    Raises:
        RestitchError: the version cannot be rebuilt; see `write_version`.
    """
    folder = out / WEIGHTS
    folder.mkdir()
    write_version(version, folder, progress)
    shutil.rmtree(folder / "heads", ignore_errors=True)
    names = get_family(version.family).asset_files(folder)
    for component in _components(get_family(version.family)):
        place = out / COMPONENTS / component
        place.mkdir(parents=True)
        for name in names:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, place / name)


def _components(family: Family) -> tuple[str, ...]:
    if getattr(family, "auto_class", None) == "AutoModelForSeq2SeqLM":
        return ("processor",)
    if Kind.IMAGE_TEXT in family.kinds:
        return ("tokenizer", "image_processor")
    return ("image_processor",) if family.modality == "image" else ("tokenizer",)


def _transformers_flavor(version: ServedVersion) -> dict[str, Any]:
    """What `mlflow.transformers.load_model` reads."""
    import transformers

    family = get_family(version.family)
    auto_class = getattr(family, "auto_class", None) or "AutoModel"
    if not family.reads_prompts and family.modality == "text":
        folder = resolve_source(version.base.uri, version.home, whole=False).local
        if model_kind(folder).encoder_half:
            auto_class = "AutoModelForTextEncoding"
    if Kind.IMAGE_TEXT in family.kinds:
        pipeline = ("zero-shot-image-classification", "ZeroShotImageClassificationPipeline")
    elif family.modality == "image":
        pipeline = ("image-feature-extraction", "ImageFeatureExtractionPipeline")
    else:
        other = ("feature-extraction", "FeatureExtractionPipeline")
        pipeline = _PIPELINES.get(auto_class, other)
    types = {
        "tokenizer": "AutoTokenizer",
        "image_processor": "AutoImageProcessor",
        "processor": "AutoProcessor",
    }
    components = _components(family)
    return {
        "transformers_version": transformers.__version__,
        "code": None,
        "task": pipeline[0],
        "instance_type": pipeline[1],
        "pipeline_model_type": auto_class,
        "source_model_name": version.name,
        "model_binary": WEIGHTS,
        # A processor has no pipeline: `load_model` asks for return_type="components".
        "components": [name for name in components if name != "processor"],
        **{f"{name}_type": types[name] for name in components},
    }


def _signature(version: ServedVersion) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, Map

    family = get_family(version.family)
    lists = _lists(version)

    def kind(column: str) -> Any:
        if column in lists:
            return Array(DataType.string)
        return DataType.binary if column == IMAGE else DataType.string

    inputs = [
        ColSpec(kind(name), name, required=required)
        for name, required in columns_of(version).items()
    ]
    outputs: dict[str, Any] = {
        "label": DataType.string,
        "score": DataType.double,
        "scores": Map(DataType.double),
        "value": DataType.double,
    }
    if family.reads_prompts:
        outputs |= {"text": DataType.string, "perplexity": DataType.double}
    else:
        outputs |= {"embedding": Array(DataType.double)}
    params = [ParamSpec("task", DataType.string, "")]
    if family.reads_prompts and not family.fills_mask:
        params.append(ParamSpec("max_new_tokens", DataType.long, 0))
    return ModelSignature(
        inputs=Schema(inputs),
        outputs=Schema([ColSpec(kind, name, required=False) for name, kind in outputs.items()]),
        params=ParamSchema(params),
    )


def _lists(version: ServedVersion) -> set[str]:
    """The columns with a list of choices in each row."""
    specs = (task.spec for task in version.tasks.values())
    return {s.choices_column for s in specs if s is not None and s.choices_column is not None}


def _example(version: ServedVersion) -> tuple[dict[str, Any], dict[str, Any]]:
    """A request: the table in MLflow's split form, and the params."""
    family = get_family(version.family)
    task = next(iter(version.tasks), None)
    row: Mapping[str, Any]
    if family.modality == "image":
        row = {IMAGE: _picture()}
    elif not family.reads_prompts:
        pair = task is not None and len(version.tasks[task].columns) > 1
        row = {TEXT: "An example text.", **({PAIR: "Another text."} if pair else {})}
    elif not family.fills_mask:
        row, task = {PROMPT: "An example of a prompt:"}, None
    else:
        lists = _lists(version)
        named = () if task is None else version.tasks[task].columns
        row = {
            name: ["one", "two"] if name in lists else "An example text."
            for name in named or columns_of(version)
        }
    params = {} if task is None else {"task": task}
    return {"columns": [*row], "data": [[*row.values()]]}, params


def _picture() -> str:
    """A small image as base64, with a line feed at the end, as MLflow writes bytes."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 80, 40)).save(file, "PNG")
    return base64.encodebytes(file.getvalue()).decode("ascii")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _python() -> str:
    from platform import python_version

    return python_version()
