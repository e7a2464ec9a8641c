"""Will an engine load a checkpoint? Checked before a run, from names, grids, shapes and config.json alone.

Three kinds of words: tested here (a test or benchmark of this repository runs it), documented there (read in the
engine's source or documentation), refused.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import NamedTuple

from halfbyte.containers.table import CONTAINERS
from halfbyte.engines.architectures import Config, Registry, architecture_of, auto_class, decoder_of, registry
from halfbyte.engines.engines import DEGREES, ENGINES, NOBODY, ROW, EngineSupport, KernelSupport, engine_named
from halfbyte.grids.quantized import Scheme
from halfbyte.grids.scalar import ScalarGrid, is_absmax, is_float, is_integer
from halfbyte.kernels.scales import SIDE
from halfbyte.models.weight import Weight
from halfbyte.names import Expert, Fused, fused_set, with_experts

Placed = Mapping[Weight, Scheme | None]


class Word(StrEnum):
    """What a verdict rests on."""

    TESTED = "tested here"
    DOCUMENTED = "documented there"
    REFUSED = "refused"


@dataclass(frozen=True)
class Verdict:
    """Whether one engine loads a checkpoint, and what that rests on."""

    engine: str
    word: Word
    source: str  # the test or benchmark of this repository, or what was read of the engine's; empty when refused
    reasons: tuple[str, ...]  # why not, and what would work; empty when it loads
    notes: tuple[str, ...]  # true either way
    tensor_parallel: tuple[
        int, ...
    ]  # of 1, 2, 4, 8: what groups, packing and tiles permit; the number of heads may permit fewer
    command: str | None  # serves the folder {path}

    @property
    def loads(self) -> bool:
        """Whether the engine loads it."""
        return self.word is not Word.REFUSED


class SplitMatrix(NamedTuple):
    """What tensor parallelism asks of a matrix."""

    scheme: Scheme
    row: bool
    out: int
    width: int
    together: int  # out-features of the matrix that it is fused into


def default_container(engine: str) -> str:
    """The container that the engine loads best. Raises UnknownName."""
    return ENGINES[engine_named(engine)].default


def multiplies(engine: str, container: str, scheme: Scheme) -> bool:
    """Whether the engine has a kernel for a scheme from a container, for some shapes. Raises UnknownName."""
    support = ENGINES[engine_named(engine)].support.get(container)
    return support is not None and (support.everything or _kernel(support, scheme) is not None)


def side_by_side(engine: str, container: str, schemes: Mapping[str, Scheme]) -> list[str]:
    """Names of schemes that the engine multiplies by in one checkpoint; the most there are, where not all go together.
    Raises UnknownName."""
    support = ENGINES[engine_named(engine)].support.get(container)
    multiplied = {name: scheme for name, scheme in schemes.items() if multiplies(engine, container, scheme)}
    if support is None or support.everything or not support.one_kernel:
        return list(multiplied)
    kernels = [[n for n, s in multiplied.items() if _kernel(support, s) is kernel] for kernel in support.kernels]
    return max([*kernels, [n for n, s in multiplied.items() if _run_together(support, [s])]], key=len)


def offer(engine: str, container: str) -> str:
    """What the engine multiplies by from a container, in words."""
    support = ENGINES[engine].support[container]
    return "whatever it holds" if support.everything else _offer(support)


def takes_head(engine: str | None, container: str, scheme: Scheme) -> bool:
    """Whether an engine loads a head on such a scheme from a container; where none is asked for, some do."""
    if engine in (None, NOBODY):
        return True
    support = ENGINES[engine_named(engine)].support.get(container)
    return support is not None and (support.everything or re.fullmatch(support.heads, _name(scheme)) is not None)


def verdicts(container: str, placed: Placed, config: Config, engines: Iterable[str] = ENGINES) -> list[Verdict]:
    """Of these engines."""
    return [check(engine, container, placed, config) for engine in engines]


def nobody_loads(container: str, refusals: Iterable[Verdict]) -> str:
    """In a few words: why no engine will load what would be written. Engines that give the same reason share it."""
    shared: dict[str, list[str]] = {}
    for verdict in refusals:
        reason = re.split("; |: |, which", verdict.reasons[0].removeprefix(f"{verdict.engine} "))[0]
        shared.setdefault(reason if container in ENGINES[verdict.engine].support else "", []).append(verdict.engine)
    others = shared.pop("", [])
    reasons = [f"{' and '.join(engines)}: {reason}" for reason, engines in shared.items()]
    return "; ".join([*reasons, *([f"the rest do not read {container}"] if others else [])])


def check(engine: str, container: str, placed: Placed, config: Config) -> Verdict:
    """Whether `engine` loads these weights on these grids (None: kept in 16 bits) of a model with this config.json.
    Raises UnknownName."""
    engine = engine_named(engine)
    spec = ENGINES[engine]
    support = spec.support.get(container)
    if support is None:
        what = "does not read" if container in ("compressed-tensors", "gptq", "awq") else "was not seen to load"
        return _refused(engine, [f"{engine} {what} {container}: {spec.otherwise}"])
    quantized = {w: g for w, g in placed.items() if g is not None}
    models = registry(support.models) if support.models else None
    reasons: list[str] = []
    if not support.everything:
        reasons += [
            *_grids(engine, container, support, quantized),
            *_places(engine, container, support, placed, config),
            *_experts(engine, container, support, placed),
        ]
    decoded = support.decodes and models is not None and _is_decoded(models, container, quantized, config)
    if models and support.decodes:
        reasons += _inputs(engine, models, quantized, config)
    if models:
        reasons += _stacks(engine, models, support, quantized, config)
    if decoded:
        reasons += _decoding(engine, quantized)
    reasons += _model(engine, models, config)
    used = set(quantized.values())
    kernels = [k for k in support.kernels if any(_kernel(support, g) is k for g in used)]
    notes = [
        *support.notes,
        *(k.note for k in kernels if k.note),
        *_notes(engine, support, placed),
        *([DECODED] if decoded else []),
    ]
    degrees: list[int] = []
    if not reasons and not support.everything:
        misfit, note, degrees = _split(engine, support, quantized)
        reasons += misfit
        notes += note
    if reasons:
        return _refused(engine, reasons, notes)
    flags = "".join(dict.fromkeys([*(k.flag for k in kernels), DEQUANTIZE if decoded else ""]))
    command = (support.command or spec.command).replace("{auto}", auto_class(config)).replace("{flags}", flags)
    word, source = _rests_on(support, quantized, config)
    return Verdict(
        engine, word, source, (), tuple(notes), tuple(degrees) if spec.parallel and support.parallel else (), command
    )


DEQUANTIZE = ", quantization_config=CompressedTensorsConfig(dequantize=True)"
DECODED = (
    "with dequantize=True, without which Transformers 5.23 and compressed-tensors 0.20 fail on packed weights "
    "with zero points, and on models whose code reads "
    "the weights of linears itself"
)


def _refused(engine: str, reasons: Iterable[str], notes: Iterable[str] = ()) -> Verdict:
    return Verdict(engine, Word.REFUSED, "", tuple(reasons), tuple(notes), (), None)


def _rests_on(support: EngineSupport, quantized: Mapping[Weight, Scheme], config: Config) -> tuple[Word, str]:
    """A test that runs all of it, or else what was read."""
    names = {_name(scheme) for scheme in quantized.values()}
    for tested in support.tested:
        if re.fullmatch(tested.models, architecture_of(config)) and all(
            re.fullmatch(tested.schemes, name) for name in names
        ):
            return Word.TESTED, tested.by
    return Word.DOCUMENTED, support.source


def _model(engine: str, models: Registry | None, config: Config) -> Iterator[str]:
    """What is wrong with the model, whatever its grids."""
    if models is None:
        return
    name = models.name_of(config)
    if not name:
        yield f"{engine} goes by the model's {models.by}, of which config.json says nothing: write it there"
    elif not models.knows(config):
        yield f"{engine} is not known to load {name}, which is not among those of {models.source}: take another engine"
    else:
        decoder = decoder_of(config)
        for setting, values in (models.settings or {}).get(name, {}).items():
            if decoder.get(setting) not in values and not (decoder.get(setting) is None and setting not in decoder):
                wanted = " or ".join("none" if v is None else str(v).lower() for v in values)
                yield (
                    f"{engine} takes {setting} of {name} to be {wanted}, and here it is {decoder[setting]}: take "
                    "llama.cpp, or write safetensors"
                )
        if models.settings and (odd := _scaled(decoder)):
            yield f"{engine} drops the rotary embedding's {odd} of {name}: take llama.cpp, or write safetensors"


def _scaled(decoder: Config) -> str | None:
    """What a config says of rotary embeddings beyond their base."""
    rope = decoder.get("rope_parameters") or decoder.get("rope_scaling")
    ropes = [r for r in (rope, *rope.values()) if isinstance(r, dict)] if isinstance(rope, dict) else []
    kinds = [str(r.get("rope_type", r.get("type", "default"))) for r in ropes]
    if scaled := next((kind for kind in kinds if kind != "default"), None):
        return f"scaling '{scaled}'"
    partial = [r.get("partial_rotary_factor") for r in (decoder, *ropes)]
    return "partial_rotary_factor" if any(p not in (None, 1.0) for p in partial) else None


def _is_decoded(models: Registry, container: str, quantized: Mapping[Weight, Scheme], config: Config) -> bool:
    """Whether the engine has to be asked to decode every weight as it loads."""
    packed = {s for s in set(quantized.values()) if "weight" not in CONTAINERS[container].plan(s, ANY_SHAPE)}
    asymmetric = any(is_integer(s.weight) and not s.weight.symmetric and not s.activations for s in packed)
    return bool(asymmetric or (packed and models.name_of(config) in models.dequantized))


ANY_SHAPE = (256, 256)


def _decoding(engine: str, quantized: Mapping[Weight, Scheme]) -> Iterator[str]:
    """What is wrong where every weight is decoded: the first scheme is taken for all, and inputs stay as they are."""
    schemes = sorted(set(quantized.values()), key=str)
    if len(schemes) > 1:
        yield (
            f"{engine} has to decode this model's weights, and takes all of them to be {schemes[0]}, not "
            f"{', '.join(map(str, schemes[1:]))}: use one grid"
        )
    if rounded := next((s for s in schemes if s.activations), None):
        yield (
            f"{engine} has to decode this model's packed weights, and then leaves inputs in 16 bits, unlike "
            f"{rounded}: use 8-bit weights such as w8a8"
        )


def _inputs(engine: str, models: Registry, quantized: Mapping[Weight, Scheme], config: Config) -> Iterator[str]:
    by_token = next((s for s in quantized.values() if re.search(r"/.*-token(-asym)?$", str(s))), None)
    if by_token and models.name_of(config) in models.reshaped:
        name = models.name_of(config)
        yield (
            f"{engine} finds other scales than those of tokens where linears of {name} read reshaped inputs, unlike "
            f"{by_token}: use w8a8-static, or vllm"
        )


def _stacks(
    engine: str, models: Registry, support: EngineSupport, quantized: Mapping[Weight, Scheme], config: Config
) -> Iterator[str]:
    name, numbered = models.name_of(config), [w for w in quantized if Expert.of(w.name)]
    if numbered and name in models.stacked:
        yield (
            f"{engine} does not read numbered experts of {name}, such as {numbered[0].name}: keep them in 16 bits, "
            f"with {_skipping(numbered, support)}"
        )
    if quantized and name in models.uneven:
        yield (
            f"{engine} takes the experts of {name} to be quantized with the rest, and they stay in 16 bits: use "
            "transformers or sglang"
        )


def _notes(engine: str, support: EngineSupport, placed: Placed) -> Iterator[str]:
    quantized = {w: g for w, g in placed.items() if g is not None}
    if support.spanned and (
        odd := [w for w, g in quantized.items() if is_absmax(g.weight) and w.shape[1] % int(g.weight.granularity)]
    ):
        yield f"{odd[0].name} ({odd[0].shape[0]} x {odd[0].shape[1]}, {len(odd)} such): {support.spanned}"
    if support.heads_since and any(w.block is None for w in quantized):
        yield f"a quantized head needs {support.heads_since}"
    if support.together_since and len({_kernel(support, g) for g in quantized.values()}) > 1:
        yield f"several formats in one checkpoint need {support.together_since}"
    if not support.decodes and any(w.expert is not None and g is None for w, g in placed.items()):
        yield f"experts that are one 3-D tensor stay in 16 bits; that {engine} finds them so was not verified"


def _split(
    engine: str, support: EngineSupport, quantized: Mapping[Weight, Scheme]
) -> tuple[list[str], list[str], list[int]]:
    """What does not fit a kernel, a note where that is padded, and over how many devices all can be split."""
    matrices = _split_matrices(support, quantized)
    whole = {d: _misfit(support, matrices, d, tiles=False) for d in DEGREES}
    tiled = {d: _misfit(support, matrices, d, tiles=True) for d in DEGREES}
    degrees = [1] if support.whole else [d for d, misfit in (whole if tiled[1] else tiled).items() if misfit is None]
    if whole[1] or (tiled[1] and not support.pads):
        instead = "choose another group size" if whole[1] else "take another engine"
        return [f"{whole[1] or tiled[1]}, which {engine} cannot hold: {instead}, or keep it in 16 bits"], [], []
    return (
        [],
        [f"{tiled[1]}: vLLM pads such shapes since pull request 45295 (June 2026), older releases refuse them"]
        if tiled[1]
        else [],
        degrees,
    )


@cache
def _name(scheme: Scheme) -> str:
    """The name of a scheme without the precision of its scales, which containers choose."""
    return re.sub(r"-(bf16|fp16|fp32)(?=/|$)", "", str(scheme))


def _kernel(support: EngineSupport, scheme: Scheme) -> KernelSupport | None:
    grid = scheme.weight
    if scheme.activations or not is_integer(grid):
        return next(
            (k for k in support.kernels if k.scheme_pattern and re.fullmatch(k.scheme_pattern, _name(scheme))), None
        )
    granularities = {grid.granularity, "any group"} if grid.group_size else {grid.granularity}
    return next(
        (
            k
            for k in support.kernels
            if (grid.levels.bits, grid.symmetric) in k.codes and granularities & k.granularities
        ),
        None,
    )


def _grids(engine: str, container: str, support: EngineSupport, quantized: Mapping[Weight, Scheme]) -> Iterator[str]:
    """What is wrong with the grids, wherever they are."""
    grids = sorted(set(quantized.values()), key=str)
    for grid in grids:
        if _kernel(support, grid) is None:
            yield f"{engine} has no kernel for {grid} in {container}; it takes {_offer(support)}"
    if len(grids) > 1 and not support.mixes:
        yield (
            f"{engine} reads one grid from {container}, not {', '.join(map(str, grids))}: use one, or write "
            "compressed-tensors"
        )
    kernels = {_kernel(support, grid) for grid in grids} - {None}
    if support.one_kernel and len(kernels) > 1 and not _run_together(support, grids):
        yield (
            f"{engine} runs all of a {container} checkpoint on one kernel, which does not exist for "
            f"{', '.join(map(str, grids))}: use one grid"
        )


def _run_together(support: EngineSupport, grids: Iterable[Scheme]) -> bool:
    return all(re.fullmatch(support.together, _name(grid)) for grid in grids)


def _offer(support: EngineSupport) -> str:
    """What the engine has kernels for, in words."""
    offers = [kernel.offer for kernel in support.kernels if kernel.offer]
    for kernel in support.kernels:
        bits = sorted({b for b, _ in kernel.codes})
        codes = [f"int{b}" if (b, False) in kernel.codes else f"int{b} (symmetric)" for b in bits]
        # Sizes of groups first, then names.
        granularities = sorted(kernel.granularities, key=lambda g: (isinstance(g, str), g))
        per = [f"g{g}" if isinstance(g, int) else g for g in granularities]
        offers += [f"{', '.join(codes)} per {', '.join(per)}"] if codes else []
    return "; or ".join(offers)


def _places(engine: str, container: str, support: EngineSupport, placed: Placed, config: Config) -> Iterator[str]:
    """What is wrong with where the grids are."""
    quantized = [w for w, g in placed.items() if g is not None]
    if fused := [
        w for w in quantized if w.expert is not None or (w.name.endswith(".gate_up_proj") and Expert.of(w.name))
    ]:
        yield (
            f"{engine} holds fused experts in one tensor, not as '{fused[0].name}' ({len(fused)} such): keep them in "
            f"16 bits, with {_skipping(fused, support)}"
        )
    heads = {w: g for w, g in placed.items() if g is not None and w.block is None}
    if odd := next((w for w, g in heads.items() if not re.fullmatch(support.heads, _name(g))), None):
        on_others = f", or on {support.heads}" if support.heads else ""
        on = f" on {heads[odd]}" if support.heads else ""
        yield (
            f"{engine} does not load a quantized {odd.name}{on} from {container} as it is written here: keep it in "
            f"16 bits{on_others}"
        )
    # vLLM turns what is called .weight, as all of 8 bits is but integers under 16-bit inputs (models/gpt2.py).
    conv1d = {w.name: g for w, g in placed.items() if g and w.transposed and w.expert is None}
    turned = [name for name, g in conv1d.items() if not support.transposed or is_float(g.weight) or g.activations]
    if turned:
        family = decoder_of(config).get("model_type", "this model")
        yield (
            f"{turned[0]} of {family} is a Conv1D, which {engine} is not known to load from {container}: keep it in "
            "16 bits, or use vllm"
        )
    for names, grids in _siblings(placed).values():
        if support.fuses and len(set(grids)) > 1:
            listed = ", ".join(f"{n}: {g or '16 bits'}" for n, g in zip(names, grids, strict=True))
            yield f"{engine} fuses these into one matrix, so they need one grid, or all 16 bits ({listed})"
            break
    unquantized = [w for w, g in placed.items() if g is None and w.block is not None]
    if support.keeps == "unfused":
        unquantized = [w for w in unquantized if fused_set(w.name)]
    if quantized and unquantized and support.keeps != "any":
        yield (
            f"{engine} does not see in {container} that {unquantized[0].name} is kept ({len(unquantized)} such): "
            "quantize it, or write compressed-tensors"
        )


def _skipping(weights: Iterable[Weight], support: EngineSupport) -> str:
    """The options that keep weights of all blocks in 16 bits, in a container where the engine sees that experts are."""
    patterns = {re.sub(r"\.\d+\.", ".*.", w.tensor.removeprefix(f"{w.block}.")) for w in weights}
    return " ".join(
        [
            *(f"--skip '{pattern}'" for pattern in sorted(patterns)),
            *(["--to compressed-tensors"] if support.base_experts else []),
        ]
    )


def _experts(engine: str, container: str, support: EngineSupport, placed: Placed) -> Iterator[str]:
    experts = {w: g for w, g in placed.items() if Expert.of(w.name)}
    grids = Counter(g for g in placed.values() if g is not None)
    if not experts or not grids:
        return
    main = grids.most_common(1)[0][0]
    called = {w: g for w, g in placed.items() if "experts" in w.name}
    unquantized = [w for w, g in experts.items() if w.expert is None and g is None]
    if unquantized and not support.numbered_kept:
        name = unquantized[0].name
        yield f"{engine} cannot load {name} in 16 bits beside quantized weights: quantize the experts too"
    if not support.numbered_kept and len(several := sorted({str(g) for g in called.values() if g})) > 1:
        yield f"{engine} reads all that is called experts on one grid, not {', '.join(several)}: make them one"
    expert_schemes = [
        "int{}{}".format(bits, "" if symmetric else "-asym") for bits, symmetric in sorted(support.experts)
    ]
    expert_schemes += [name.removesuffix("-.*") for name in support.named_experts]
    strange = {g for g in set(experts.values()) if g is not None and not _is_expert(support, g)}
    for w, g in experts.items() if strange else ():
        if w.expert is None and g in strange:
            instead = f"use {' or '.join(expert_schemes)}" if expert_schemes else "keep the experts in 16 bits"
            yield f"{engine} is not known to load {w.name} on {g} from {container}: {instead}"
            break
    if support.base_experts and (odd := [w for w, g in experts.items() if g != main]):
        yield (
            f"{engine} takes all experts in {container} to be {main}, unlike {odd[0].name}: make them so, or write "
            "compressed-tensors"
        )
    blocks: defaultdict[str | None, set[Scheme | None]] = defaultdict(set)
    for w, g in experts.items():
        blocks[w.block].add(g)
    if uneven := [block for block, schemes in blocks.items() if len(schemes) > 1]:
        yield f"{engine} loads the experts of {uneven[0]} as one tensor, so they need one grid, or all 16 bits"
    if support.shared_experts and (odd := _unlike_experts(placed)):
        yield f"{engine} may fuse {odd} with the experts beside it, so they need one grid, or all 16 bits"


def _unlike_experts(placed: Placed) -> str | None:
    """A shared expert whose scheme is not that of the experts beside it."""
    routed = {e.home: g for w, g in placed.items() if (e := Expert.of(w.name))}
    shared = ((w.name, home, g) for w, g in placed.items() if not Expert.of(w.name) and (home := with_experts(w.name)))
    return next((name for name, home, g in shared if home in routed and g != routed[home]), None)


def _is_expert(support: EngineSupport, scheme: Scheme) -> bool:
    grid = scheme.weight
    if is_integer(grid) and not scheme.activations:
        return (grid.levels.bits, grid.symmetric) in support.experts
    return any(re.fullmatch(name, _name(scheme)) for name in support.named_experts)


def _siblings(placed: Placed) -> dict[tuple[str, Fused], tuple[list[str], list[Scheme | None]]]:
    """Names and grids of each set of matrices that engines fuse."""
    sets: dict[tuple[str, Fused], tuple[list[str], list[Scheme | None]]] = {}
    for weight, grid in placed.items():
        if key := fused_set(weight.name):
            names, grids = sets.setdefault(key, ([], []))
            names.append(weight.name)
            grids.append(grid)
    return sets


def _split_matrices(support: EngineSupport, quantized: Mapping[Weight, Scheme]) -> dict[SplitMatrix, str]:
    """Every kind of matrix there is, and the first that is so."""
    sizes = {w.name: w.shape[0] for w in quantized}
    together = (
        {name: sum(sizes[n] for n in names) for names, _ in _siblings(quantized).values() for name in names}
        if support.fuses
        else {}
    )
    matrices: dict[SplitMatrix, str] = {}
    for w, scheme in quantized.items():
        if isinstance(scheme.weight, ScalarGrid):
            out, width = w.shape
            matrices.setdefault(
                SplitMatrix(scheme, bool(ROW.search(w.name)), out, width, together.get(w.name, out)), w.name
            )
    return matrices


def _misfit(support: EngineSupport, matrices: Mapping[SplitMatrix, str], degree: int, tiles: bool) -> str | None:
    """The first matrix that cannot be split over `degree` devices, and why: groups and packing, and tiles if asked."""
    for (scheme, row, out, width, together), name in matrices.items():
        grid = scheme.weight
        split = width if row else out
        if split % degree or (
            degree > 1 and is_integer(grid) and not scheme.activations and split // degree * grid.levels.bits % 32
        ):
            return f"{name} ({out} x {width}) does not split into {degree} parts of whole 32-bit words"
        if (
            is_float(grid)
            and grid.granularity == "block"
            and (degree > 1 or together != out)
            and split // degree % SIDE
        ):
            return f"{name} ({out} x {width}) does not split into {degree} parts of whole blocks of {SIDE} x {SIDE}"
        width, together = (width // degree, together) if row else (width, together // degree)
        if grid.group_size and width % grid.group_size:
            return f"{name} has {width} in-features, no multiple of the group {grid.group_size}"
        kernel = _kernel(support, scheme)
        shapes = kernel.tiles if kernel and (tiles or kernel.strict_tiles) else ()
        if shapes and all(width % a or together % b for a, b in shapes):
            return (
                f"{name} ({together} x {width} as fused) is no multiple of "
                f"{' or '.join(f'{b} x {a}' for a, b in shapes)} (out x in)"
            )
    return None
