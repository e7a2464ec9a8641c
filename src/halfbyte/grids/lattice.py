"""ggml's lattices: what is rounded is a vector of weights, to the nearest in a codebook of magnitudes, with signs.

    iq3_s, iq3_xxs             4 magnitudes of 8 from a codebook of 512 or 256
    iq2_s, iq2_xs, iq2_xxs     8 magnitudes of 3 from a codebook of 1024, 512 or 256
    iq1_s, iq1_m               8 trits from a codebook of 2048, all moved by an eighth up or down

A scale is a small integer under the fp16 scale of 256 in-features: d * (2 scale + 1) * unit. Types with sign parity store 7
signs of 8: the number of negative weights among them is even. (An iq1 value is a magnitude of 1/8, 7/8 or 9/8 with a sign:
which of them go together is what the codebook and the move by an eighth allow, once per 8 weights or once per 32.)

A code is the index of the magnitude, from the smallest, and bit 7 if the weight is negative. Codebooks are those of the
package gguf; the arithmetic of `decode` is that of ggml-quants.c.
"""

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from jaxtyping import Float, Float32, Int16, UInt8
from torch import Tensor

from halfbyte.errors import BadRequest, Unsupported
from halfbyte.grids.grid import Codes, Grid, Params, Rounder, Shape

SUPER = 256
"""In-features that share the fp16 scale."""
NEGATIVE = 0x80


