"""What was measured of models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import expm1
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from halfbyte.display.tables import in_parts, megabytes, signed, table, with_error, without_prefix

if TYPE_CHECKING:  # `halfbyte --help` need not wait for them
    from halfbyte.report.types import (
        Blame,
        DemoRow,
        Divergence,
        Evaluation,
        Gate,
        Needle,
        NeedleModel,
        StateError,
        StatesEvaluation,
        SuiteModel,
        TaskModel,
    )


def evaluated(result: Evaluation) -> list[Table | str]:
    """The models of an evaluation beside their original, and what that means in a sentence for each."""
    models = result.models
    names = short_names(models)
    rows = [
        (
            f"original: {Path(result.reference_path).name}",
            megabytes(result.reference),
            "",
            f"{result.reference.perplexity:.3f}",
            "",
        )
    ]
    for name, row in zip(names, models, strict=True):
        rows.append(
            (
                name,
                megabytes(row),
                with_error(row.kl, row.kl_error, 5),
                f"{row.perplexity:.3f}",
                f"{100 * row.same_top:.2f} %",
            )
        )
    tails = [
        (
            name,
            f"{r.kl_median:.5f}",
            f"{r.kl_p99:.4f}",
            f"{r.kl_max:.3f}",
            f"{100 * r.probability_change_rms:.2f} %",
        )
        for name, r in zip(names, models, strict=True)
    ]
    shown: list[Table | str] = [
        table(["model", "MB", "KL, nats", "perplexity", "same word"], rows),
        "KL by token: of half the tokens at most, of 99 in 100, of all; "
        "how far the chance of the right word moves (root mean square)",
        table(["model", "half", "99 %", "all", "chance"], tails),
        *(_verdict(name, row) for name, row in zip(names, models, strict=True)),
    ]
    shown += [f"{name}: {finding}" for name, row in zip(names, models, strict=True) for finding in row.findings]
    if floor := result.noise_floor:
        shown.append(f"noise floor, the original in bfloat16 against itself: {with_error(floor.kl, floor.kl_error, 5)}")
    for name, row in zip(names, models, strict=True):
        if row.kl_minus_first:
            shown.append(f"KL of {name} minus that of {names[0]}: {signed(*row.kl_minus_first, 5)}")
    return [*shown, *gates(result.gates), *(f"note: {warning}" for warning in result.warnings)]


def by_text(results: Sequence[Evaluation]) -> list[Table | str]:
    """The divergence of each model on each of several texts, of the largest loss first."""
    rows = [
        (name, result.text_name or Path(result.text).name, str(row.tokens), with_error(row.kl, row.kl_error, 5))
        for result in results
        for name, row in zip(short_names(result.models), result.models, strict=True)
    ]
    return [
        table(
            ["model", "text", "tokens", "KL, nats"],
            sorted(rows, key=lambda row: -float(row[3].split()[0])),
            name_columns=2,
        )
    ]


def gates(gates: Sequence[Gate]) -> list[str]:
    """A line for each limit."""
    verdicts = {True: "holds", False: "does not hold"}
    return [
        f"gate {g.name} at most {g.limit:g}: {g.value:.5g} of {Path(g.path).name}, {g.of}, {verdicts[g.holds]}"
        for g in gates
    ]


def states(result: StatesEvaluation) -> list[Table | str]:
    """A row for each model that predicts no tokens."""
    rows = [
        [
            name,
            with_error(row.state_error, row.state_error_error, 4),
            f"{row.state_error_max:.3f}",
            f"{row.cosine:.5f}",
            f"{row.cosine_min:.4f}",
        ]
        for name, row in zip(short_names(result.models), result.models, strict=True)
    ]
    title = "the model predicts no tokens: last hidden states are compared, each with the original's of the same token"
    notes = [f"note: {warning}" for warning in result.warnings]
    return [title, table(["model", "relative error", "largest", "cosine", "smallest"], rows), *notes]


def _verdict(name: str, row: Divergence) -> str:
    """What a model lost, in a sentence."""
    sentence = (
        f"{name}: the original's most likely next word is also its own in {100 * row.same_top:.1f} % of places; "
        f"it loses {row.kl:.4f} nats a token"
    )
    if paired := row.nll_minus_reference:
        difference, error = paired
        unsure = "" if error is None else f" ± {100 * error:.2f} %"
        sentence += f", and its perplexity is {100 * expm1(difference):+.2f} %{unsure} from the original's"
    return sentence


def short_names(models: Sequence[Divergence | StateError | NeedleModel | SuiteModel | TaskModel]) -> list[str]:
    """The last part of each path, or the whole where two would be called alike; and the KV cache."""
    lasts = Counter(Path(row.path).name for row in models if not row.kv)
    names = [name if lasts[name := Path(row.path).name] < 2 else row.path for row in models]
    return [f"{name}, KV cache {row.kv}" if row.kv else name for name, row in zip(names, models, strict=True)]


def needles(result: Needle) -> list[Table | str]:
    """A table for each model: a row for each length, before and after."""
    shown: list[Table | str] = [
        "What having read the fact adds to the log-probability of its answer, nats per token: the original → the model"
    ]
    for name, model in zip(short_names(result.models), result.models, strict=True):
        rows = []
        for number, size in enumerate(result.lengths):
            part = slice(number * result.depths, (number + 1) * result.depths)
            before, after = result.reference[part], model.rows[part]
            shares = [sum(row.found for row in rows) / result.depths for rows in (before, after)]
            gains = [f"{b.gain:.2f} → {a.gain:.2f}" for b, a in zip(before, after, strict=True)]
            rows.append((str(size), *gains, " → ".join(f"{100 * share:.0f} %" for share in shares)))
        headers = ["tokens", *(f"at {100 * row.depth:.0f} %" for row in model.rows[: result.depths]), "found"]
        shown += [
            f"{name}; {result.facts} facts at each place, from the beginning of the text (0 %) to its end",
            *in_parts(headers, rows),
        ]
    return [*shown, *(f"note: {warning}" for warning in result.warnings)]


def blamed(result: Blame, count: int) -> list[Table | str]:
    """The `count` parts of each kind that give back most, first those that are in no block of the model."""
    weights = [part for part in result.parts if part.kind == "weight"]
    large = [part for part in result.parts if part.kind != "weight"]
    whole, _ = result.kl
    shown: list[Table | str] = [
        f"{Path(result.path).name}: KL to the original {with_error(*result.kl, 5)} nats; what of that goes "
        "where one part is put back as it was"
    ]
    for kind, parts in (("part", large), ("weight", weights)):
        shared, names = without_prefix([_in_short(part.name) for part in parts[:count]])
        rows = []
        for name, part in zip(names, parts, strict=False):
            share = f"{100 * part.kl[0] / whole:.1f} %" if whole else ""
            error = "" if part.error is None else f"{part.error:.4f}"
            rows.append((name, with_error(*part.kl, 5), share, error))
        if rows:
            shown += [
                *([f"{kind}s begin with {shared}"] if shared else []),
                table([kind, "gives back, nats", "of all", "error"], rows),
            ]
    first = large[0] if large else None
    if first and whole:
        shown.append(f"{first.name} ({first.kind}) costs most: {100 * first.kl[0] / whole:.0f} % of what is lost")
    shown.append(
        "error: the largest relative error of its weights, as the run reported it; parts need not add up to 100 %"
    )
    return [*shown, *(f"note: {warning}" for warning in result.warnings)]


def _in_short(names: str) -> str:
    """Several names, with what they all begin with once."""
    shared, rest = without_prefix(names.split(", "))
    return shared + ", ".join(rest)


def demonstrated(rows: Sequence[DemoRow]) -> list[Table | str]:
    """A row for each method of the demonstration."""
    cells = [
        (
            f"{r.method} {r.grid}".strip(),
            f"{r.bits_per_weight:.3f}",
            f"{r.size_bytes / 1e6:.2f}",
            with_error(r.kl, r.kl_error, 5),
            f"{r.perplexity:.2f}",
            f"{100 * r.same_top:.1f}",
            f"{r.seconds:.1f}",
        )
        for r in rows
    ]
    return [
        table(["method and grid", "bits", "MB", "KL, nats", "perpl.", "same %", "s"], cells),
        "bits: of a quantized weight, scales counted; "
        "KL: what a token's prediction differs from the original's, ± its standard error;",
        "same: how often the most likely next word is the original's; s: seconds of quantizing",
    ]
