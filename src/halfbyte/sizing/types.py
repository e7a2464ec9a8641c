"""What `plan` says, as types. Sizes are bytes, of each card where nothing else is said; what is not known is None."""

from halfbyte.report.types import Part

SCHEMA = 1
"""Counted up when an entry is renamed or means something else."""


class Loss(Part, frozen=True):
    """What was measured of a scheme, on another model."""

    kl: float
    """Nats per token."""
    model: str
    method: str
    source: str


class CacheRow(Part, frozen=True):
    """A type of cache that the engine has."""

    name: str
    size_bytes: int
    """Of all sequences, on all cards."""
    source: str


class Row(Part, frozen=True):
    """One scheme for a model, an engine and a device."""

    scheme: str
    words: dict[str, str | bool]
    """The recipe's entries that make it; none for the model as it is."""
    refused: str | None = None
    """Why it cannot be, in which case nothing else is said."""
    kernel: str | None = None
    """What multiplies by it; None: nothing does on this device."""
    kernel_note: str = ""
    kernel_source: str | None = None
    file_bytes: int | None = None
    """Of all its tensors, exactly."""
    weights_bytes: int | None = None
    cache_bytes: int | None = None
    activations_bytes: int | None = None
    beside_bytes: int | None = None
    """Of libraries and drivers."""
    memory_bytes: int | None = None
    fits: bool | None = None
    """On the cards that were asked for."""
    longest_context: int | None = None
    largest_batch: int | None = None
    cards: int | None = None
    """How many it takes at least."""
    tensor_parallel: tuple[int, ...] = ()
    """Over how many cards it can be split."""
    decode_tokens: float | None = None
    """Of all sequences in a second, by a roofline: at most so many."""
    prefill_tokens: float | None = None
    loss: Loss | None = None


class Recommendation(Part, frozen=True):
    """What to make of a model, and why."""

    scheme: str
    engine: str
    cards: int
    reason: str
    output: str
    """What the command writes."""
    command: str
    words: dict[str, str | bool]
    """Entries of a recipe."""


class Advice(Part, frozen=True):
    """What fits where."""

    schema_version: int = SCHEMA
    model: str
    parameters: int
    active_parameters: int
    """That a token is multiplied by."""
    engine: str
    accounting: str
    """What the engine's share of memory rests on."""
    device: str
    device_title: str
    device_memory: int | None
    budget: int | None
    """Bytes of a card that the engine may take."""
    cards: int
    context: int
    longest_known: int | None
    """Tokens that the model is made for."""
    batch: int
    cache: str
    caches: list[CacheRow]
    rows: list[Row]
    recommendation: Recommendation | None
    notes: list[str]
