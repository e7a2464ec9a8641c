"""Commands that let a model answer."""

import sys
from typing import Annotated

import typer

from halfbyte import display
from halfbyte.arguments import Talking, sentence
from halfbyte.cli.groups import Group, Words, grouped
from halfbyte.cli.options import Device, Json, Quiet, count, option, require_located
from halfbyte.cli.output import err, out, print_json
from halfbyte.devices import AUTO
from halfbyte.errors import BadRequest
from halfbyte.formats import MULTIPLIED
from halfbyte.inference.sampling import Sampling
from halfbyte.terminal import JOINERS, plain
from halfbyte.words import DTYPES, require_dtype, require_multiplied

Drawing = Annotated[
    Words,
    Group(
        Sampling,
        ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens", "stop"),
        "How tokens are chosen",
    ),
]
Model = Annotated[str, typer.Argument(help="A checkpoint of any kind: a folder, a GGUF, or a hub id.")]
System = Annotated[str | None, option(Talking, "system")]
Raw = Annotated[bool, option(Talking, "raw", "--raw")]
Context = Annotated[int | None, count(Talking, "context")]
Dtype = Annotated[
    str | None, option(Talking, "dtype", values=DTYPES, callback=lambda dtype: dtype and require_dtype(dtype))
]
Activations = Annotated[
    str, option(Talking, "activations", values=MULTIPLIED, callback=lambda name: require_multiplied(name))
]
STDIN, EXACT = "-", "exact"


@grouped
def chat(
    model: Model,
    compare: Annotated[str | None, option(Talking, "compare")] = None,
    system: System = None,
    raw: Raw = False,
    context: Context = None,
    *,
    drawing: Drawing,
    dtype: Dtype = None,
    activations: Activations = EXACT,
    device: Device = AUTO,
    quiet: Quiet = False,
) -> None:
    """Talk to a model: any checkpoint that is read, through its own chat template. Ctrl-C stops an answer; /help lists
    what else there is. Lines may come from a pipe.

    halfbyte chat model-int4

    halfbyte chat model-int4 --compare org/model --system "Answer in one sentence."
    """
    Sampling.of(drawing)
    require_located(*filter(None, (model, compare)))
    from halfbyte.cli.dialogue import Dialogue  # needs torch

    paths = [*filter(None, (compare, model))]
    Dialogue.begun(paths, system, raw, context, drawing, dtype, require_multiplied(activations), device, quiet).run()


@grouped
def run(
    model: Model,
    prompt: Annotated[str, typer.Argument(help=f"{sentence('prompt', Talking)} {STDIN} reads it from standard input.")],
    system: System = None,
    raw: Raw = False,
    context: Context = None,
    *,
    drawing: Drawing,
    dtype: Dtype = None,
    activations: Activations = EXACT,
    device: Device = AUTO,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """One answer to a prompt, on standard output, and nothing else there.

    halfbyte run model-int4 "It was a dark night, and" --max-tokens 40
    """
    Sampling.of(drawing)
    require_located(model)
    if prompt == STDIN:
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise BadRequest(f"standard input is not text in {error.encoding}") from None
    if not prompt:
        raise BadRequest("the prompt is empty; give at least one word")
    from halfbyte.inference.answer import answer  # needs torch
    from halfbyte.inference.conversation import Conversation
    from halfbyte.inference.model import Answering

    with err.status(f"loading {model}"):
        opened = Answering.open(model, device, dtype, context, raw, require_multiplied(activations))
    conversation, sampling = Conversation(opened, system), opened.sampling(drawing)
    if not (quiet or as_json):
        err.print(display.opened(opened, sampling), highlight=False, soft_wrap=True)
    result = answer(conversation, prompt, sampling, None if as_json else _say)
    if as_json:
        print_json(result)
        return
    _say("" if result.text.endswith("\n") else "\n")
    if not quiet:
        err.print(display.replied(result), highlight=False, soft_wrap=True)


def _say(text: str) -> None:
    """What a program that reads it gets as it is, and a terminal without what would command it."""
    out.file.write(plain(text, JOINERS) if out.is_terminal else text)
    out.file.flush()
