"""ggml's lattices: what is rounded is a vector of weights, to the nearest in a codebook of magnitudes, with signs.

    iq3_s, iq3_xxs             4 magnitudes of 8 from a codebook of 512 or 256
    iq2_s, iq2_xs, iq2_xxs     8 magnitudes of 3 from a codebook of 1024, 512 or 256
    iq1_s, iq1_m               8 trits from a codebook of 2048, all moved by an eighth up or down

A scale is a small integer under the fp16 scale of 256 in-features: d * (2 scale + 1) * unit. Types with sign parity
store 7 signs of 8: the number of negative weights among them is even. (An iq1 value is a magnitude of 1/8, 7/8 or 9/8
with a sign: which of them go together is what the codebook and the move by an eighth allow, once per 8 weights or once
per 32.)

A code is the index of the magnitude, from the smallest, and bit 7 if the weight is negative. Codebooks are those of the
package gguf; the arithmetic of `decode` is that of ggml-quants.c.
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from halfbyte import formats
from halfbyte.errors import BadRequest, Unsupported
from halfbyte.grids.grid import ALL, Codes, Grid, Neighbours, Params, Rounder, Rows, Shape
from halfbyte.kernels import lattice
from halfbyte.kernels.lattice import SUPER, Lattice
from halfbyte.kernels.levels import Table
from halfbyte.kernels.panels import Operands
from halfbyte.kernels.scales import STEPS


@dataclass(frozen=True)
class LatticeGrid(Lattice, Grid):
    """A lattice of ggml; a row of `formats.LATTICES` says all there is to say about one."""

    def __str__(self) -> str:
        return self.name

    @property
    def group_size(self) -> int:
        """256: in-features that share the fp16 scale."""
        return SUPER

    def bits(self, shape: Shape) -> float:
        """Bits of a block of 256 weights over its weights."""
        return self.stored_bits / SUPER

    def fit(
        self, w: Float[Tensor, "out in"], importance: Float32[Tensor, "... in"] | None, search: bool = True
    ) -> Params:
        """fp16 `d` [out, in / 256] and the integers `scale` [out, in / group]; a weight is d * (2 scale + 1) * unit *
        magnitude."""
        if w.shape[1] % SUPER:
            raise BadRequest(f"{self} does not divide a row of {w.shape[1]}; it takes multiples of {SUPER}")
        self._check_writable()
        d, scale = lattice.fit(self, w, importance, search)
        return {"d": d.half(), "scale": scale}

    def _check_writable(self) -> None:
        if self.name in ("iq1_s", "iq1_m"):
            raise Unsupported(f"{self} is read, not written; the smallest type that is written is iq2_xxs")

    def rounder(self, params: Params, shape: Shape, rows: Rows = ALL) -> Rounder:
        """Rounds a vector of weights at a time. Raises Unsupported for lattices that are read alone."""
        self._check_writable()
        return partial(lattice.round_block, self, self.scales(params)[rows])

    def neighbours(self, params: Params) -> Neighbours:
        """Integers near these."""
        moved = [(params["scale"].int() + t).clamp(0, self.top).to(torch.uint8) for t in STEPS]
        return Neighbours(self.group, [{"scale": scale} for scale in moved])

    def row_params(self, shape: Shape) -> frozenset[str]:
        """All of them: each block lies in one row."""
        return frozenset({"d", "scale"})

    def encode(
        self, w: Float[Tensor, "out in"], params: Params, importance: Float32[Tensor, " in"] | None = None
    ) -> Codes:
        """The nearest vectors of the codebook, weighted. Raises Unsupported for lattices that are read alone."""
        self._check_writable()
        return lattice.encode(self, w, self.scales(params), importance)

    def numbers(self, params: Params) -> Params:
        """The fp16 number: from one of the odd integers under it to the next is a large step."""
        return {"d": params["d"].float()}

    def nearest_params(self, params: Params, numbers: Params) -> Params:
        """In fp16, of the sign that it had."""
        d, before = numbers["d"].clamp(-65504, 65504), params["d"].float()
        return {**params, "d": torch.where(d * before < 0, 0 * before, d).half()}

    def expand(self, codes: Codes, params: Params, numbers: Params) -> Float32[Tensor, "out in"]:
        """By the same operations, all of which are torch's."""
        return self.decode(codes, {**params, **numbers})

    def operands(self, codes: Codes, params: Params) -> Operands | None:
        """Magnitudes with their sign, each by itself: what the codebook leaves out takes bits again, so that panels are
        a sixth to a half larger than the file."""
        bits, largest = (len(self.magnitudes) - 1).bit_length(), max(self.magnitudes)
        unit = 1.0 if largest > 8 else 1 / 8  # of iq1, eighths
        levels = [magnitude / unit for magnitude in self.magnitudes]
        levels += [0.0] * ((1 << bits) - len(levels))
        table = Table(self.name, (*levels, *(-level for level in levels)), unit, largest / unit)
        signed = codes & 0x7F | codes >> 7 << bits
        return Operands(signed, table, self.group, 2 * params["scale"] + 1, d=params["d"], unit=self.unit * unit)

    def decode(self, codes: Codes, params: Params) -> Float32[Tensor, "out in"]:
        """Magnitudes with their signs, times the scale of their group."""
        values = self.value(codes).unflatten(1, (-1, self.group))
        return (self.scales(params)[..., None] * values).flatten(1)


LATTICE_GRIDS: dict[str, LatticeGrid] = {name: LatticeGrid(**vars(row)) for name, row in formats.LATTICES.items()}
