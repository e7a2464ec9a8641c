"""Which of the schemes that fit is the one to take, and why: a table of what the field has learnt."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from halfbyte.sizing.accounting import accounting_of
from halfbyte.sizing.devices import GIB
from halfbyte.sizing.question import Question
from halfbyte.sizing.types import Recommendation, Row

Words = Mapping[str, str | bool]
"""Entries of a recipe."""


@dataclass(frozen=True)
class Preference:
    """What is best where, the first that fits."""

    kind: str
    """How the engine computes (`Accounting.kind`)."""
    arithmetic: str | None
    """What the device has to multiply in; None: whatever it has."""
    schemes: tuple[str, ...]
    reasons: Mapping[str, str]


FOUR_BITS = "4 bits with a scale for 128 weights are read four times as fast as 16, and serve many users at once"
PREFERENCES = (
    Preference(
        "served",
        "fp4",
        ("nvfp4-fp8", "nvfp4", "fp8", "int4-g128"),
        {
            "nvfp4-fp8": "the device multiplies in FP4 and FP8: 4 bits, and 8 where 4 lose most, in attention and head",
            "nvfp4": "the device multiplies in FP4: 4 bits, and twice the arithmetic of FP8",
            "fp8": "the device multiplies in FP8, which loses next to nothing",
            "int4-g128": FOUR_BITS,
        },
    ),
    Preference(
        "served",
        "fp8",
        ("fp8", "int4-g128", "nvfp4"),
        {
            "fp8": "the device multiplies in FP8: half the bytes, twice the arithmetic of 16 bits, and next to no loss",
            "int4-g128": FOUR_BITS,
            "nvfp4": "4 bits, decoded to 16 as they are multiplied",
        },
    ),
    Preference(
        "served",
        None,
        ("int4-g128", "w8a8", "fp8", "nvfp4"),
        {
            "int4-g128": FOUR_BITS,
            "w8a8": "8 bits that multiply in 8 bits",
            "fp8": "half the bytes",
            "nvfp4": "4 bits, decoded to 16 as they are multiplied",
        },
    ),
    Preference(
        "ggml",
        None,
        ("Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "Q2_K", "IQ2_XXS"),
        {
            "Q4_K_M": "the usual balance of size and loss, on every device that llama.cpp runs on",
            "IQ4_XS": "a little smaller than Q4_K_M for a little more loss",
            "Q3_K_M": "the most bits that fit; it loses noticeably more than 4 do",
            "IQ3_XXS": "the most bits that fit; it loses much more than 4 do",
            "Q2_K": "the most bits that fit; a smaller model at 4 bits may well be better",
            "IQ2_XXS": "the most bits that fit; a smaller model at 4 bits is most likely better",
        },
    ),
    Preference(
        "eager",
        None,
        ("nf4", "int4-g64", "llm-int8"),
        {
            "nf4": "a quick trial: no calibration, and Transformers loads it as it is",
            "int4-g64": "the 4 bits that mlx-lm reads",
            "llm-int8": "8 bits, where 4 are refused",
        },
    ),
)


def preference_of(asked: Question) -> Preference:
    """The first whose arithmetic the device has."""
    kind = accounting_of(asked.engine).kind
    return next(
        p
        for p in PREFERENCES
        if p.kind == kind and (p.arithmetic is None or asked.device.arithmetic(p.arithmetic) is not None)
    )


def recommended(
    rows: Sequence[Row], asked: Question, budget: int | None, command: Callable[[Words], tuple[str, str]]
) -> Recommendation | None:
    """The first that fits on the cards that were asked for, else on the fewest; None where none runs or fits."""
    wanted = preference_of(asked)
    order = {name: i for i, name in enumerate(wanted.schemes)}
    able = sorted(
        (row for row in rows if row.scheme in order and not row.refused and row.kernel), key=lambda r: order[r.scheme]
    )
    fitting = [row for row in able if row.fits or row.fits is None]
    if not fitting:
        counted = [row for row in able if row.cards]
        fitting = [row for row in counted if row.cards == min(r.cards or 0 for r in counted)]
    if not fitting:
        return None
    row = fitting[0]
    cards = asked.cards if row.fits or row.fits is None else row.cards or asked.cards
    skipped = able[: able.index(row)]
    output, command_line = command(row.words)
    return Recommendation(
        scheme=row.scheme,
        engine=asked.engine,
        cards=cards,
        reason=_reason(row, wanted, skipped, asked, cards, budget),
        output=output,
        command=command_line,
        words=dict(row.words),
    )


def _reason(
    row: Row, wanted: Preference, skipped: Sequence[Row], asked: Question, cards: int, budget: int | None
) -> str:
    reason = wanted.reasons[row.scheme]
    if budget is not None and row.memory_bytes is not None and cards == asked.cards:
        each = " of each card" if cards > 1 else ""
        reason += f"; it takes {row.memory_bytes / GIB:.3g} of {budget / GIB:.3g} GiB{each}"
    elif cards != asked.cards:
        reason += f"; it takes {cards} cards"
    if skipped and (large := skipped[0]).memory_bytes is not None:
        reason += f", where {large.scheme} would take {large.memory_bytes / GIB:.3g}"
    return reason
