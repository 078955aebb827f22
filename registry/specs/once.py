"""The keys of a file for `restitch merge`: a base, its finetuned models, and a method."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, JsonValue, field_validator

from restitch.registry.specs.base import InFile, Spec, Text
from restitch.registry.specs.method import MethodSpec
from restitch.registry.specs.name import Name

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(Dtype)


class MergeSpec(Spec):
    """A merge without a line."""

    base: Text = Field(examples=["models/base", "owner/name", "s3://bucket/models/base"])
    """The pretrained checkpoint that all models were finetuned from."""
    models: Annotated[dict[Name, Text], Field(min_length=1)] = Field(
        examples=[{"sst2": "models/sst2", "trec": "models/trec"}]
    )
    """The finetuned models by the names of their tasks."""
    method: Annotated[MethodSpec, InFile(Text | MethodSpec)] = Field(
        examples=["tsv-m", {"name": "ties", "settings": {"density": 0.2}}]
    )
    """The merge method: a name, or a name with settings."""
    localize: dict[str, JsonValue] = Field(default_factory=dict, examples=[{"density": 0.2}])
    """What is kept of each model, as in a line file, without data; everything by default, if the
    method can merge that."""
    include: tuple[Text, ...] = Field(default=(), examples=[["*embed*"]])
    """Globs on tensor names that add to the family's localizable tensors."""
    exclude: tuple[Text, ...] = Field(default=(), examples=[["*.bias"]])
    """Globs on tensor names that are not merged; they win over `include`."""
    dtype: Dtype | None = None
    """The type of the merged weights, each rounded once from the float32 result; that of the base's
    by default."""
    family: Text | None = Field(default=None, examples=["causal-lm"])
    """The family of the base; by default the one that fits."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The base and the models."""
        return self.base, *self.models.values()

    @field_validator("method", mode="before")
    @classmethod
    def _method_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value
