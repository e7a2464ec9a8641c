"""What fits where, found by trying: the loop behind the matrix test and the README's table."""

import textwrap
from collections.abc import Iterator
from contextlib import suppress
from functools import cache

import torch

from halfbyte import formats
from halfbyte.engines.architectures import Config, Registry, registry
from halfbyte.engines.engines import ENGINES, engine_named
from halfbyte.engines.verdicts import Word, check
from halfbyte.errors import BrokenOutput, Unsupported
from halfbyte.grids import GRIDS, schemes
from halfbyte.grids.activations import ActivationQuant
from halfbyte.grids.grid import Grid
from halfbyte.grids.quantized import Quantized
from halfbyte.models.weight import Weight
from halfbyte.recipe import METHODS, method_named
from halfbyte.report.types import EngineSupport, Support
from halfbyte.solvers import SOLVERS, solved
from halfbyte.solvers.statistics import Statistics
from halfbyte.targets.table import TARGETS

OUT, WIDTH = 128, 256
SCHEMES = [*GRIDS, *(preset.scheme for preset in formats.SCHEMES.values() if "/" in preset.scheme)]
"""All grids, with inputs in 16 bits, and the schemes that have a name."""


def triples() -> Iterator[tuple[str, str, str, str]]:
    """(method, scheme, container, "" or the reason why not) for every method x scheme x container, each one tried.

    Raises BrokenOutput for a triple that does not come back bit for bit.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(OUT, WIDTH, generator=generator) * 0.05
    statistics = Statistics(WIDTH)
    statistics.add(torch.randn(512, WIDTH, generator=generator))

    @cache
    def quantized(grid: Grid, solver: str, refinements: tuple[str, ...], is_calibrated: bool) -> Quantized:
        """Methods share solvers, and containers grids."""
        if is_calibrated:
            return solved(solver, refinements, w, grid, statistics)
        return SOLVERS[solver](w, grid, None)

    for name in SCHEMES:
        for container in TARGETS.values():
            try:
                scheme = container.resolve(schemes.parse(name), torch.bfloat16)
                container.check(scheme, (OUT, WIDTH))
                if str(scheme.weight) in GRIDS and str(scheme.weight) != name.partition("/")[0]:
                    raise Unsupported(f"{container.name} has {scheme.weight} in place of {name}")
            except Unsupported as error:
                yield from ((method, name, container.name, str(error)) for method in METHODS)
                continue
            for method in METHODS:
                chosen = method_named(method)
                q = quantized(scheme.weight, chosen.solver, chosen.refinements, chosen.calibrated)
                if scheme.activations:
                    q = q._replace(
                        activations=ActivationQuant(
                            scheme.activations, scheme.activations.fit(statistics.activation_stats, "max")
                        )
                    )
                packed = container.pack(q)
                plan = container.specs(scheme, q.shape)
                made = {n: (tuple(t.shape), t.dtype) for n, t in packed.items()}
                if made != {n: (s.shape, s.dtype) for n, s in plan.items()}:
                    raise BrokenOutput(f"{container.name} packs {name} into other tensors than it plans")
                again: Quantized = container.unpack(packed, scheme, q.shape)
                if not again.equal(q):
                    raise BrokenOutput(f"{method} {name} {container.name} does not come back as it was")
                yield method, name, container.name, ""


def markdown() -> str:
    """Schemes by container, then engines by container, as the README shows them."""
    fits: dict[str, dict[str, bool]] = {}
    for _, grid, container, reason in triples():
        fits.setdefault(grid, {})[container] = not reason
    families: dict[tuple[str, ...], list[str]] = {}
    for grid, held in fits.items():
        families.setdefault(tuple(c for c in TARGETS if held[c]), []).append(grid)
    lines = [
        f"Every method ({', '.join(f'`{m}`' for m in METHODS)}) meets every grid. After a slash: how inputs are "
        "rounded, where they are. The containers hold:",
        "",
        f"| schemes | {' | '.join(TARGETS)} |",
        f"|---|{':-:|' * len(TARGETS)}",
    ]
    for held, names in families.items():
        lines.append(f"| {condensed(names)} | {' | '.join('yes' if c in held else '' for c in TARGETS)} |")
    lines += [
        "",
        "Engines load a Llama-shaped model so; group sizes, other shapes, families and mixtures are checked before "
        "each run. Tested here: a test or a",
        "benchmark of this repository runs it; documented there: read in the engine's source or documentation; the "
        "rest is refused.",
        "",
        f"| engine | {' | '.join(TARGETS)} |",
        f"|---|{'---|' * len(TARGETS)}",
    ]
    for engine in ENGINES:
        cells = (_cell(engine, container, [g for g, held in fits.items() if held[container]]) for container in TARGETS)
        lines.append(f"| {engine} | {' | '.join(cells)} |")
    return "\n".join(lines)


def support_matrix(engine: str | None = None) -> Support:
    """What each container holds, and what an engine loads of it; of all engines if none is named."""
    held = {container: _held(container) for container in TARGETS}
    rows = [
        EngineSupport(
            engine=name,
            container=container,
            tested_here=by_word[Word.TESTED],
            documented_there=by_word[Word.DOCUMENTED],
            source=support.source,
            notes=list(support.notes),
        )
        for name in ([engine_named(engine)] if engine else ENGINES)
        for container, support in ENGINES[name].support.items()
        for by_word in [_by_word(name, container, held[container])]
    ]
    return Support(containers=held, engines=rows)


def of_engine(engine: str) -> str:
    """What an engine loads from each container, in lines for a terminal. Raises UnknownName."""
    name = engine_named(engine)
    spec = ENGINES[name]
    lines = _wrapped(
        f"{spec.title} (--engine {name}), by container, of a Llama-shaped model. "
        "Group sizes, other shapes, mixtures of grids and experts are checked before each run."
    )
    shown_models = ""
    for container, support in spec.support.items():
        lines += ["", f"{container}, read in", *_wrapped(support.source, "  ")]
        if support.models != shown_models:
            lines += _wrapped(_models(registry(support.models)), "  ")
            shown_models = support.models
        for word, names in _by_word(name, container, _held(container)).items():
            by = f" ({', '.join(dict.fromkeys(t.by for t in support.tested))})" if word is Word.TESTED else ""
            lines += [f"  {word}{by}:", *_wrapped(condensed(names).replace("`", ""), "    ")] if names else []
        for note in support.notes:
            lines += _wrapped(f"- {note}", "  ", "    ")
    if others := [container for container in TARGETS if container not in spec.support]:
        lines += ["", *_wrapped(f"{Word.REFUSED}, all of it: {', '.join(others)} ({spec.otherwise})", "", "  ")]
    return "\n".join(lines)


def _wrapped(text: str, indent: str = "", further: str | None = None) -> list[str]:
    return textwrap.wrap(
        text,
        COLUMNS,
        initial_indent=indent,
        subsequent_indent=indent if further is None else further,
        break_on_hyphens=False,
    )


def _models(models: Registry) -> str:
    names = sorted(models.names | models.dequantized)
    if len(names) <= MAX_LISTED:
        return f"models: {', '.join(names)}"
    return f"models: the {len(names)} of {models.source}, such as {', '.join(n for n in FAMOUS if n in names)}"


def _held(container: str) -> list[str]:
    """The schemes that a container holds."""
    kind, held = TARGETS[container], []
    for name in SCHEMES:
        with suppress(Unsupported):
            kind.check(kind.resolve(schemes.parse(name), torch.bfloat16), (OUT, WIDTH))
            held.append(name)
    return held


def _by_word(engine: str, container: str, names: list[str]) -> dict[Word, list[str]]:
    """Schemes by what is said of them, for a model that the engine knows."""
    support = ENGINES[engine].support.get(container)
    models = registry(support.models) if support and support.models else None
    config = next((c for c in MODELS if models is None or models.knows(c)), MODELS[0])
    weights = [
        Weight(f"model.layers.0.{n}", f"model.layers.0.{n}.weight", "model.layers.0", s) for n, s in LLAMA.items()
    ]
    native = TARGETS[container].resolve
    by_word: dict[Word, list[str]] = {word: [] for word in Word}
    for name in names:
        scheme = native(schemes.parse(name), torch.bfloat16)
        by_word[check(engine, container, dict.fromkeys(weights, scheme), config).word].append(name)
    return by_word


def _cell(engine: str, container: str, names: list[str]) -> str:
    by_word = _by_word(engine, container, names)
    parts = [f"{word}: {condensed(by_word[word])}" for word in (Word.TESTED, Word.DOCUMENTED) if by_word[word]]
    return "; ".join(parts) or "none"


COLUMNS = 80
MAX_LISTED = 12
FAMOUS = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM", "MixtralForCausalLM", "llama", "qwen2", "gemma3")
MODELS: list[Config] = [
    {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
]
LLAMA = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096), "mlp.down_proj": (4096, 14336),
}  # fmt: skip


def condensed(names: list[str]) -> str:
    """int4-g32, int4-g64, int8-g32, int8-g64, q4_k -> `int4/8-g32/64`, `q4_k`."""
    granularities: dict[tuple[str, str], list[str]] = {}
    for name in names:
        if name.startswith("int") and "/" not in name:
            number, granularity, *asym = name.split("-")
            granularities.setdefault((number, "-asym" if asym else ""), []).append(granularity)
    numbers: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for (number, asym), sizes in granularities.items():
        numbers.setdefault((tuple(sizes), asym), []).append(number.removeprefix("int"))
    integers = [f"`int{'/'.join(bits)}-{'/'.join(sizes)}{asym}`" for (sizes, asym), bits in numbers.items()]
    return ", ".join([*integers, *(f"`{name}`" for name in names if not name.startswith("int") or "/" in name)])
