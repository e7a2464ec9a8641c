"""The words of a run: what a user asks for, as a value that can be written down and read again."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from halfbyte.errors import BadRequest, UnknownName, brief
from halfbyte.files import read_text

MOST = 1 << 20
"""Bytes of a recipe."""
REFUSALS = (yaml.YAMLError, ValueError, KeyError, AttributeError, IndexError, TypeError, RecursionError)
"""What PyYAML raises: all but the first where a value is not of the kind that its tag says."""


class _Loader(yaml.SafeLoader):
    """Without aliases, of which nine lines can make more values than fit into memory."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name), and a recipe has no use for one; write the value out")
        return super().compose_node(parent, index)


class Entries(BaseModel, frozen=True):
    """A value whose entries are attributes; by the names that they have in YAML or JSON, `value["name"]` reads them too."""

    def __getitem__(self, name: str) -> Any:
        if name not in type(self).model_fields and name not in (self.model_extra or ()):
            raise KeyError(name)
        return getattr(self, name)


class Calibration(Entries, frozen=True, extra="forbid"):
    """Which text to run through the model, and how much of it."""

    source: str | tuple[str, ...] = "default"
    """A file, a dataset, or the texts themselves."""
    samples: int = Field(default=128, ge=1)
    length: int = Field(default=512, ge=8)
    seed: int = Field(default=0, ge=0, lt=1 << 63)

    @field_validator("source", mode="before")
    @classmethod
    def _texts(cls, words: object) -> object:
        if not isinstance(words, list | tuple):
            return words
        if not words or not all(isinstance(text, str) for text in words):
            raise ValueError("is a file, a dataset, or a list of texts")
        if sum(len(text.encode()) for text in words) > MOST // 2:
            raise ValueError(
                f"takes {MOST // 2} bytes of texts at most; write them into a .jsonl file, and give its name"
            )
        return tuple(words)


class Recipe(Entries, frozen=True, extra="forbid"):
    """All that a run depends on. The same recipe on the same checkpoint gives the same bytes."""

    model: str
    adapter: str | None = None
    """The folder of a LoRA adapter that is merged into the model as it is read."""
    requantize: bool = False
    """Take the values of a model that is quantized already as the original."""
    method: str = "gptq"
    grid: str = "int4-g128"
    to: str | None = None
    engine: str | None = None
    calibration: Calibration = Calibration()
    input_range: Literal["max", "percentile", "mse"] = "max"
    """What the stored scales of inputs and of the KV cache span."""
    kv: str | None = None
    """A KV cache whose scales are found and stored too."""
    alpha: float | None = Field(default=None, ge=0, le=1)
    """How much of the inputs' range smoothquant moves into the weights; None: searched."""
    skip: tuple[str, ...] = ()
    override: dict[str, str] = {}
    smaller_groups: bool | None = None
    """Whether rows that the grid's groups do not divide get smaller ones; None: where no grid is named."""
    head: bool = False
    pure: bool = False
    imatrix: str | None = None
    pre: str | None = None
    repository: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Where it will be published, org/name: the card's commands name it."""
    shard_gb: float | None = Field(default=None, gt=0)

    @field_validator("calibration", mode="before")
    @classmethod
    def _source(cls, words: object) -> object:
        return {"source": words} if isinstance(words, str | list | tuple) else words

    @field_validator("skip", mode="before")
    @classmethod
    def _patterns(cls, words: object) -> object:
        return (words,) if isinstance(words, str) else words

    @classmethod
    def load(cls, path: Path, **changes) -> "Recipe":
        """A recipe from a YAML file; `changes` win."""
        try:
            words = yaml.load(read_text(path, BadRequest, MOST), _Loader)
        except REFUSALS as error:
            raise BadRequest(
                f"recipe {path} cannot be read: {' '.join(str(error).split()) or 'it nests too deep'}"
            ) from None
        if not isinstance(words, dict) or not all(isinstance(name, str) for name in words):
            raise BadRequest(f"recipe {path} is no mapping of names to values")
        return cls.of(**{**words, **changes})

    @classmethod
    def of(cls, **words) -> "Recipe":
        try:
            return cls(**words)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                known = [*cls.model_fields, *(f"calibration.{field}" for field in Calibration.model_fields)]
                raise UnknownName("recipe entry", name, known) from None
            if first["type"] == "missing":
                raise BadRequest(f"the recipe has no {name}") from None
            raise BadRequest(
                f"recipe entry {name}: {first['msg'].lower().removeprefix('value error, ')}, not {brief(first.get('input'))}"
            ) from None

    def dump(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


@dataclass(frozen=True)
class Method:
    """Transforms, then a solver."""

    transforms: tuple[str, ...]
    solver: str
    calibrated: bool
    full_precision: bool = False
    """Whether the unquantized model runs beside the one that is being quantized."""


PARTS: dict[str, Method] = {
    "minmax": Method((), "minmax", calibrated=False),
    "nearest": Method((), "nearest", calibrated=False),
    "imatrix": Method((), "nearest", calibrated=True),
    "gptq": Method((), "gptq", calibrated=True),
    "gptaq": Method((), "gptaq", calibrated=True, full_precision=True),
    "awq": Method(("awq",), "nearest", calibrated=True),
    "smoothquant": Method(("smoothquant",), "nearest", calibrated=True),
}
OTHER_COMMANDS = ("convert", "dequantize")
"""What the recipe of an output that another command made says in place of a method."""
METHODS = (*PARTS, "awq+gptq", "smoothquant+gptq")


def method_named(name: str) -> Method:
    """`awq+gptq` is awq's transforms, then gptq's solver."""
    parts = name.split("+")
    for part in parts:
        if part not in PARTS:
            raise UnknownName("method", part, METHODS)
    if len(set(parts)) < len(parts):
        raise BadRequest(f"method '{name}' names a part twice")
    chosen = [PARTS[part] for part in parts]
    if len(chosen) > 1 and any(m.transforms == () for m in chosen[:-1]):
        raise BadRequest(f"method '{name}' has two solvers; put transforms first and one solver last, such as awq+gptq")
    return Method(
        sum((m.transforms for m in chosen), ()),
        chosen[-1].solver,
        any(m.calibrated for m in chosen),
        any(m.full_precision for m in chosen),
    )
