"""Operations of scalar grids, levels times scales: fit scales, encode, decode, round with feedback. The torch
references.

A scale is searched per group. For each candidate the codes are fixed by rounding, and the best scale for *those codes*
has a closed form, s = sum(h w q) / sum(h q q). Rounded to the precision of the file, it lowers the error sum(h (w - s
q)^2) by s (2 sum(h w q) - s sum(h q q)). The candidate that lowers it most wins, so none loses more than min-max does.
(Alternating rounding and least squares: Lloyd's method on one parameter.)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from halfbyte.kernels import even
from halfbyte.kernels.choose import faster
from halfbyte.kernels.levels import Even, Levels, Table, cell_of, cells, inverse
from halfbyte.kernels.levels import Float as FloatLevels
from halfbyte.kernels.scales import SUPER, AnyStorage, Nested, Number, Params, Scales, UnderHalf

Moments = Callable[[Tensor], tuple[Tensor, Tensor]]
"""sum(h w q) and sum(h q q) of each group, for the levels q that scales [..., tries] choose."""


@faster(cpu="scalar")
def fit(
    levels: Levels,
    scales: Scales,
    w: Float[Tensor, "out in"],
    importance: Float32[Tensor, "... in"] | None,
    search: bool,
) -> Params:
    """Parameters that minimise the squared error of rounding to nearest, weighted by importance."""
    x = scales.grouped(w.float())
    h = torch.ones_like(x) if importance is None else scales.grouped(importance.expand(w.shape))
    if isinstance(levels, Even) and isinstance(scales.storage, Number):
        return even.fit(levels, scales.storage, x, h, search)
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return choose_scales(levels, scales.storage, largest, lambda tried: _moments(levels, x, h, tried), search)


def choose_scales(
    levels: Levels, storage: AnyStorage, largest: Float32[Tensor, "rows groups"], moments: Moments, search: bool
) -> Params:
    """Of the scales that a search tries, those that lose least. `largest`: the weights of the largest magnitude, with
    their sign."""
    if isinstance(storage, UnderHalf):
        first = choose_scales(levels, storage.first, largest, moments, search)["scale"]
        return _under_half(first * levels.unit, SUPER // storage.group, levels.unit, moments, search)
    if isinstance(storage, Nested):
        return storage.nest(choose_scales(levels, storage.first, largest, moments, search)["scale"])
    plain = storage.spanning(largest if levels.reach < 0 else largest.abs(), levels, search)
    candidates = storage.tried(plain) if search else []
    if not candidates:
        return plain
    tried = torch.stack([storage.load(c, levels.unit) for c in candidates], -1)
    wq, qq = moments(tried)
    if isinstance(storage, Number):  # any number can be stored: for the levels that a tried one gives, the best
        stored = storage.store(torch.where(qq > 0, wq / qq, tried) / levels.unit)
        scale = stored.float() * levels.unit
    else:
        stored, scale = torch.stack([c["scale"] for c in candidates], -1), tried
    # In place, since of groups of 16 each of these takes two bytes for every weight.
    gain, which = wq.mul_(2).sub_(qq.mul_(scale)).mul_(scale).max(-1, keepdim=True)
    chosen = torch.where(gain > 0, stored.gather(-1, which), plain["scale"][..., None])
    return {**plain, "scale": chosen.squeeze(-1)}


def _moments(levels: Levels, x: Tensor, h: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """`Moments` of grouped weights."""
    sums = []
    for scale in scales.unbind(-1):
        q = _level(levels, levels.scaled(x, scale[..., None]))
        sums.append(((h * x * q).sum(-1), (h * q * q).sum(-1)))
    wq, qq = zip(*sums, strict=True)
    return torch.stack(wq, -1), torch.stack(qq, -1)


def _level(levels: Levels, x: Tensor) -> Tensor:
    """The levels that scaled weights are rounded to; of a table, as cells find them."""
    if isinstance(levels, Table):
        return cells(levels)[1].to(x.device)[cell_of(x)]
    return levels.decode(levels.nearest(x), torch.ones((), device=x.device))


def _under_half(scale: Float32[Tensor, "out groups"], per: int, unit: float, moments: Moments, search: bool) -> Params:
    """An fp16 scale such that the largest group's is -32 of it, and for each group the better of the two integers
    around its own. At the end, the best fp16 scale for the levels so chosen."""
    wide = scale.unflatten(1, (-1, per))
    top = half(wide.gather(-1, wide.abs().argmax(-1, keepdim=True)).squeeze(-1) / -32 / unit) * unit
    exact = (wide * inverse(top)[..., None]).flatten(1)
    each = top.repeat_interleave(per, 1)
    if not search:
        return {"d": (top / unit).half(), "scale": (exact.round().clamp(-32, 31) + 32).to(torch.uint8)}
    integers = torch.stack([(exact.floor() + up).clamp(-32, 31) for up in (0, 1)], -1)
    tried = each[..., None] * integers
    wq, qq = moments(tried)
    which = (tried * (2 * wq - tried * qq)).argmax(-1, keepdim=True)
    sub, wq, qq = (values.gather(-1, which).squeeze(-1) for values in (integers, wq, qq))
    numerator = (sub * wq).unflatten(1, wide.shape[1:]).sum(-1)
    denominator = (sub * sub * qq).unflatten(1, wide.shape[1:]).sum(-1)
    refined = half(torch.where(denominator > 0, numerator / denominator, 0.0) / unit) * unit
    better = refined * (2 * numerator - refined * denominator) > top * (2 * numerator - top * denominator)
    return {"d": (torch.where(better, refined, top) / unit).half(), "scale": (sub + 32).to(torch.uint8)}


def half(value: Tensor) -> Tensor:
    """The nearest number of fp16, never infinite."""
    return value.clamp(-65504, 65504).half().float()


@faster(cpu="scalar")
def encode(levels: Levels, scales: Scales, w: Float[Tensor, "out in"], params: Params) -> UInt8[Tensor, "out in"]:
    """The nearest code of every weight."""
    x, scale = scales.grouped(w.float()), scales.storage.load(params, levels.unit)
    codes = levels.nearest(levels.scaled(x, scale[..., None]), _zeros(params))
    return scales.ungrouped(codes, tuple(w.shape))


@faster(cpu="scalar")
def decode(levels: Levels, scales: Scales, codes: UInt8[Tensor, "out in"], params: Params) -> Float32[Tensor, "out in"]:
    """What codes stand for."""
    return multiplied(levels, scales, codes, params, scales.storage.load(params, levels.unit))


def multiplied(
    levels: Levels,
    scales: Scales,
    codes: UInt8[Tensor, "out in"],
    params: Params,
    scale: Float32[Tensor, "rows groups"],
) -> Float32[Tensor, "out in"]:
    """What codes stand for under these scales; differentiable with respect to them."""
    values = levels.decode(scales.grouped(codes), scale[..., None], _zeros(params))
    return scales.ungrouped(values, tuple(codes.shape))


def _zeros(params: Params) -> Float32[Tensor, "rows groups 1"] | None:
    return params["zero"].float()[..., None] if "zero" in params else None


class EvenLookup(NamedTuple):
    """Evenly spaced levels: codes 0 to `top` stand for base + scale * (code - zero)."""

    scale: Float32[Tensor, "rows groups"]
    zero: UInt8[Tensor, "rows groups"]
    base: Float32[Tensor, "rows groups"]
    top: int


class TableLookup(NamedTuple):
    """A table of levels times a scale: code and value of the one nearest to each of its cells."""

    scale: Float32[Tensor, "rows groups"]
    code: UInt8[Tensor, " cells"]
    value: Float32[Tensor, " cells"]


class FloatLookup(NamedTuple):
    """Small floats times a scale."""

    scale: Float32[Tensor, "rows groups"]
    levels: FloatLevels


Lookup = EvenLookup | TableLookup | FloatLookup
"""How a weight of a row and a group finds the level nearest to it."""


def of_rows(lookup: Lookup, rows: slice | Int64[Tensor, " chosen"]) -> Lookup:
    """Those of some rows."""
    by_row = [name for name in ("scale", "zero", "base") if hasattr(lookup, name)]
    return lookup._replace(**{name: getattr(lookup, name)[rows] for name in by_row})


def lookup(levels: Levels, scales: Scales, params: Params, out: int, width: int) -> tuple[Lookup, int | None]:
    """Those of a scalar grid, and how many in-features share parameters; None: all do."""
    scale, size = scales.per_row(scales.storage.load(params, levels.unit), out, width)
    if isinstance(levels, FloatLevels):
        return FloatLookup(scale, levels), size
    if isinstance(levels, Table):
        code, value = cells(levels)
        return TableLookup(scale, code if levels.exact else levels.nearest(value), value), size
    scale = torch.where(scale == 0, 1.0, scale if levels.steps == 1 else scale / levels.steps)
    zero = torch.full_like(scale, levels.midpoint, dtype=torch.uint8)
    if "zero" in params:
        zero = scales.per_row(params["zero"], out, width)[0]
    return EvenLookup(scale, zero, torch.zeros_like(scale), levels.top), size


@faster(cpu="round_block", gpu="round_block")
def round_block(
    lookup: Lookup,
    size: int | None,
    wanted: Float32[Tensor, "rows width"],
    target: Float32[Tensor, "rows width"],
    error: Float32[Tensor, "rows width"],
    coupling: Float32[Tensor, "width width"],
    columns: Int64[Tensor, " width"],
) -> UInt8[Tensor, "rows width"]:
    """`Rounder` of grids whose weights are rounded one by one, where `size` in-features share parameters; None: all
    do."""
    codes, group = torch.empty_like(wanted, dtype=torch.uint8), [c // size if size else 0 for c in columns.tolist()]
    for k in range(len(group) - 1, -1, -1):
        codes[:, k], value = _nearest(lookup, wanted[:, k], group[k])
        missed = target[:, k] - value
        wanted[:, :k] += (missed - error[:, k])[:, None] * coupling[k, :k]
        error[:, k] = missed
    return codes


def _nearest(lookup: Lookup, x: Float32[Tensor, " rows"], group: int) -> tuple[Tensor, Tensor]:
    """Code and value of the level nearest to a weight of each row."""
    scale = lookup.scale[:, group]
    if isinstance(lookup, FloatLookup):
        codes = lookup.levels.nearest(lookup.levels.scaled(x, scale))
        return codes, lookup.levels.decode(codes, scale)
    if isinstance(lookup, TableLookup):
        cell = cell_of(x * inverse(scale))
        return lookup.code.to(x.device)[cell], lookup.value.to(x.device)[cell] * scale
    zero, base = lookup.zero[:, group].float(), lookup.base[:, group]
    q = (torch.round((x - base) * scale.reciprocal()) + zero).clamp(0, lookup.top)
    return q.to(torch.uint8), (q - zero) * scale + base
