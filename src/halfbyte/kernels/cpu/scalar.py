"""Operations of scalar grids on CPUs: which compiled one suits levels and scales. Others have the torch reference."""

from types import NotImplementedType

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor
from torch.nn import functional

from halfbyte.kernels import scales as storages
from halfbyte.kernels.cpu import even, flat, floats, table
from halfbyte.kernels.levels import Even, Levels, Table
from halfbyte.kernels.levels import Float as FloatLevels
from halfbyte.kernels.scalar import choose_scales
from halfbyte.kernels.scales import SIDE, Byte, Nested, Number, Params, Scales, UnderHalf


def fit(
    levels: Levels,
    scales: Scales,
    w: Float[Tensor, "out in"],
    importance: Float32[Tensor, "... in"] | None,
    search: bool,
) -> Params | NotImplementedType:
    """As `kernels.scalar.fit`; NotImplemented where nothing is compiled for such levels and scales."""
    if isinstance(levels, FloatLevels) and not scales.flat:
        return _fit_floats(levels, scales, w, importance, search)
    if isinstance(levels, Even) and isinstance(scales.storage, Number) and _in_runs(scales):
        if levels.steps > 1 and not search:
            return {"scale": floats.largest(w, w.shape[1])}
        number = scales.storage if levels.steps == 1 else storages.FP32
        if scales.granularity == "tensor":
            h = importance.expand(w.shape).reshape(-1) if importance is not None else None
            return even.fit(w.reshape(1, -1), h, w.numel(), levels, number, search)
        return even.fit(w, importance, scales.group_size or w.shape[1], levels, number, search)
    if isinstance(levels, Table) and (layout := _flat(levels, scales)):
        (size, number), (rows, groups), storage = layout, scales.shape(tuple(w.shape)), scales.storage
        scale = flat.fit(levels, number, size, rows * groups, w, importance, search).view(rows, -1)
        return storage.nest(scale) if isinstance(storage, Nested) else {"scale": scale}
    if isinstance(levels, Table) and (layout := _in_groups(levels, scales)):
        size, storage = layout
        return table.fit(levels, storage, size, w, importance, search)
    return NotImplemented


def encode(
    levels: Levels, scales: Scales, w: Float[Tensor, "out in"], params: Params
) -> UInt8[Tensor, "out in"] | NotImplementedType:
    """As `kernels.scalar.encode`; NotImplemented where nothing is compiled for such levels and scales."""
    if isinstance(levels, FloatLevels) and not scales.flat:
        return floats.encode(levels, w, _per_row(levels, scales, params, len(w)), _size(scales, w.shape[1]))
    if isinstance(levels, Even) and levels.steps == 1 and _in_runs(scales):
        scale, zero = scales.storage.load(params), params.get("zero")
        if scales.granularity == "tensor":
            return even.encode(w.reshape(1, -1), scale, zero, w.numel(), levels.bits).view(w.shape)
        return even.encode(w, scale, zero, scales.group_size or w.shape[1], levels.bits)
    if isinstance(levels, Table) and (layout := _flat(levels, scales)):
        return flat.encode(levels, layout[0], w, scales.storage.load(params).flatten())
    if isinstance(levels, Table) and (layout := _in_groups(levels, scales)):
        return table.encode(levels, layout[0], w, scales.storage.load(params, levels.unit))
    return NotImplemented


def decode(
    levels: Levels, scales: Scales, codes: UInt8[Tensor, "out in"], params: Params
) -> Float32[Tensor, "out in"] | NotImplementedType:
    """As `kernels.scalar.decode`; NotImplemented where nothing is compiled for such levels and scales."""
    if isinstance(levels, FloatLevels) and not scales.flat:
        each = _per_row(levels, scales, params, len(codes))
        return floats.decode(levels, codes, each, _size(scales, codes.shape[1]))
    if isinstance(levels, Table) and (layout := _flat(levels, scales)):
        return flat.decode(levels, layout[0], codes, scales.storage.load(params).flatten())
    return NotImplemented


def _in_runs(scales: Scales) -> bool:
    """Whether a group is a run of weights in memory that begins with a row."""
    return not scales.flat and scales.granularity != "block"


def _flat(levels: Table, scales: Scales) -> tuple[int, Number] | None:
    """Weights per scale, and what scales are at first, if flat.py knows such levels and scales."""
    number, size = scales.storage.first if isinstance(scales.storage, Nested) else scales.storage, scales.granularity
    if not scales.flat or not isinstance(size, int) or size % 32 or len(levels.levels) != 16 or levels.exact:
        return None
    return (size, number) if isinstance(number, Number) and number.dtype == torch.float32 else None


def _in_groups(levels: Table, scales: Scales) -> tuple[int, Number | Byte | UnderHalf] | None:
    """In-features per scale, and how scales are stored, if table.py knows such levels and scales."""
    storage, size = scales.storage, scales.group_size
    if size is None or not levels.exact or not _in_runs(scales):
        return None
    if isinstance(storage, Number) and storage.dtype == torch.float16 and not storage.smallest:
        return size, storage
    return (size, storage) if isinstance(storage, Byte | UnderHalf) else None


def _fit_floats(
    levels: FloatLevels,
    scales: Scales,
    w: Float[Tensor, "out in"],
    importance: Float32[Tensor, "... in"] | None,
    search: bool,
) -> Params:
    size = _size(scales, w.shape[1])

    def moments(tried: Tensor) -> tuple[Tensor, Tensor]:
        row_sums = floats.moments(levels, w, importance, _each_row(scales, tried, len(w)), size)
        wq, qq = (_over_rows(scales, sums, torch.sum) for sums in row_sums)
        return wq, qq

    largest = _over_rows(scales, floats.largest(w, size), torch.amax)
    return choose_scales(levels, scales.storage, largest, moments, search)


def _size(scales: Scales, width: int) -> int:
    return scales.group_size or width


def _per_row(levels: Levels, scales: Scales, params: Params, out: int) -> Float32[Tensor, "out groups"]:
    return _each_row(scales, scales.storage.load(params, levels.unit), out)


def _each_row(scales: Scales, scale: Tensor, out: int) -> Tensor:
    """[out, groups, ...]: a row of scales for every row of weights."""
    if scales.granularity == "block":
        return scale.repeat_interleave(SIDE, 0)[:out]
    return scale.expand(out, *scale.shape[1:])


def _over_rows(scales: Scales, x: Tensor, reduce) -> Tensor:
    """From what is known of every row's groups to that of the weights which share a scale."""
    if scales.granularity == "tensor":
        return reduce(x, 0, keepdim=True)
    if scales.granularity == "block":
        whole = functional.pad(x, (0, 0) * (x.dim() - 1) + (0, -x.shape[0] % SIDE))
        return reduce(whole.unflatten(0, (-1, SIDE)), 1)
    return x