@dataclass(frozen=True)
class LatticeGrid(Grid):
    """A lattice of ggml; a row of LATTICE_GRIDS says all there is to say about one."""

    name: str
    magnitudes: tuple[int | float, ...]
    dimension: int
    """Magnitudes in one entry of the codebook."""
    vector_size: int
    group: int
    """In-features that share an integer scale."""
    top: int
    """The largest integer scale."""
    unit: int | float
    spread: int | float
    """The scale that suits normally distributed weights of variance 1."""
    parity: bool
    """The number of negative weights in each 8 is even."""
    stored_bits: int
    """Bytes of 256 weights, in bits."""

    def __str__(self) -> str:
        return self.name

    @property
    def group_size(self) -> int:
        return SUPER

    def bits(self, shape: Shape) -> float:
        return self.stored_bits / SUPER

    def fit(
        self, w: Float[Tensor, "out in"], importance: Float32[Tensor, "... in"] | None, search: bool = True
    ) -> Params:
        """fp16 `d` [out, in / 256] and the integers `scale` [out, in / group]; a weight is d * (2 scale + 1) * unit * magnitude."""
        if w.shape[1] % SUPER:
            raise BadRequest(f"{self} does not divide a row of {w.shape[1]}; it takes multiples of {SUPER}")
        self._check_writable()
        if w.device.type == "cpu":
            from halfbyte.grids import lattice_numba

            d, scale = lattice_numba.fit(self, w, importance, search)
        else:
            d, scale = fit_reference(self, w, importance, search)
        return {"d": d.half(), "scale": scale}

    def _check_writable(self) -> None:
        if self.name in ("iq1_s", "iq1_m"):
            raise Unsupported(f"{self} is read, not written; the smallest type that is written is iq2_xxs")

    def scales(self, params: Params) -> Float32[Tensor, "out groups"]:
        """What each group's magnitudes are multiplied by."""
        d = params["d"].float()
        odd = 2 * params["scale"].float() + 1
        return (d[..., None] * odd.unflatten(1, (d.shape[1], -1)) * self.unit).flatten(1)

    def round(
        self, w: Float32[Tensor, "out vector"], params: Params, at: int
    ) -> tuple[UInt8[Tensor, "out vector"], Float32[Tensor, "out vector"]]:
        self._check_writable()
        scale = self.scales(params)[:, at // self.group, None]
        codes = nearest(self, w * inverse(scale), torch.ones_like(w))
        return codes, scale * self.value(codes)

    def compiled_rounder(self, params: Params, rows: int) -> Rounder:
        from halfbyte.grids import lattice_numba

        return partial(lattice_numba.round_block, self, self.scales(params))

    def encode(
        self, w: Float[Tensor, "out in"], params: Params, importance: Float32[Tensor, " in"] | None = None
    ) -> Codes:
        self._check_writable()
        if w.device.type != "cpu":
            return encode_reference(self, w, self.scales(params), importance)
        from halfbyte.grids import lattice_numba

        return lattice_numba.encode(self, w, self.scales(params), importance)

    def decode(self, codes: Codes, params: Params) -> Float32[Tensor, "out in"]:
        values = self.value(codes).unflatten(1, (-1, self.group))
        return (self.scales(params)[..., None] * values).flatten(1)

    def value(self, codes: UInt8[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
        """Magnitudes with signs."""
        return signed_magnitudes(self.magnitudes).to(codes.device)[codes.int()]


IQ2, IQ1 = (8, 25, 43), (0.125, 0.875, 1.125)
LATTICE_GRIDS: dict[str, LatticeGrid] = {
    "iq3_s": LatticeGrid("iq3_s", (1, 3, 5, 7, 9, 11, 13, 15), 4, 4, 32, 15, 1, 0.162, False, 880),
    "iq3_xxs": LatticeGrid("iq3_xxs", (4, 12, 20, 28, 36, 44, 52, 62), 4, 8, 32, 15, 1 / 4, 0.037, True, 784),
    "iq2_s": LatticeGrid("iq2_s", IQ2, 8, 8, 16, 15, 1 / 8, 0.0445, False, 656),
    "iq2_xs": LatticeGrid("iq2_xs", IQ2, 8, 8, 16, 15, 1 / 8, 0.0435, True, 592),
    "iq2_xxs": LatticeGrid("iq2_xxs", IQ2, 8, 8, 32, 15, 1 / 8, 0.044, True, 528),
    "iq1_s": LatticeGrid("iq1_s", IQ1, 8, 32, 32, 7, 1, 0, False, 400),
    "iq1_m": LatticeGrid("iq1_m", IQ1, 8, 8, 16, 7, 1, 0, False, 448),
}


ROWS = 16
"""Rows that the reference handles at once: it compares each vector with all entries."""


def inverse(scale: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """The reciprocal; of a scale of zero, zero: its weights take the smallest magnitudes."""
    return torch.where(scale == 0, 0.0, scale.reciprocal()).clamp(max=1e38)


def nearest(
    grid: LatticeGrid, w: Float32[Tensor, "rows width"], h: Float32[Tensor, "rows width"]
) -> UInt8[Tensor, "rows width"]:
    """Codes of the lattice vectors nearest to scaled weights, by comparison with every entry.

    Turning a weight around costs 4 h |w| q more than leaving it. Where parity asks for it, the entry and the weight are found
    for which that is least.
    """
    book = codebook(grid.name).to(w.device)
    values = torch.tensor(grid.magnitudes, dtype=torch.float32, device=w.device)[book.int()]
    shape = w.shape[0], -1, grid.vector_size // grid.dimension, grid.dimension
    w, h = w.clamp(-1e18, 1e18).reshape(shape), h.reshape(shape)
    negative, hw = w < 0, h * w.abs()
    costs = h @ values.square().T - 2 * (hw @ values.T)
    least, entry = costs.min(-1)
    if grid.parity:
        turning, at = (hw[..., None, :] * values).min(-1)
        turned, other = (costs + 4 * turning).min(-1)
        part = (turned - least).argmin(-1, keepdim=True)
        odd = negative.flatten(2).sum(-1, keepdim=True) % 2 == 1
        entry = torch.where(odd & (torch.arange(shape[2], device=w.device) == part), other, entry)
        which = part * grid.dimension + at.gather(-1, other[..., None]).squeeze(-1).gather(-1, part)
        turn = odd & (torch.arange(grid.vector_size, device=w.device) == which)
        negative = negative ^ turn.view(negative.shape)
    return (book[entry] | (negative.to(torch.uint8) << 7)).flatten(1)


def encode_reference(
    grid: LatticeGrid,
    w: Float[Tensor, "out in"],
    scales: Float32[Tensor, "out groups"],
    importance: Float32[Tensor, "... in"] | None,
) -> UInt8[Tensor, "out in"]:
    """The torch reference of `LatticeGrid.encode`."""
    h = torch.ones(w.shape[1], device=w.device) if importance is None else importance
    codes = []
    for rows, by, weight in zip(w.split(ROWS), scales.split(ROWS), h.expand(w.shape).split(ROWS), strict=True):
        scaled = rows.float().unflatten(1, (-1, grid.group)) * inverse(by)[..., None]
        codes.append(nearest(grid, scaled.flatten(1), weight))
    return torch.cat(codes)


def fit_reference(
    grid: LatticeGrid, w: Float[Tensor, "out in"], importance: Float32[Tensor, "... in"] | None, search: bool
) -> tuple[Float32[Tensor, "out blocks"], UInt8[Tensor, "out groups"]]:
    """The torch reference of `LatticeGrid.fit`: every integer scale is tried. At the end, the best fp16 scale for the codes."""
    x = w.float().unflatten(1, (-1, grid.group))
    h = torch.ones(w.shape[1], device=w.device) if importance is None else importance
    h = h.expand(w.shape).reshape(x.shape)
    own = grid.spread * ((h * x * x).sum(-1) / h.sum(-1).clamp(min=1e-30)).sqrt()
    per = SUPER // grid.group
    d = (own.unflatten(1, (-1, per)).amax(-1) / ((2 * grid.top + 1) * grid.unit)).clamp(max=65504).half().float()
    unit = (d * grid.unit).repeat_interleave(per, 1)
    middle = ((own * inverse(unit) - 1) / 2).floor().clamp(0, grid.top)
    best, scale, wq, qq = torch.full_like(own, -torch.inf), middle, torch.zeros_like(own), torch.zeros_like(own)
    for integer in range(grid.top + 1):
        tried = torch.full_like(own, integer) if search else middle
        odd = 2 * tried + 1
        q = (
            grid.value(encode_reference(grid, w, unit * odd, importance)).unflatten(1, (-1, grid.group))
            * odd[..., None]
        )
        p, r = (h * x * q).sum(-1), (h * q * q).sum(-1)
        gain = unit * (2 * p - unit * r)
        better = gain > best
        best, scale, wq, qq = (
            torch.where(better, new, old) for new, old in ((gain, best), (tried, scale), (p, wq), (r, qq))
        )
        if not search:
            break
    wq, qq = wq.unflatten(1, (-1, per)).sum(-1), qq.unflatten(1, (-1, per)).sum(-1)
    suited = (wq / (qq * grid.unit)).clamp(max=65504).half().float()
    return torch.where((wq > 0) & (qq > 0), suited, d), scale.to(torch.uint8)


@lru_cache
def signed_magnitudes(magnitudes: tuple[int | float, ...]) -> Float32[Tensor, " codes"]:
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
    """One number for a vector of magnitudes: its indices as digits, four bits of four or two bits of eight (as int16, it may wrap)."""
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
