"""What the command line shows: tables of at most 80 columns that cut neither numbers nor names, and sentences."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import expm1
from pathlib import Path

from rich import box
from rich.table import Table

from halfbyte.report.types import (
    Blame,
    CacheReport,
    Comparison,
    DemoRow,
    Divergence,
    Evaluation,
    Inspection,
    Measured,
    Needle,
    NeedleModel,
    StateError,
    StatesEvaluation,
    WeightReport,
)
from halfbyte.sizing.choices import Choice, Kernel
from halfbyte.sizing.devices import GIB, Device
from halfbyte.sizing.types import Advice

UNKNOWN = "-"
UNCHECKED = "figures not checked against their source"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> Table:
    """The first `words` columns are names, which go on in the next line where they are long; the rest are numbers,
    which are never broken."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number, header in enumerate(headers):
        is_name = number < words
        made.add_column(header, overflow="fold", no_wrap=not is_name, justify="left" if is_name else "right")
    for row in rows:
        made.add_row(*row)
    return made


def without_prefix(names: Sequence[str], separator: str = ".") -> tuple[str, list[str]]:
    """The parts that all names begin with, and the rest of each."""
    parts = list(zip(*(name.split(separator)[:-1] for name in names), strict=False)) if len(names) > 1 else []
    same = next((i for i, part in enumerate(parts) if len(set(part)) > 1), len(parts))
    shared = "".join(part[0] + separator for part in parts[:same])
    return shared, [name.removeprefix(shared) for name in names]


def worst(rows: Sequence[WeightReport], error_of: str | None) -> list[Table | str]:
    """The weights that lost most, and what is to be said of them."""
    if not rows:
        return []
    if rows[0].error == 0:
        return ["every weight is bit for bit that of the source"]
    shared, names = without_prefix([row.name for row in rows])
    cells = [(n, r.grid, f"{r.bits_per_weight:.3f}", f"{r.error:.4f}") for n, r in zip(names, rows, strict=True)]
    notes = Counter(row.note for row in rows if row.note)
    said = f"lost most: relative error of the {error_of}{f'; names begin with {shared}' if shared else ''}"
    return [
        said,
        table(["weight", "grid", "bits", "error"], cells, words=2),
        *(f"{count} of these: {note}" for note, count in notes.items()),
    ]


def inspected(found: Inspection, count: int) -> list[Table | str]:
    """What a checkpoint is stored as, and the `count` weights that lost most."""
    megabytes, millions = found.size_bytes / 1e6, found.parameters / 1e6
    rows = [
        (k, str(r.tensors), f"{r.weights:,}", f"{r.size_bytes / 1e6:.2f}", f"{r.bits_per_weight:.3f}")
        for k, r in found.grids.items()
    ]
    return [
        f"{found.path}: {found.model_type}, {found.container or 'not quantized'}",
        f"{megabytes:.2f} MB, {millions:.2f} M parameters, {found.bits_per_parameter:.3f} bits per parameter",
        table(["stored as", "tensors", "weights", "MB", "bits"], rows),
        *worst(found.weights[:count], found.error_of),
        *(f"- {warning}" for warning in found.warnings),
    ]


