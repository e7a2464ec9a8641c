"""Options that a command takes together: one for each field of a recipe, a calibration, a budget.

A new field is a new option. What only a command line needs (other flags, completions, what is shown as the default) is
a row of a table, which a field may have.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import typer

from halfbyte.budget.budget import SENSITIVITY, Budget
from halfbyte.cli.options import STORED_CACHES, option
from halfbyte.errors import BadRequest
from halfbyte.inference.sampling import Sampling
from halfbyte.recipe import OBSERVERS, RENAMED, Calibration, Entries, Recipe
from halfbyte.words import GRIDS, PRESETS, SCHEMES

Words = dict[str, Any]
"""What was given of a group."""


class Row(NamedTuple):
    """What only a command line needs of a field; whatever is empty follows from the field."""

    flags: tuple[str, ...] = ()
    more: str = ""
    """Said after the field's own sentence."""
    values: tuple[str, ...] = ()
    """Completed by shells."""
    default: str | None = None
    """What is said to be the default."""
    type: Any = None
    """Of the words."""
    read: Callable[[Any], Any] = lambda value: value
    """What makes the field's value of the words."""


def pairs(texts: list[str]) -> dict[str, str]:
    """Of PATTERN=GRID. Raises BadRequest."""
    overrides = {}
    for text in texts:
        pattern, sign, grid = text.rpartition("=")
        if not sign or not pattern or not grid:
            raise BadRequest(f"--override takes PATTERN=GRID, such as 'layers.0.*=int8-channel', not '{text}'")
        overrides[pattern] = grid
    return overrides


CALIBRATION = {"source": Row(flags=("--calibration",), default="the embedded text")}
RECIPE = {
    "method": Row(default="the preset's, or gptq"),
    "grid": Row(
        more=f"Schemes: {', '.join(SCHEMES)}. Of GGUF: {', '.join(PRESETS)}.", values=(*SCHEMES, *PRESETS, *GRIDS)
    ),
    "to": Row(default="the engine's, else what holds the grid"),
    "engine": Row(),
    "calibration": Row(),
    "kv": Row(values=STORED_CACHES),
    "skip": Row(more="Repeatable."),
    "override": Row(more="PATTERN=GRID, such as 'layers.0.*=int8-channel', or PATTERN=keep; repeatable.", read=pairs),
    "observer": Row(values=OBSERVERS),
    "alpha": Row(),
    "head": Row(flags=("--head/--no-head",), default="no"),
    "smaller_groups": Row(),
    "pure": Row(),
    "imatrix": Row(),
    "pre": Row(),
    "shard_gb": Row(),
}
BUDGET = {
    "bits": Row(),
    "size": Row(type=str),
    "fit": Row(type=str),
    "max_kl": Row(),
    "context": Row(),
    "candidates": Row(type=str),
    "sensitivity": Row(values=SENSITIVITY),
}
SAID = "as generation_config.json says"
SAMPLING = {
    "temperature": Row(default=f"{SAID}, else 0"),
    **{name: Row(default=SAID) for name in ("top_p", "top_k", "min_p", "repetition_penalty")},
    "seed": Row(default="another each time"),
    "max_tokens": Row(default="what the context holds"),
    "stop": Row(more="Repeatable."),
}
ROWS: dict[type[Entries], dict[str, Row]] = {
    Recipe: RECIPE,
    Calibration: CALIBRATION,
    Budget: BUDGET,
    Sampling: SAMPLING,
}
"""By field. Help has those that have rows first, in this order, then all others."""


class Group(NamedTuple):
    """What a parameter of a command is annotated with that stands for the fields of a kind."""

    kind: type[Entries]
    names: tuple[str, ...] = ()
    """Fields; none: all that may be left out."""
    panel: str | None = None
    """Under which help has them."""

    def fields(self) -> Iterator[tuple[str, Any, Row]]:
        """Names, types and rows."""
        rows = ROWS.get(self.kind, {})
        for name in self.names or dict.fromkeys((*rows, *self.kind.model_fields)):
            field = self.kind.model_fields[name]
            if not field.is_required():
                yield name, field.annotation, rows.get(name, Row())

    def parameters(self) -> Iterator[inspect.Parameter]:
        """One for each option. A field that has fields of its own stands for these."""
        for name, kind, row in self.fields():
            if _has_fields(kind):
                yield from Group(kind).parameters()
                continue
            taken = row.type or _type_of_words(kind)
            made = option(
                self.kind,
                name,
                *(row.flags or (_flag(name),)),
                more=row.more,
                values=row.values,
                show_default=row.default or _shown(self.kind.model_fields[name].default),
                rich_help_panel=self.panel,
            )
            yield _parameter(name, Annotated[taken | None, made])
            for old in self._old_names(name):
                yield _parameter(old, Annotated[taken | None, typer.Option(_flag(old), hidden=True)])

    def given(self, values: Mapping[str, Any]) -> Words:
        """What was given, of the values of all parameters."""
        result: Words = {}
        for name, kind, row in self.fields():
            if _has_fields(kind):
                result[name] = Group(kind).given(values)
                continue
            set_values = [values[key] for key in (name, *self._old_names(name)) if values[key] not in (None, [])]
            if set_values:
                result[name] = row.read(set_values[0])
        return result

    def _old_names(self, name: str) -> list[str]:
        return [old for old, new in RENAMED.items() if new == name and self.kind is Recipe]


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """As typer reads it: in place of each parameter that stands for a group, the options of that."""
    parameters = inspect.signature(command).parameters.values()
    groups = {
        parameter.name: parameter.annotation.__metadata__[0]
        for parameter in parameters
        if _is_group(parameter.annotation)
    }

    @wraps(command)
    def call(**values: Any) -> None:
        fields = {name: group.given(values) for name, group in groups.items()}
        taken = {option.name for group in groups.values() for option in group.parameters()}
        command(**{name: value for name, value in values.items() if name not in taken}, **fields)

    expanded = [
        option
        for parameter in parameters
        for option in (
            groups[parameter.name].parameters()
            if parameter.name in groups
            else [parameter.replace(kind=parameter.KEYWORD_ONLY)]
        )
    ]
    call.__signature__ = inspect.Signature(expanded)  # type: ignore[attr-defined]
    call.__annotations__ = {option.name: option.annotation for option in expanded}
    return call


def _is_group(annotation: Any) -> bool:
    return isinstance(next(iter(getattr(annotation, "__metadata__", ())), None), Group)


def _has_fields(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Entries)


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(default: Any) -> str | bool:
    """A default as help says it: numbers and names."""
    return str(default) if isinstance(default, str | int | float) and not isinstance(default, bool) else True


def _type_of_words(kind: Any) -> Any:
    """What the words of an option become: the first of several types, and lists for what has several values."""
    first = get_args(kind)[0] if get_origin(kind) in (Union, UnionType) else kind
    if get_origin(first) is Literal:
        return str
    return list[str] if get_origin(first) in (tuple, dict) else first
