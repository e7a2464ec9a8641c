"""What functions and commands are asked: of each argument its type, its default, and the sentence that says what it is.

A recipe's are the fields of `Recipe`, a budget's those of `Budget`; all others are here. Signatures in Python repeat
types and defaults, for editors and type checkers, and tests hold them to the fields. Sentences stand in no other place:
docstrings and the command line's help are made of them.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import Field

from halfbyte.devices import AUTO, KINDS
from halfbyte.engines.engines import ENGINES, OURS, OWN_SERVER, SERVERS, TIMED
from halfbyte.errors import require_at_least
from halfbyte.evaluation.conventions import CONVENTIONS
from halfbyte.evaluation.suites.suite import ALL, SHIPPED
from halfbyte.formats import Activations
from halfbyte.recipe import METHODS, SHORTEST, Entries, Recipe, meaning
from halfbyte.words import CONTAINERS, DTYPES, PLAIN

Function = TypeVar("Function", bound=Callable[..., Any])
LISTED = {"method": METHODS, "to": CONTAINERS, "engine": ENGINES}
"""What words of a recipe may be, where a sentence can list it."""


class Running(Entries, frozen=True):
    """Of whatever takes its time or writes."""

    overwrite: bool = Field(False, description="Replace an output that exists.")
    dry_run: bool = Field(False, description="Say what would be written, and write nothing.")
    progress: bool = Field(False, description="True for a bar, or a function of (what, done, total).")
    device: str = Field(
        AUTO,
        description=f"What computes: {AUTO} (a GPU where there is one), {', '.join(KINDS)}, or a GPU by its number "
        "(cuda:1).",
    )


class Converting(Entries, frozen=True):
    """Of writing a quantized checkpoint in another container."""

    grid: str | None = Field(None, description="What to round to where the container does not hold the source's grid.")


class Dequantizing(Entries, frozen=True):
    """Of writing it in 16 bits."""

    to: str | None = Field(None, description=f"{' or '.join(PLAIN)}.")
    dtype: str | None = Field(None, description=f"{', '.join(DTYPES)}.")


class Caching(Entries, frozen=True):
    """Of the scales of a KV cache."""

    grid: str = Field("fp8-e4m3", description="fp8-e4m3, or fp8-e4m3-head with a scale for each head.")


class Comparing(Entries, frozen=True):
    """Of two checkpoints side by side."""

    values: bool = Field(
        True, description="Read all tensors, for how far apart their values are; else headers and reports alone."
    )


class Publishing(Entries, frozen=True):
    """Of an output on the hub."""

    repository: str = Field(description="Where to: org/name.")
    private: bool = Field(False, description="Make a repository that only you see.")


class Fitting(Entries, frozen=True):
    """Of where a model is to run."""

    device: str | None = Field(None, description="What it is to run on: a row of `halfbyte devices`, or cpu.")
    memory: str | int | None = Field(None, description="In place of a device: such as 24GiB.")
    engine: str | None = Field(None, description="What is to load it.")
    cards: int = Field(1, ge=1, description="How many of the device.")
    context: int | None = Field(None, ge=1, description="Tokens of a sequence.")
    batch: int = Field(1, ge=1, description="Sequences at a time.")
    cache: str = Field("16 bits", description="What the cache is stored as.")


class Measuring(Entries, frozen=True):
    """Of whatever compares models with their original."""

    against: str = Field(description="The original.")
    text: str = Field(
        "heldout",
        description="A text file, a .jsonl, .json or .csv, a dataset, or an embedded text: 'heldout' (English), or "
        "'multilingual-fi' and the like of 17 languages.",
    )
    length: int = Field(512, ge=SHORTEST, description="Tokens in a window.")
    windows: int | None = Field(None, ge=1, description="Use only the first N windows.")
    kv: str | Sequence[str] = Field(
        ("stored",), description="Run the models with this KV cache: fp8-e4m3, int8, int4 ..., none for 16 bits."
    )
    adapter: str | None = Field(None, description="A LoRA adapter's folder, merged into the original as it is read.")
    foreign: bool = Field(
        False, description="Compare with another model than the source, or one with other tokens, too."
    )
    gate: str | None = Field(None, description="Limits such as kl=0.05,flips=2%.")


class Evaluating(Measuring, frozen=True):
    """Of a text."""

    convention: str = Field(
        "served", description=". ".join(f"{known.name}: {known.about}" for known in CONVENTIONS.values())
    )
    noise_floor: bool = Field(False, description="Measure the original in bfloat16 against itself, too.")


class Answering(Measuring, frozen=True):
    """Of answers to prompts, and of tasks."""

    suites: str | Sequence[str] = Field(
        ALL,
        description=f"Prompts with a check each, answered greedily by both: {', '.join(SHIPPED)}, {ALL}, or a .jsonl "
        "of your own.",
    )
    tokens: int | None = Field(None, ge=1, description="The most that an answer in a suite has.")
    tasks: str | Sequence[str] = Field(
        description="Tasks of lm-eval, such as arc_easy,hellaswag,gsm8k,ifeval,mmlu (halfbyte[tasks])."
    )
    folder: str | None = Field(
        None, description="A folder with tasks of your own, as lm-eval's YAML; they run offline."
    )
    limit: int | None = Field(None, ge=1, description="Items of each task.")
    shots: int | None = Field(None, ge=0, description="Examples before each item.")
    as_chat: bool = Field(False, description="Put tasks through the model's chat template.")
    runs_code: bool = Field(
        False, description="Let tasks such as humaneval execute what the models write, on this machine."
    )


class Retrieving(Measuring, frozen=True):
    """Of facts that are hidden in long texts."""

    lengths: Sequence[int] = Field((256, 512, 1024), description="Tokens of the texts.")
    depths: int = Field(5, ge=1, description="Places from the beginning to the end.")
    facts: int = Field(8, ge=1, description="Facts at each place, of which the mean is shown.")
    seed: int = Field(0, ge=0, description="Which facts and texts are drawn.")


class Blaming(Measuring, frozen=True):
    """Of the search for the part that lost most."""

    windows: int | None = Field(8, ge=1, description=meaning("windows", Measuring))
    blocks: int = Field(3, ge=0, description="Of how many blocks, those that cost most, each weight is tried too.")


class Talking(Entries, frozen=True):
    """Of a model that answers."""

    prompt: str = Field(description="What it is asked, or is to continue.")
    system: str | None = Field(None, description="What the model is told before a chat: how to answer.")
    raw: bool = Field(False, description="Continue texts as they are, without the model's chat template.")
    context: int | None = Field(
        None,
        ge=1,
        description="Tokens of prompt and answer that there is to be memory for; by default what the model reads, or "
        "as many as fit.",
    )
    dtype: str | None = Field(
        None, description=f"What the model computes in: {', '.join(DTYPES)}; by default what it was made in."
    )
    activations: Activations = Field(
        "exact",
        description="What packed weights are multiplied by on a CPU: activations as they are (exact), or rounded to 8 "
        "bits in groups of 32 (int8), which is faster and loses a little.",
    )
    compare: str | None = Field(
        None, description="The original, which answers too; the first token at which both part is marked."
    )


class Timing(Entries, frozen=True):
    """Of how fast models are."""

    against: str | None = Field(None, description="The original, timed in the same run.")
    engines: str | Sequence[str] = Field(
        (),
        description=f"In what: {', '.join(TIMED)} (Transformers with halfbyte's linears is {OURS}); by default all "
        "that are installed and load the file.",
    )
    tokens: int = Field(128, ge=1, description="Tokens that are decoded.")
    prompt: int = Field(512, ge=1, description="Tokens of the prompt.")
    batch: int | Sequence[int] = Field((1,), description="Sequences at a time, such as 1,4.")
    context: int | Sequence[int] | None = Field(
        None,
        description="In place of one prompt, several: tokens before decoding begins, such as 512,4096.",
    )
    repeats: int = Field(5, ge=1, description="How often each is timed, in turn; the median counts.")
    threads: int | None = Field(None, ge=1, description="Threads of each engine; by default as many as torch takes.")
    activations: str | Sequence[str] = Field(
        ("exact",),
        description="How halfbyte multiplies by packed weights on CPUs: exact, or int8, which rounds what they are "
        "multiplied with to 8 bits in groups of 32, as llama.cpp does.",
    )
    card: bool = Field(False, description="Put what was measured into the report.json and the card of each model.")


class Serving(Entries, frozen=True):
    """Of a model that answers over HTTP."""

    engine: str | None = Field(
        None,
        description=f"What serves it: {', '.join(SERVERS)}, or {OWN_SERVER}'s own server; by default the engine that "
        f"loads it best, of those that are installed, or else {OWN_SERVER}.",
    )
    host: str = Field(
        "127.0.0.1", description="Where to listen: this machine alone; 0.0.0.0 is every network it is in."
    )
    port: int = Field(8000, ge=0, description="The port; 0 for any that is free.")
    api_key: str | None = Field(None, description="A key that clients have to have.")
    name: str | None = Field(None, description="What clients call the model; by default its folder or file.")
    slots: int | None = Field(None, ge=1, description="Requests that are answered at a time.")
    queue: int | None = Field(None, ge=0, description=f"Requests that may wait ({OWN_SERVER}'s own server).")
    dry_run: bool = Field(False, description="Print the command that would run, and run nothing.")


def sentence(name: str, kind: type[Entries] = Recipe) -> str:
    """What an argument is, and what it may be where that can be listed."""
    listed = LISTED.get(name, ()) if kind is Recipe else ()
    return " ".join(filter(None, (meaning(name, kind), f"{', '.join(listed)}." if listed else "")))


def least(name: str, kind: type[Entries]) -> int:
    """The smallest value of a count."""
    return next(bound.ge for bound in kind.model_fields[name].metadata if hasattr(bound, "ge"))


def require_counts(kind: type[Entries], **counts: object) -> None:
    """Raise BadRequest for a count that is too small, or none where there has to be one."""
    for name, value in counts.items():
        if value is not None or kind.model_fields[name].default is not None:
            require_at_least(least(name, kind), **{name: value})


def documented(*kinds: type[Entries], **more: str) -> Callable[[Function], Function]:
    """For a function: `{arguments}` in its docstring becomes a line for each that is a field of these; `more` is what
    Python alone has to say of some."""

    def complete(function: Function) -> Function:
        lines = []
        for name in inspect.signature(function).parameters:
            kind = next((kind for kind in kinds if name in kind.model_fields), None)
            if kind is not None:
                lines.append(" ".join(filter(None, (f"{name}:", sentence(name, kind), more.get(name)))))
        function.__doc__ = (function.__doc__ or "").replace("{arguments}", "\n        ".join(lines))
        return function

    return complete
