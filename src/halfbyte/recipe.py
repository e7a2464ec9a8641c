"""The words of a run: what a user asks for, as a value that can be written down and read again."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import AliasChoices, BaseModel, Field, ValidationError, field_validator, model_validator

from halfbyte.errors import BadRequest, UnknownName, brief
from halfbyte.files import read_text

MOST = 1 << 20
"""Bytes of a recipe."""
SHORTEST = 8
"""Tokens of a window of text."""
REFUSALS = (yaml.YAMLError, ValueError, KeyError, AttributeError, IndexError, TypeError, RecursionError)
"""What PyYAML raises: all but the first where a value is not of the kind that its tag says."""


class _Loader(yaml.SafeLoader):
    """Without aliases, of which nine lines can make more values than fit into memory."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name), and a recipe has no use for one; write the value out")
        return super().compose_node(parent, index)


class Entries(BaseModel, frozen=True, defer_build=True):  # built when first used, for a quick start
    """A value whose entries are attributes; `value["name"]` reads one too, by its name in YAML or JSON."""

    def __getitem__(self, name: str) -> Any:
        if name not in type(self).model_fields and name not in (self.model_extra or ()):
            raise KeyError(name)
        return getattr(self, name)


class Calibration(Entries, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Which text to run through the model, and how much of it. A file's name, or a list of texts, stands for one."""

    source: str | tuple[str, ...] = "default"
    """A text file, a .jsonl, .json or .csv of texts, instructions or chats, or a dataset org/name:split; in Python and
    in recipes also a list of whole texts."""
    samples: int = Field(default=128, ge=1)
    """Calibration samples: how many windows of text."""
    length: int = Field(default=512, ge=SHORTEST)
    """Tokens in a sample."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Which samples are drawn."""

    @model_validator(mode="before")
    @classmethod
    def _words(cls, value: object) -> object:
        return {"source": value} if isinstance(value, str | Path | list | tuple) else value

    @field_validator("source", mode="before")
    @classmethod
    def _texts(cls, value: object) -> object:
        if not isinstance(value, list | tuple):
            return str(value) if isinstance(value, Path) else value
        if not value or not all(isinstance(text, str) for text in value):
            raise ValueError("is a file, a dataset, or a list of texts")
        if sum(len(text.encode()) for text in value) > MOST // 2:
            raise ValueError(
                f"takes {MOST // 2} bytes of texts at most; write them into a .jsonl file, and give its name"
            )
        return tuple(value)

    @classmethod
    def of(cls, words: "CalibrationWords | None") -> "Calibration":
        """What somebody asks for. Raises BadRequest."""
        return Recipe.of(model="", **({} if words is None else {"calibration": words})).calibration


CalibrationWords = str | Path | Sequence[str] | Mapping[str, Any] | Calibration
"""What stands for a Calibration in Python."""


RENAMED = {"input_range": "observer"}
"""What entries of a recipe were called once."""


class Recipe(Entries, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """All that a run depends on. The same recipe on the same checkpoint gives the same bytes."""

    model: str
    """A folder, a GGUF, or a hub id such as org/name."""
    adapter: str | None = None
    """A LoRA adapter's folder, merged into the model as it is read."""
    requantize: bool = False
    """Take the values of a model that is quantized already as the original."""
    method: str = "gptq"
    """How weights are rounded."""
    grid: str = "int4-g128"
    """What weights are rounded to, such as int4-g128 or nf4-g64; with what activations are rounded to, such as
    int8-channel/int8-token; or a scheme's name; or of a GGUF a preset or a type."""
    to: str | None = None
    """The container to write."""
    engine: str | None = None
    """The engine that is to load it: its rules are checked first. none: write it although no engine loads it."""
    calibration: Calibration = Field(default_factory=Calibration)
    """The text that runs through the model, where the method or the grid needs one."""
    observer: Literal["max", "percentile", "mse"] = Field(
        default="max",
        validation_alias=AliasChoices("observer", *RENAMED),
    )
    """What stored scales of activations and of a KV cache span: all values (max), 99.99 % of them (percentile), or what
    has the least error (mse)."""
    kv: str | None = None
    """A KV cache whose scales are found and stored too: fp8-e4m3, or fp8-e4m3-head with a scale for each head."""
    alpha: float | None = Field(default=None, ge=0, le=1)
    """smoothquant: how much of the activations' range moves into the weights, 0 to 1; by default searched for."""
    skip: tuple[str, ...] = ()
    """Patterns of weights that stay in 16 bits."""
    override: dict[str, str] = {}
    """What some weights become: patterns, and the grid of each, or keep for 16 bits."""
    smaller_groups: bool | None = None
    """Give rows that the grid's groups do not divide smaller groups; else they are refused. By default where no grid is
    named."""
    head: bool = False
    """Quantize lm_head too (a GGUF's preset decides by itself)."""
    pure: bool = False
    """GGUF: one type for all tensors, whatever the preset says."""
    imatrix: str | None = None
    """An importance matrix of llama.cpp, in place of calibration (methods nearest and imatrix)."""
    pre: str | None = None
    """GGUF: llama.cpp's name of the pre-tokenizer, where it is not recognised."""
    repository: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Where it will be published, org/name: the card's commands name it."""
    shard_gb: float | None = Field(default=None, gt=0)
    """Split files above this size, in GB; by default 5, and a GGUF is one file."""

    @field_validator("skip", mode="before")
    @classmethod
    def _patterns(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @classmethod
    def load(cls, path: Path, **changes) -> "Recipe":
        """A recipe from a YAML file; `changes` win."""
        try:
            entries = yaml.load(read_text(path, BadRequest, MOST), _Loader)
        except REFUSALS as error:
            raise BadRequest(
                f"recipe {path} cannot be read: {' '.join(str(error).split()) or 'it nests too deep'}"
            ) from None
        if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
            raise BadRequest(f"recipe {path} is no mapping of names to values")
        return cls.of(**{**_renamed(entries), **_renamed(changes)})

    @classmethod
    def of(cls, **entries) -> "Recipe":
        """A recipe of these entries. Raises BadRequest for one that is unknown, missing or wrong."""
        try:
            return cls(**entries)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                entry_names = [*cls.model_fields, *(f"calibration.{field}" for field in Calibration.model_fields)]
                raise UnknownName("recipe entry", name, entry_names) from None
            if first["type"] == "missing":
                raise BadRequest(f"the recipe has no {name}") from None
            reason = first["msg"].lower().removeprefix("value error, ")
            raise BadRequest(f"recipe entry {name}: {reason}, not {brief(first.get('input'))}") from None

    def dump(self) -> str:
        """YAML that `load` reads again."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)

    @property
    def digest(self) -> str:
        """SHA-256 of all entries."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def _renamed(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries under the names that they have now."""
    return {RENAMED.get(name, name): value for name, value in entries.items()}


@dataclass(frozen=True)
class Method:
    """Transforms, then a solver, then refinements."""

    transforms: tuple[str, ...]
    """What is done to a block before its weights are rounded: keys of `halfbyte.transforms.TRANSFORMS`."""
    solver: str
    """A key of `halfbyte.solvers.SOLVERS`."""
    calibrated: bool
    """Whether text runs through the model."""
    full_precision: bool = False
    """Whether the unquantized model runs beside the one that is being quantized."""
    trials: bool = False
    """Whether each block is run again and again on a few tokens."""
    gradients: bool = False
    """Whether some are followed back through all of the model."""
    refinements: tuple[str, ...] = ()
    """What is done to what the solver has rounded: of a matrix, keys of `halfbyte.solvers.REFINEMENTS`; of a block, of
    `halfbyte.refinements.REFINEMENTS`; of the whole model, of `halfbyte.blockwise.MODEL_STAGES`."""
    rotated: bool = False
    """Whether the model's hidden states are rotated before all else (`halfbyte.transforms.rotate`)."""
    guided: bool = False
    """Whether the solver knows what errors at the outputs of each weight cost the model's predictions."""

    @property
    def position(self) -> int:
        """Where a part stands in a method's name: transforms and what guides, a solver, refinements."""
        return 2 if self.refinements else 0 if self.transforms or self.rotated or self.guided else 1


PARTS: dict[str, Method] = {
    "minmax": Method((), "minmax", calibrated=False),
    "nearest": Method((), "nearest", calibrated=False),
    "imatrix": Method((), "nearest", calibrated=True),
    "gptq": Method((), "gptq", calibrated=True),
    "gptaq": Method((), "gptaq", calibrated=True, full_precision=True),
    "descent": Method((), "gptq", calibrated=True, refinements=("descent",)),
    "guided": Method((), "gptq", calibrated=True, guided=True),
    "learned": Method((), "gptq", calibrated=True, full_precision=True, refinements=("learned",)),
    "awq": Method(("awq",), "nearest", calibrated=True),
    "smoothquant": Method(("smoothquant",), "nearest", calibrated=True, trials=True),
    "rotate": Method((), "nearest", calibrated=False, rotated=True),
    "polish": Method((), "gptq", calibrated=True, gradients=True, refinements=("polish",)),
}
OTHER_COMMANDS = ("convert", "dequantize")
"""What the recipe of an output that another command made says in place of a method."""
METHODS = (*PARTS, "awq+gptq", "smoothquant+gptq", "rotate+gptq", "gptaq+descent", "guided+gptaq", "gptaq+polish")
GUIDED = ("gptq", "gptaq")
"""Solvers that know what to do with it."""


OBSERVERS: tuple[str, ...] = get_args(Recipe.model_fields["observer"].annotation)


def meaning(name: str, of: type[Entries] = Recipe) -> str:
    """What an entry says, in a sentence or two for whoever writes one."""
    return " ".join((of.model_fields[name].description or "").split())


def method_named(name: str) -> Method:
    """`awq+gptq` is awq's transforms, then gptq's solver."""
    parts = name.split("+")
    for part in parts:
        if part not in PARTS:
            raise UnknownName("method", part, METHODS)
    if len(set(parts)) < len(parts):
        raise BadRequest(f"method '{name}' names a part twice")
    chosen = [PARTS[part] for part in parts]
    positions = [part.position for part in chosen]
    if positions != sorted(positions) or positions.count(1) > 1:
        raise BadRequest(
            f"method '{name}' is in no order that runs; put transforms first, then one solver, then refinements, such "
            "as awq+gptq"
        )
    solver = next((part for part in chosen if part.position == 1), chosen[-1]).solver
    method = Method(
        sum((m.transforms for m in chosen), ()),
        solver,
        any(m.calibrated for m in chosen),
        any(m.full_precision for m in chosen),
        any(m.trials for m in chosen),
        any(m.gradients for m in chosen),
        sum((m.refinements for m in chosen), ()),
        any(m.rotated for m in chosen),
        any(m.guided for m in chosen),
    )
    if method.guided:
        _require_guided(name, method)
    return method


def _require_guided(name: str, method: Method) -> None:
    """Raise BadRequest where what guides is not heard, or is undone."""
    if method.solver not in GUIDED:
        raise BadRequest(
            f"method '{name}' has nothing to guide: guided goes with {' or '.join(GUIDED)}, such as guided+gptq"
        )
    if "descent" in method.refinements:
        raise BadRequest(
            f"method '{name}': descent takes each row by itself, which undoes what guided has rows make up for; leave "
            "one of them out"
        )