def evaluated(result: Evaluation) -> list[Table | str]:
    """The models of an evaluation beside their original, and what that means in a sentence for each."""
    models = result.models
    names = _short_names(models)
    rows = [
        (
            f"original: {Path(result.reference_path).name}",
            _megabytes(result.reference),
            "",
            f"{result.reference.perplexity:.3f}",
            "",
        )
    ]
    for name, row in zip(names, models, strict=True):
        rows.append(
            (
                name,
                _megabytes(row),
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
    if floor := result.noise_floor:
        shown.append(f"noise floor, the original in bfloat16 against itself: {with_error(floor.kl, floor.kl_error, 5)}")
    for name, row in zip(names, models, strict=True):
        if row.kl_minus_first:
            shown.append(f"KL of {name} minus that of {names[0]}: {_signed(*row.kl_minus_first, 5)}")
    for gate in result.gates:
        words = "holds" if gate.holds else "does not hold"
        shown.append(f"gate {gate.name} at most {gate.limit:g}: {gate.value:.5g} of {Path(gate.path).name} {words}")
    return [*shown, *(f"note: {warning}" for warning in result.warnings)]


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
        for name, row in zip(_short_names(result.models), result.models, strict=True)
    ]
    said = "the model predicts no tokens: last hidden states are compared, each with the original's of the same token"
    notes = [f"note: {warning}" for warning in result.warnings]
    return [said, table(["model", "relative error", "largest", "cosine", "smallest"], rows), *notes]


def _verdict(name: str, row: Divergence) -> str:
    """What a model lost, in a sentence."""
    said = (
        f"{name}: the original's most likely next word is also its own in {100 * row.same_top:.1f} % of places; "
        f"it loses {row.kl:.4f} nats a token"
    )
    if paired := row.nll_minus_reference:
        difference, error = paired
        unsure = "" if error is None else f" ± {100 * error:.2f} %"
        said += f", and its perplexity is {100 * expm1(difference):+.2f} %{unsure} from the original's"
    return said


def _short_names(models: Sequence[Divergence | StateError | NeedleModel]) -> list[str]:
    """The last part of each path, or the whole where two would be called alike; and the KV cache."""
    lasts = Counter(Path(row.path).name for row in models if not row.kv)
    names = [name if lasts[name := Path(row.path).name] < 2 else row.path for row in models]
    return [f"{name}, KV cache {row.kv}" if row.kv else name for name, row in zip(names, models, strict=True)]


def needles(result: Needle) -> list[Table | str]:
    """A table for each model: a row for each length, before and after."""
    shown: list[Table | str] = [
        "What having read the fact adds to the log-probability of its answer, nats per token: the original → the model"
    ]
    for name, model in zip(_short_names(result.models), result.models, strict=True):
        rows = []
        for number, size in enumerate(result.lengths):
            part = slice(number * result.depths, (number + 1) * result.depths)
            before, after = result.reference[part], model.rows[part]
            found = [sum(row.found for row in rows) / result.depths for rows in (before, after)]
            gains = [f"{b.gain:.2f} → {a.gain:.2f}" for b, a in zip(before, after, strict=True)]
            rows.append((str(size), *gains, " → ".join(f"{100 * share:.0f} %" for share in found)))
        headers = ["tokens", *(f"at {100 * row.depth:.0f} %" for row in model.rows[: result.depths]), "found"]
        shown += [
            f"{name}; {result.facts} facts at each place, from the beginning of the text (0 %) to its end",
            *_parts(headers, rows),
        ]
    return [*shown, *(f"note: {warning}" for warning in result.warnings)]


def _parts(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Table]:
    """A table wider than 80 columns as several, each with the first column."""
    widths = [2 + max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]
    runs: list[list[int]] = [[]]
    room = 0
    for i in range(1, len(headers)):
        if room + widths[i] > 80 - widths[0] and runs[-1]:
            runs.append([])
            room = 0
        runs[-1].append(i)
        room += widths[i]
    return [
        table([headers[0], *(headers[i] for i in run)], [[row[0], *(row[i] for i in run)] for row in rows], words=0)
        for run in runs
    ]


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


def compared(found: Comparison, count: int) -> list[Table | str]:
    """Two checkpoints: their sizes, the `count` tensors that are furthest apart, and what each lost."""
    a, b = found.a, found.b
    rows = [
        (name, c.path, c.container or "not quantized", f"{c.size_bytes / 1e6:.2f}", f"{c.bits_per_parameter:.3f}")
        for name, c in (("A", a), ("B", b))
    ]
    shown: list[Table | str] = [
        table(["", "checkpoint", "container", "MB", "bits"], rows, words=3),
        f"B takes {100 * (b.size_bytes / a.size_bytes - 1):+.1f} % of A's bytes",
        *(f"{name}: {mine} in A, {its} in B" for name, (mine, its) in found.recipes.items()),
    ]
    same = sum(t.difference == 0 for t in found.tensors)
    changed = [t for t in found.tensors if t.difference or None in t.stored_as or t.stored_as[0] != t.stored_as[1]]
    known = any(t.difference is not None for t in found.tensors)
    shown.append(
        f"{len(found.tensors)} tensors"
        + (f", {same} with the same values" if known else f", {len(changed)} stored otherwise")
    )
    changed.sort(key=lambda t: (-(t.difference or 0), -abs(t.size_bytes[1] - t.size_bytes[0])))
    prefix, names = without_prefix([t.name.removesuffix(".weight") for t in changed[:count]])
    cells = [
        (
            name,
            " → ".join(dict.fromkeys(kind or "-" for kind in t.stored_as)),
            f"{t.size_bytes[0] / 1e3:.1f} → {t.size_bytes[1] / 1e3:.1f}",
            "" if t.difference is None else f"{t.difference:.4f}",
            " → ".join("-" if error is None else f"{error:.4f}" for error in t.error) if any(t.error) else "",
        )
        for name, t in zip(names, changed[:count], strict=True)
    ]
    if cells:
        shown += [
            "furthest apart: distance of B's values from A's, relative; errors as the runs reported them"
            + (f"; names begin with {prefix}" if prefix else ""),
            table(["tensor", "stored as", "kB", "apart", "error"], cells, words=2),
        ]
    for mine, its in found.evaluations:
        shown.append(
            f"KL on {mine.windows} windows of {mine.length} tokens of {mine.text}: "
            f"{with_error(mine.model.kl, mine.model.kl_error, 5)} → {with_error(its.model.kl, its.model.kl_error, 5)}; "
            f"perplexity {mine.model.perplexity:.3f} → {its.model.perplexity:.3f}"
        )
    if not found.evaluations:
        shown.append("no measurement of both on one text is in their reports: halfbyte eval A B --against ORIGINAL")
    return [*shown, *(f"note: {warning}" for warning in found.warnings)]


def cached(found: CacheReport) -> list[Table | str]:
    """The scales of a KV cache, a row for each attention."""
    shared, names = without_prefix([row.module for row in found.rows])
    cells = [
        (
            name,
            *("" if scale is None else f"{scale:.5f}" for scale in (row.key_scale, row.value_scale)),
            *(f"{100 * share:.4f} %" for share in (row.keys_clipped, row.values_clipped)),
        )
        for name, row in zip(names, found.rows, strict=True)
    ]
    said = "scales of the KV cache (the largest of heads), and what lies beyond them on other text"
    said += f"; names begin with {shared}" if shared else ""
    return [said, table(["attention", "keys", "values", "keys cut", "values cut"], cells)]


def _megabytes(row: Measured) -> str:
    return f"{row.size_bytes / 1e6:.1f}" if row.size_bytes else ""


def with_error(value: float, error: float | None, digits: int) -> str:
    """A number and its standard error, if it is known."""
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"


def _signed(value: float, error: float | None, digits: int) -> str:
    return f"{value:+.{digits}f}" if error is None else f"{value:+.{digits}f} ± {error:.{digits}f}"


def devices(known: Sequence[Device], here: Sequence[Device]) -> list[Table | str]:
    """The table of devices, and which are on this machine."""
    rows = [
        (
            d.name if d.checked else f"{d.name} *",
            UNKNOWN if d.memory is None else f"{d.memory:g}",
            UNKNOWN if d.bandwidth is None else f"{d.bandwidth:g}",
            *(UNKNOWN if rate is None else f"{rate:g}" for rate in (d.fp16, d.int8, d.fp8, d.fp4)),
            UNKNOWN if d.capability is None else f"{d.capability:.1f}",
        )
        for d in known
    ]
    return [
        "10^12 dense operations per second by dtype; cc: NVIDIA's compute capability",
        table(["device", "GiB", "GB/s", "fp16", "int8", "fp8", "fp4", "cc"], rows),
        f"{UNKNOWN}: unpublished, or there is none; sources: halfbyte devices --json",
        *([] if all(d.checked for d in known) else [f"*: {UNCHECKED}"]),
        *(f"here: {_named(device)}" for device in here),
    ]


def _named(device: Device) -> str:
    memory = "" if device.memory_bytes is None else f", {device.memory_bytes / GIB:.1f} GiB"
    return f"{device.title}{memory} (--device {device.name})"


def device(one: Device, choices: Mapping[str, Sequence[Choice]]) -> list[Table | str]:
    """A device, and what multiplies there in each engine."""
    facts = [
        ("memory", None if one.memory_bytes is None else f"{one.memory_bytes / GIB:.1f} GiB"),
        ("bandwidth", None if one.bandwidth is None else f"{one.bandwidth:g} GB/s"),
        *((f"{name}, dense", _rate(one.arithmetic(name))) for name in ("fp16", "int8", "fp8", "fp4")),
        ("compute capability", None if one.capability is None else f"{one.capability:.1f}"),
    ]
    rows: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for engine, known in choices.items():
        runs = [(choice.name, kernel) for choice in known if (kernel := choice.kernel_on(one))]
        rows.setdefault(tuple((name, _titled(kernel)) for name, kernel in runs), []).append(engine)
    cells = [
        (", ".join(engines), ", ".join(name for name, own in runs if own == title), title)
        for runs, engines in rows.items()
        for title in dict.fromkeys(title for _, title in runs)
    ]
    return [
        f"{one.title} ({one.name}); source: {one.source}",
        *([] if one.checked else [UNCHECKED]),
        *(f"{name}: {value or 'unknown, or none'}" for name, value in facts),
        table(["engine", "what runs on it", "kernel"], cells, words=3),
    ]


def _titled(kernel: Kernel) -> str:
    return f"{kernel.name}, {kernel.note}" if kernel.note else kernel.name


def _rate(operations: float | None) -> str | None:
    return None if operations is None else f"{operations / 1e12:g}e12 operations/s"


def advised(advice: Advice) -> list[Table | str]:
    """A row for every scheme, and which to take."""
    rows = [
        (
            row.scheme,
            _digits((row.file_bytes or 0) / 1e9),
            _digits((row.memory_bytes or 0) / GIB),
            {True: "yes", False: "no", None: "?"}[row.fits] if row.kernel else "no",
            *(UNKNOWN if n is None else f"{n}" for n in (row.longest_context, row.largest_batch, row.cards)),
            *(UNKNOWN if n is None else f"{n:.0f}" for n in (row.decode_tokens, row.prefill_tokens)),
            UNKNOWN if row.loss is None else f"{row.loss.kl:.4f}",
        )
        for row in advice.rows
        if not row.refused
    ]
    headers = ["scheme", "GB", "GiB", "fits", "context", "batch", "cards", "tok/s", "prompt", "KL"]
    return [*_about(advice), table(headers, rows), *_explained(advice), *_taken(advice)]


def _digits(number: float) -> str:
    """Three that count."""
    return f"{number:.0f}" if number >= 1000 else f"{number:.3g}"


def _about(advice: Advice) -> list[str]:
    active, total = advice.active_parameters / 1e9, advice.parameters / 1e9
    share = f", of which a token is multiplied by {_digits(active)}" if active < 0.9 * total else ""
    memory = "of unknown memory" if advice.budget is None else f"{advice.budget / GIB:.1f} GiB to use"
    cards = f"{advice.cards} x " if advice.cards > 1 else ""
    caches = ", ".join(f"{row.name} {_digits(row.size_bytes / GIB)}" for row in advice.caches)
    return [
        f"{advice.model}: {_digits(total)} billion parameters{share}",
        f"{advice.engine} on {cards}{advice.device_title}, {memory}",
        f"context {advice.context}, batch {advice.batch}, cache in {advice.cache}",
        *([f"GiB of cache: {caches}"] if caches else []),
    ]


def _explained(advice: Advice) -> list[str]:
    models: dict[str, dict[str, None]] = {}
    for row in advice.rows:
        if row.loss:
            models.setdefault(row.loss.model, {})[row.loss.source] = None
    measured = "; ".join(f"{model} ({', '.join(sources)})" for model, sources in models.items())
    refused: dict[str, list[str]] = {}
    for row in advice.rows:
        if row.refused:
            refused.setdefault(row.refused, []).append(row.scheme)
    bare = [row.scheme for row in advice.rows if not row.refused and not row.kernel]
    return [
        "GB: the file; GiB: of a card in use, with cache; context, batch: the most that fit;",
        "cards: the fewest; tok/s, prompt: at most, by a roofline that no engine reaches",
        *([f"KL: nats per token where somebody measured, on {measured}"] if measured else []),
        *([f"nothing on {advice.device_title} multiplies by: {', '.join(bare)}"] if bare else []),
        *(f"{', '.join(schemes)} cannot be: {reason}" for reason, schemes in refused.items()),
        *(f"note: {note}" for note in advice.notes),
    ]


def _taken(advice: Advice) -> list[str]:
    best = advice.recommendation
    if best is None:
        if any(row.fits for row in advice.rows):
            return ["it fits as it is, and there is nothing better to make of it here"]
        return ["nothing fits: take a smaller model, a shorter context or more memory"]
    row = next(row for row in advice.rows if row.scheme == best.scheme)
    parts = {
        "weights": row.weights_bytes,
        "cache": row.cache_bytes,
        "activations": row.activations_bytes,
        "libraries": row.beside_bytes,
    }
    said = ", ".join(f"{name} {_digits(size / GIB)}" for name, size in parts.items() if size is not None)
    many = f" on {best.cards} cards" if best.cards > 1 else ""
    return [f"take {best.scheme}{many}: {best.reason}", f"GiB of {best.scheme}: {said}", best.command]
