"""Options are what arguments are declared as: a new word of a recipe or of a budget is an option by itself."""

import inspect
from typing import Annotated

import pytest
from pydantic import Field

import halfbyte
from halfbyte.budget.budget import Budget
from halfbyte.cli import measuring, planning, reporting, talking, writing
from halfbyte.cli.groups import Group, Words, grouped
from halfbyte.recipe import RENAMED, Calibration, Recipe


class Longer(Recipe, frozen=True):
    """A recipe with more words."""

    rounds: int = Field(3, description="How often.")
    twice: bool = Field(False, description="Whether again.")
    layers: tuple[str, ...] = Field((), description="Which.")


def test_fields_of_a_recipe_a_calibration_and_a_budget_are_options():
    options = inspect.signature(writing.quantize).parameters
    fields = {*Recipe.model_fields, *Calibration.model_fields, *Budget.model_fields, *RENAMED} - {"calibration"}
    assert fields <= options.keys()


def test_a_new_field_is_an_option():
    new = {option.name: option.annotation for option in Group(Longer, ("rounds", "twice", "layers")).parameters()}
    assert [taken.__origin__ for taken in new.values()] == [int | None, bool | None, list[str] | None]
    help = [taken.__metadata__[0] for taken in new.values()]
    assert [(info.help, info.default, info.show_default) for info in help] == [
        ("How often.", "--rounds", "3"),
        ("Whether again.", "--twice", True),
        ("Which.", "--layers", True),
    ]


def test_a_command_gets_what_was_given_of_a_group():
    got = {}

    @grouped
    def command(path: str, *, words: Annotated[Words, Group(Recipe, ("observer", "override", "calibration"))]) -> None:
        got.update(words, path=path)

    words = dict.fromkeys(inspect.signature(command).parameters)
    assert list(words) == ["path", "observer", "input_range", "override", "source", "samples", "length", "seed"]
    command(**{**words, "path": "x", "input_range": "mse", "override": ["a=nf4"], "samples": 3})
    assert got == {"path": "x", "observer": "mse", "override": {"a": "nf4"}, "calibration": {"samples": 3}}


@pytest.mark.parametrize(
    ("command", "function"),
    [
        (measuring.evaluate, "evaluate"),
        (measuring.evaluate, "tasks"),
        (measuring.needle, "needle"),
        (measuring.blame, "blame"),
        (measuring.bench, "bench"),
        (talking.run, "generate"),
        (planning.plan, "advise"),
        (reporting.compare, "compare"),
        (reporting.push, "push"),
        (writing.kv, "kv"),
        (writing.convert, "convert"),
        (writing.dequantize, "dequantize"),
    ],
)
def test_defaults_of_commands_are_those_of_functions(command, function):
    options, taken = (inspect.signature(each).parameters for each in (command, getattr(halfbyte, function)))
    shared = (options.keys() & taken.keys()) - {"lengths", "tasks"}  # which are read of one word
    assert shared
    for name in shared:
        assert options[name].default in (None, taken[name].default)
