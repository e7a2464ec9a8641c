"""Operations of lattices: fit, encode, round with feedback. The torch references, and the tables that all
implementations share."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int16, Int32, Int64, UInt8, UInt16
from torch import Tensor

from halfbyte.errors import Unsupported
from halfbyte.formats import LatticeFormat
from halfbyte.kernels.choose import faster
from halfbyte.kernels.scalar import half
from halfbyte.kernels.scales import Params

SUPER = 256
"""In-features that share the fp16 scale."""
NEGATIVE = 0x80


@dataclass(frozen=True)
class Lattice(LatticeFormat):
    """A row of formats.LATTICES, and the arithmetic of its codes."""

    def scales(self, params: Params) -> Float32[Tensor, "out groups"]:
        """What each group's magnitudes are multiplied by."""
        d = params["d"].float()
        odd = 2 * params["scale"].float() + 1
        return (d[..., None] * odd.unflatten(1, (d.shape[1], -1)) * self.unit).flatten(1)

    def value(self, codes: UInt8[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
        """Magnitudes with signs."""
        return _signed_magnitudes(self.magnitudes).to(codes.device)[codes.int()]


CANDIDATES = 16
"""Entries of the codebook that are compared where rounding one magnitude at a time does not lead to one."""
EARLY_STOP = 1
"""From the integer scale that the spread of a group suggests, others are tried up and down until so many in a row are
no better; with importance, one more: then there is a calibration, which takes longer than any search."""
CELLS = 128
SPLIT = 1 << 22
"""Weights that the reference handles at once."""


class Tables(NamedTuple):
    """What the search looks up. A combination is a vector of magnitudes, whether the codebook has it or not, as digits
    of a number."""

    digit: Int32[Tensor, " cells"]
    """Of each cell of a half: the index of the nearest magnitude."""
    magnitudes: Float32[Tensor, " magnitudes"]
    values: Float32[Tensor, "entries dimension"]
    """The codebook, as magnitudes."""
    near: UInt16[Tensor, "combinations listed"]
    """The entries nearest to each combination."""
    exact: Bool[Tensor, " combinations"]
    """Whether the nearest is the combination itself."""
    listed: UInt8[Tensor, "combinations dimension listed"]
    """The magnitudes of these entries."""


@lru_cache
def tables(grid: Lattice) -> Tables:
    """The tables of a lattice, made once."""
    magnitudes = torch.tensor(grid.magnitudes, dtype=torch.float32)
    values = magnitudes[codebook(grid.name).int()]
    combinations = magnitudes[torch.cartesian_prod(*[torch.arange(len(magnitudes))] * grid.dimension).flip(1)]
    distance, near = torch.cdist(combinations, values, compute_mode="donot_use_mm_for_euclid_dist").topk(
        CANDIDATES, largest=False
    )
    centres = (torch.arange(CELLS) + 0.5) / 2
    digit = (centres[:, None] - magnitudes).abs().argmin(1).int()
    listed = values[near].transpose(1, 2).to(torch.uint8)
    arrays = digit, magnitudes, values, near.to(torch.uint16), distance[:, 0] == 0, listed
    return Tables(*(a.contiguous() for a in arrays))


def _inverse(scale: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """The reciprocal; of a scale of zero, zero: its weights take the smallest magnitudes."""
    return torch.where(scale == 0, 0.0, scale.reciprocal()).clamp(max=1e38)


class Encoded(NamedTuple):
    """What groups of scaled weights are rounded to."""

    entry: Int64[Tensor, "rows groups parts"]
    """Of the codebook, for each run of `dimension` weights."""
    negative: Bool[Tensor, "rows groups size"]
    wq: Float32[Tensor, "rows groups"]
    qq: Float32[Tensor, "rows groups"]
    """sum(h w q) and sum(h q q), scaled."""


def _search(
    grid: Lattice,
    x: Float32[Tensor, "rows groups size"],
    h: Float32[Tensor, "rows groups size"],
    by: Float32[Tensor, "rows groups"],
) -> Encoded:
    """A vector is first rounded one magnitude at a time. If that is an entry of the codebook, none is nearer. If not,
    the CANDIDATES entries nearest to what it was rounded to are compared. Where parity asks for another sign, the
    weight that gives it is the one that loses least by it."""
    lookup = Tables(*(table.to(x.device) for table in tables(grid)))
    a = (x * by[..., None]).abs().clamp(max=1e18)
    digit, negative = lookup.digit[(2 * a).clamp(0, CELLS - 1).int()], x < 0
    if grid.parity:
        loss = (h * a * lookup.magnitudes[digit]).unflatten(-1, (-1, 8))
        odd = negative.unflatten(-1, (-1, 8)).sum(-1, keepdim=True) % 2 == 1
        turned = (odd & (torch.arange(8, device=x.device) == loss.argmin(-1, keepdim=True))).flatten(-2)
        a, digit, negative = torch.where(turned, -a, a), digit.masked_fill(turned, 0), negative ^ turned
    a, digit, weight = (part.unflatten(-1, (-1, grid.dimension)) for part in (a, digit, h))
    radix = len(grid.magnitudes) ** torch.arange(grid.dimension, device=x.device)
    key = (digit * radix).sum(-1)
    miss = a[..., None] - lookup.listed[key].float()
    best = (weight[..., None] * miss * miss).sum(-2).argmin(-1).masked_fill(lookup.exact[key], 0)
    entry = lookup.near.long()[key, best]
    q = lookup.values[entry]
    return Encoded(entry, negative, (weight * q * a).sum((-1, -2)), (weight * q * q).sum((-1, -2)))


def _by_group(grid: Lattice, w: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    x = w.float().unflatten(1, (-1, grid.group))
    h = torch.ones(w.shape[1], device=w.device) if importance is None else importance
    return x, h.expand(w.shape).reshape(x.shape)


@faster(cpu="lattice")
def encode(
    grid: Lattice,
    w: Float[Tensor, "out in"],
    scales: Float32[Tensor, "out groups"],
    importance: Float32[Tensor, "... in"] | None,
) -> UInt8[Tensor, "out in"]:
    """The nearest vectors, for every column at once."""
    x, h = _by_group(grid, w, importance)
    book, codes = codebook(grid.name).to(w.device), []
    rows = max(1, SPLIT // w.shape[1])
    for part in zip(x.split(rows), h.split(rows), _inverse(scales).split(rows), strict=True):
        encoded = _search(grid, *part)
        codes.append(book[encoded.entry].flatten(-2) | (encoded.negative.to(torch.uint8) << 7))
    return torch.cat(codes).flatten(1)


@faster(cpu="lattice")
def fit(
    grid: Lattice, w: Float[Tensor, "out in"], importance: Float32[Tensor, "... in"] | None, searched: bool
) -> tuple[Float32[Tensor, "out blocks"], UInt8[Tensor, "out groups"]]:
    """The fp16 scale of each block, in float32, and the integers of its groups. At the end, the best fp16 scale for the
    codes."""
    x, h = _by_group(grid, w, importance)
    patience = EARLY_STOP + (importance is not None) if searched else 0
    rows = max(1, SPLIT // w.shape[1])
    fitted = [_fit_rows(grid, *part, patience) for part in zip(x.split(rows), h.split(rows), strict=True)]
    d, scale = zip(*fitted, strict=True)
    return torch.cat(d), torch.cat(scale)


def _fit_rows(grid: Lattice, x: Tensor, h: Tensor, patience: int) -> tuple[Tensor, Tensor]:
    per = SUPER // grid.group
    mass = h.sum(-1)
    wanted = grid.spread * torch.where(mass > 0, (h * x * x).sum(-1) / mass, 0).sqrt()
    above = half(wanted.unflatten(1, (-1, per)).amax(-1) / (31 * grid.unit))
    unit = (above * grid.unit).repeat_interleave(per, 1)
    middle = (0.5 * (wanted * _inverse(unit) - 1)).floor().clamp(0, 15)
    best, chosen = torch.full_like(wanted, -torch.inf), middle
    wq, qq = torch.zeros_like(wanted), torch.zeros_like(wanted)
    for direction in (1, -1):
        misses = torch.zeros_like(wanted)
        for step in range(16):
            integer = middle + step if direction > 0 else middle - 1 - step
            first = step == 0 and direction > 0
            going = (integer >= 0) & (integer <= 15) & ((misses < patience) | first)
            if not going.any():
                break
            by = unit * (2 * integer + 1)
            encoded = _search(grid, x, h, _inverse(by))
            gain = by * by * (2 * encoded.wq - encoded.qq)
            better = going & (gain > best)
            misses = torch.where(better, 0, misses + 1)
            best, chosen, wq, qq = (
                torch.where(better, new, old)
                for new, old in ((gain, best), (integer, chosen), (by * encoded.wq, wq), (encoded.qq, qq))
            )
    odd = 2 * chosen + 1
    wqs, qqs = ((odd * wq).unflatten(1, (-1, per)).sum(-1), (odd * odd * qq).unflatten(1, (-1, per)).sum(-1))
    return torch.where(wqs > 0, half(wqs / (qqs * grid.unit)), above), chosen.to(torch.uint8)


@faster(cpu="lattice")
def round_block(
    grid: Lattice,
    scales: Float32[Tensor, "out groups"],
    wanted: Float32[Tensor, "out width"],
    target: Float32[Tensor, "out width"],
    error: Float32[Tensor, "out width"],
    coupling: Float32[Tensor, "width width"],
    columns: Int64[Tensor, " width"],
) -> UInt8[Tensor, "out width"]:
    """`Rounder` of lattices, given the scale of each group.

    What is least is sum((d r)^2) over a run, where r_k = e_k + sum_{j>k} e_j coupling[j, k] is what is left of the
    error e after the columns before have made up for it, and d_k the weight of column k: not the distance, but the
    distance that counts.
    """
    codes = torch.empty_like(wanted, dtype=torch.uint8)
    for last in range(len(columns), 0, -grid.vector_size):
        run = slice(last - grid.vector_size, last)
        scale = scales[:, int(columns[run.start]) // grid.group]
        change, value, codes[:, run] = _round_run(
            grid, scale, wanted[:, run], target[:, run], error[:, run], coupling[run, run]
        )
        error[:, run] = target[:, run] - value
        wanted[:, : run.start] += change @ coupling[run, : run.start]
    return codes


def _round_run(
    grid: Lattice, scale: Tensor, wanted: Tensor, target: Tensor, error: Tensor, coupling: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """How much the errors of a run change by rounding it, the values, and the codes."""
    lookup = Tables(*(table.to(scale.device) for table in tables(grid)))
    size, by = grid.vector_size, _inverse(scale)
    weight, c = coupling.diagonal().square(), coupling.tril(-1)
    # Scaled weights that would leave nothing of the errors of the columns after this run, were they rounded to
    # themselves.
    y = torch.zeros_like(wanted)
    for k in range(size - 1, -1, -1):
        y[:, k] = wanted[:, k] - target[:, k] - ((error + y)[:, k + 1 :] * c[k + 1 :, k]).sum(1)
    y = ((target + y) * by[:, None]).clamp(-1e18, 1e18)
    sign = _signs(grid, lookup, y, c, weight)
    z, c = y * sign, c * sign[:, :, None] * sign[:, None, :]
    m, entries = torch.zeros_like(z), []
    for first in range(size - grid.dimension, -1, -grid.dimension):
        part = slice(first, first + grid.dimension)
        left = (m[:, part.stop :, None] * c[:, part.stop :, part]).sum(1)
        entry = _weighted(grid, lookup, z[:, part], left, c[:, part, part], weight[part])
        m[:, part] = z[:, part] - lookup.values[entry]
        entries.append(entry)
    entry = torch.stack(entries[::-1], 1)
    value = sign * lookup.values[entry].flatten(1) * scale[:, None]
    codes = codebook(grid.name).to(scale.device)[entry].flatten(1) | ((sign < 0).to(torch.uint8) << 7)
    return target - value - error, value, codes


def _signs(grid: Lattice, lookup: Tables, y: Tensor, c: Tensor, weight: Tensor) -> Tensor:
    """Signs of a run whose columns are rounded one after another; where parity asks for it, one is turned around."""
    m, sign, loss = torch.zeros_like(y), torch.ones_like(y), torch.zeros_like(y)
    for k in range(y.shape[1] - 1, -1, -1):
        t = y[:, k] + (m[:, k + 1 :] * c[k + 1 :, k]).sum(1)
        sign[:, k] = torch.where(t < 0, -1.0, 1.0)
        q = lookup.magnitudes[lookup.digit[(2 * t.abs()).clamp(0, CELLS - 1).int()]]
        m[:, k] = y[:, k] - sign[:, k] * q
        loss[:, k] = weight[k] * t.abs() * q
    if grid.parity:
        # From the last to the first: of equals, the one that was rounded first.
        at = y.shape[1] - 1 - loss.flip(1).argmin(1, keepdim=True)
        odd = (sign < 0).sum(1, keepdim=True) % 2 == 1
        sign = torch.where(odd & (torch.arange(y.shape[1], device=y.device) == at), -sign, sign)
    return sign


def _weighted(grid: Lattice, lookup: Tables, z: Tensor, left: Tensor, c: Tensor, weight: Tensor) -> Tensor:
    """The listed entry that costs least, around the one that rounding column after column comes to."""
    m, key = torch.zeros_like(z), torch.zeros(len(z), dtype=torch.long, device=z.device)
    for k in range(grid.dimension - 1, -1, -1):
        t = z[:, k] + left[:, k] + (m[:, k + 1 :] * c[:, k + 1 :, k]).sum(1)
        digit = lookup.digit[(2 * t).clamp(0, CELLS - 1).int()]
        m[:, k] = z[:, k] - lookup.magnitudes[digit]
        key = key * len(grid.magnitudes) + digit
    missed = z[..., None] - lookup.listed[key].float()
    cost = torch.zeros_like(missed[:, 0])
    for k in range(grid.dimension):
        r = left[:, k, None] + missed[:, k] + (missed[:, k + 1 :] * c[:, k + 1 :, k, None]).sum(1)
        cost += weight[k] * r * r
    return lookup.near.long()[key, cost.argmin(1)]


@lru_cache
def _signed_magnitudes(magnitudes: tuple[int | float, ...]) -> Float32[Tensor, " codes"]:
    """The value of every code; codes without a magnitude have none (NaN)."""
    values = torch.full((256,), torch.nan)
    values[: len(magnitudes)] = torch.tensor(magnitudes, dtype=torch.float32)
    values[NEGATIVE:] = -values[:NEGATIVE]
    return values


@lru_cache
def codebook(name: str) -> UInt8[Tensor, "entries dimension"]:
    """The codebook of a lattice, as indices into its ascending magnitudes; of iq1, into the trits -1, 0, 1."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import _type_traits

    held = _type_traits[GGMLQuantizationType[name.upper()]]
    held.init_grid()
    if held.grid is None:
        raise Unsupported(f"the installed gguf package has no codebook of {name}; install another version of it")
    table = torch.from_numpy(held.grid.reshape(held.grid_shape).copy())
    return torch.searchsorted(torch.tensor(held.grid_map, dtype=torch.float32), table).to(torch.uint8)


def keys(indices: UInt8[Tensor, "*shape dimension"]) -> Int16[Tensor, "*shape"]:
    """One number for a vector of magnitudes: its indices as digits, four bits of four or two bits of eight (as int16,
    it may wrap)."""
    word, run = {4: torch.int32, 8: torch.int64}[indices.shape[-1]], 16 // indices.shape[-1]
    key, apart = indices.contiguous().view(word)[..., 0], 8
    while (
        apart < 8 * word.itemsize
    ):  # neighbours move together, two by two: runs of bits become half as many, twice as long
        key, apart, run = key | key >> (apart - run), 2 * apart, 2 * run
        key &= sum(((1 << run) - 1) << at for at in range(0, 8 * word.itemsize, apart))
    return key.to(torch.int16)


@lru_cache
def entry_of_key(name: str) -> Int16[Tensor, " keys"]:
    """The entry of the codebook that has a key (taken modulo 65536); -1 where none has."""
    book = codebook(name)
    entries = torch.full((1 << 16,), -1, dtype=torch.int16)
    entries[keys(book).int() & 0xFFFF] = torch.arange(len(book), dtype=torch.int16)
    return entries
