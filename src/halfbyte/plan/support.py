"""What fits where, found by trying: the loop behind the matrix test and the README's table."""

from collections.abc import Iterator

import torch

from halfbyte.containers import CONTAINERS
from halfbyte.errors import Unsupported
from halfbyte.grids import GRIDS, schemes
from halfbyte.grids.grid import Inputs, Quantized
from halfbyte.models.checkpoint import Weight
from halfbyte.plan import engines
from halfbyte.recipe import METHODS, method_named
from halfbyte.solvers import SOLVERS
from halfbyte.solvers.statistics import Statistics

OUT, WIDTH = 128, 256
SCHEMES = [*GRIDS, *(preset.scheme for preset in schemes.PRESETS.values() if "/" in preset.scheme)]
"""All grids, with inputs in 16 bits, and the schemes that have a name."""


def triples() -> Iterator[tuple[str, str, str, str]]:
    """(method, scheme, container, "" or the reason why not) for every method x scheme x container, each one tried.

    Raises AssertionError for a triple that does not come back bit for bit.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(OUT, WIDTH, generator=generator) * 0.05
    statistics = Statistics(WIDTH)
    statistics.add(torch.randn(512, WIDTH, generator=generator))
    for name in SCHEMES:
        for kind in CONTAINERS.values():
            container = kind()
            try:
                scheme = container.native(schemes.parse(name), torch.bfloat16)
                container.check(scheme, (OUT, WIDTH))
            except Unsupported as error:
                yield from ((method, name, container.name, str(error)) for method in METHODS)
                continue
            for method in METHODS:
                chosen = method_named(method)
                q = SOLVERS[chosen.solver](w, scheme.weight, statistics if chosen.calibrated else None)
                if scheme.input:
                    q = q._replace(input=Inputs(scheme.input, scheme.input.fit(statistics.seen, "max")))
                packed = container.pack(q)
                plan = container.plan(scheme, q.shape)
                assert {n: (tuple(t.shape), t.dtype) for n, t in packed.items()} == {n: (s.shape, s.dtype) for n, s in plan.items()}
                again: Quantized = container.unpack(packed, scheme, q.shape)
                assert again.equal(q), f"{method} {name} {container.name} does not come back as it was"
                yield method, name, container.name, ""


def markdown() -> str:
    """Schemes by container, then engines by container, as the README shows them."""
    fits: dict[str, dict[str, bool]] = {}
    for _, grid, container, reason in triples():
        fits.setdefault(grid, {})[container] = not reason
    families: dict[tuple[str, ...], list[str]] = {}
    for grid, held in fits.items():
        families.setdefault(tuple(c for c in CONTAINERS if held[c]), []).append(grid)
    lines = [
        f"Every method ({', '.join(f'`{m}`' for m in METHODS)}) meets every grid. After a slash: how inputs are rounded, where they are. The containers hold:",
        "",
        f"| schemes | {' | '.join(CONTAINERS)} |",
        f"|---|{':-:|' * len(CONTAINERS)}",
    ]
    for held, names in families.items():
        lines.append(f"| {_condensed(names)} | {' | '.join('yes' if c in held else '' for c in CONTAINERS)} |")
    lines += [
        "",
        "Engines load (a Llama-shaped model; by group size, other shapes and mixtures are checked before each run):",
        "",
        f"| engine | {' | '.join(CONTAINERS)} |",
        f"|---|{'---|' * len(CONTAINERS)}",
    ]
    for engine in engines.ENGINES:
        lines.append(f"| {engine} | {' | '.join(_loaded(engine, container, fits) for container in CONTAINERS)} |")
    return "\n".join(lines)


def _loaded(engine: str, container: str, fits: dict[str, dict[str, bool]]) -> str:
    weights = [Weight(f"model.layers.0.{n}", f"model.layers.0.{n}.weight", "model.layers.0", s) for n, s in LLAMA.items()]
    native = CONTAINERS[container]().native
    held = {name: native(schemes.parse(name), torch.bfloat16) for name, containers in fits.items() if containers[container]}
    names = [name for name, scheme in held.items() if engines.check(engine, container, dict.fromkeys(weights, scheme), "llama").loads]
    return _condensed(names) if names else "none"


LLAMA = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096), "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096), "mlp.down_proj": (4096, 14336),
}  # fmt: skip


def _condensed(names: list[str]) -> str:
    """int4-g32, int4-g64, int8-g32, int8-g64, q4_k -> `int4/8-g32/64`, `q4_k`."""
    spans: dict[tuple[str, str], list[str]] = {}
    for name in names:
        if name.startswith("int") and "/" not in name:
            number, span, *asym = name.split("-")
            spans.setdefault((number, "-asym" if asym else ""), []).append(span)
    numbers: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for (number, asym), found in spans.items():
        numbers.setdefault((tuple(found), asym), []).append(number.removeprefix("int"))
    integers = [f"`int{'/'.join(bits)}-{'/'.join(found)}{asym}`" for (found, asym), bits in numbers.items()]
    return ", ".join([*integers, *(f"`{name}`" for name in names if not name.startswith("int") or "/" in name)])
