"""Commands that say what fits, before anything is written."""

from dataclasses import asdict
from typing import Annotated

import typer

from halfbyte import display
from halfbyte.arguments import Fitting
from halfbyte.cli.options import Json, completing, count, option, require_located
from halfbyte.cli.output import out, print_json, print_value, show
from halfbyte.engines.engines import ENGINES, engine_named
from halfbyte.sizing.accounting import ACCOUNTINGS
from halfbyte.sizing.cache import TYPES
from halfbyte.sizing.choices import choices
from halfbyte.sizing.devices import device_called, here
from halfbyte.sizing.devices import devices as table_of_devices
from halfbyte.sizing.question import question


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder, a GGUF, or a hub id (org/name:Q4_K_M for one of its GGUFs): of that only headers are "
            "downloaded."
        ),
    ],
    device: Annotated[
        str | None,
        option(Fitting, "device", show_default="what is here", autocompletion=lambda: ["cpu", *table_of_devices()]),
    ] = None,
    memory: Annotated[str | None, option(Fitting, "memory")] = None,
    engine: Annotated[
        str | None,
        option(
            Fitting,
            "engine",
            more=f"{', '.join(ACCOUNTINGS)}.",
            values=ACCOUNTINGS,
            show_default="vllm for cards of servers, else llama.cpp",
        ),
    ] = None,
    cards: Annotated[int, count(Fitting, "cards")] = 1,
    context: Annotated[int | None, count(Fitting, "context", show_default="8192, or the model's if less")] = None,
    batch: Annotated[int, count(Fitting, "batch")] = 1,
    cache: Annotated[
        str,
        option(
            Fitting,
            "cache",
            more=f"{', '.join(TYPES)}.",
            values=[name for name in TYPES if " " not in name],  # shells part words at spaces
        ),
    ] = "16 bits",
    as_json: Json = False,
) -> None:
    """What fits where, how fast at most, what it loses, and which scheme to take. No weight is read.

    halfbyte plan org/model --device rtx-4090 --engine vllm --context 8192 --batch 8
    """
    asked = question(engine, device, memory, cards, context, batch, cache)  # what is wrong need not wait for torch
    require_located(model)
    from halfbyte.sizing.advice import advise

    advice = advise(model, asked)
    if as_json:
        print_json(advice)
        return
    for part in display.advised(advice):
        out.print(part, soft_wrap=isinstance(part, str))


def devices(
    name: Annotated[
        str | None,
        typer.Argument(
            help="One of them, for what runs on it.",
            show_default="all",
            autocompletion=lambda: [*table_of_devices()],
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """The cards, chips and processors that `plan` knows, with their sources, and what is on this machine.

    halfbyte devices rtx-4090
    """
    listed = [device_called(name)] if name else list(table_of_devices().values())
    present = [] if name else here()
    if as_json:
        print_value({"devices": [asdict(d) for d in listed], "here": [asdict(d) for d in present]})
    elif name:
        show(display.device(listed[0], {engine: list(row.values()) for engine, row in choices().items()}))
    else:
        show(display.devices(listed, present))


def support(
    engine: Annotated[
        str | None,
        typer.Option(
            help="What this engine loads, as a list.",
            show_default="all, as tables of Markdown",
            autocompletion=completing(*ENGINES),
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Which grids each container holds, found by trying, and what engines load.

    halfbyte support --engine vllm
    """
    if engine:
        engine_named(engine)
    from halfbyte.report import support

    if as_json:
        print_json(support.support_matrix(engine))
    else:
        print(support.of_engine(engine) if engine else support.markdown())
