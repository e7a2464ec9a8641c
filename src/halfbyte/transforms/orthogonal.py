"""Orthogonal matrices that spread what lies in few channels over all of them, as products of small ones.

Hadamard matrices (entries +-1, rows orthogonal) spread best. They are known of powers of two (Sylvester), and of one
more than many primes, or twice that (Paley 1933), and products of two are one again: of 576 = 16 x 36, of 2560 = 128 x
20. Of a size for which none is found, the part that is no power of two is a random orthogonal matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

SYLVESTER = 64
"""Powers of two are products of matrices of at most this size."""
PALEY = 1024
"""The largest matrix that is looked for by Paley's constructions."""
ROWS = 1 << 14
"""That are turned at a time."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """x -> x R, of the last dimension. R is signs, then the transposed product of the factors; with an `order`, the
    product of the factors comes first, and the constant vector stays what it is."""

    factors: tuple[Tensor, ...]
    signs: Float32[Tensor, " channels"]
    order: Int64[Tensor, " channels"] | None = None

    @property
    def kind(self) -> str:
        """In a word."""
        of = "hadamard" if is_hadamard(self.size) else "random"
        return of if self.order is None else f"{of}-mean"

    @property
    def size(self) -> int:
        """How many channels it mixes."""
        return len(self.signs)

    def apply(self, x: Float32[Tensor, "... channels"]) -> Float32[Tensor, "... channels"]:
        """x R."""
        rows = x.reshape(-1, self.size).split(ROWS)
        return torch.cat([self._apply(part) for part in rows]).view(x.shape) if rows else x

    def _apply(self, x: Float32[Tensor, "rows channels"]) -> Float32[Tensor, "rows channels"]:
        if self.order is not None:
            x = product(x, self.factors)[:, self.order]
        return product(x * self.signs, [factor.T for factor in self.factors])


def product(x: Float32[Tensor, "rows channels"], factors: "tuple[Tensor, ...] | list[Tensor]") -> Tensor:
    """x times the Kronecker product of square matrices."""
    rows, channels = x.shape
    for factor in reversed(factors):  # the last axis is multiplied, and becomes the first
        x = (x.reshape(rows, -1, len(factor)) @ factor).transpose(1, 2)
    return x.reshape(rows, channels)


def hadamard(size: int, seed: int, keeps_mean: bool = False) -> Rotation:
    """A Hadamard matrix (or the next best) with random signs. `keeps_mean`: the mean of what it turns stays, and so
    the function of a norm that subtracts it."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1.0
    factors = tuple(_factors(size, generator))
    if not keeps_mean:
        return Rotation(factors, signs)
    signs[0] = 1.0  # the first column of every factor is constant, and so that of their product
    rest = torch.randperm(size - 1, generator=generator) + 1
    return Rotation(factors, signs, torch.cat([torch.zeros(1, dtype=torch.long), rest]))


def is_hadamard(size: int) -> bool:
    """Whether a Hadamard matrix of this size is found."""
    return size & (size - 1) == 0 or _paley_order(size) is not None


def _factors(size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Orthogonal matrices whose sizes multiply to `size`, the first column of each constant."""
    odd = size // (size & -size)
    order = 1 if odd == 1 else _paley_order(size)
    if order is None:
        yield _random(odd, generator)
    elif prime := _prime_of(order):
        paley = _paley(order, prime)
        yield paley * paley[:, :1] / order**0.5
    left = size // (order or odd)
    while left > 1:
        step = min(left, SYLVESTER)
        yield _sylvester(step)
        left //= step


def _paley_order(size: int) -> int | None:
    """The smallest order of a Paley matrix that `size` is a power of two times."""
    odd = size // (size & -size)
    orders = (odd << k for k in range(2, size.bit_length()) if odd << k <= min(size, PALEY))
    return next((n for n in orders if _prime_of(n)), None)


def _prime_of(order: int) -> int | None:
    """The prime that Paley makes a Hadamard matrix of this order of: one less, or one less than half."""
    if _is_prime(order - 1):  # of 3 modulo 4, since orders are divided by 4
        return order - 1
    return order // 2 - 1 if order // 2 % 4 == 2 and _is_prime(order // 2 - 1) else None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, isqrt(n) + 1))


def _paley(order: int, q: int) -> Float32[Tensor, "order order"]:
    """+-1, rows orthogonal, of a prime."""
    squares = torch.full((q,), -1.0)
    squares[[k * k % q for k in range(1, q)]] = 1.0
    squares[0] = 0.0
    index = torch.arange(q)
    core = torch.zeros(q + 1, q + 1)
    core[0, 1:] = 1.0
    core[1:, 1:] = squares[(index[:, None] - index) % q]
    if q % 4 == 3:
        core[1:, 0] = -1.0
        return core + torch.eye(q + 1)
    core[1:, 0] = 1.0
    return torch.kron(core, torch.tensor([[1.0, 1.0], [1.0, -1.0]])) + torch.kron(
        torch.eye(q + 1), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    )


def _sylvester(size: int) -> Float32[Tensor, "size size"]:
    h = torch.ones(1, 1)
    while len(h) < size:
        h = torch.kron(h, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return h / size**0.5


def _random(size: int, generator: torch.Generator) -> Float32[Tensor, "size size"]:
    """Uniform among those whose first column is constant."""
    columns = torch.randn(size, size, generator=generator, dtype=torch.float64)
    columns[:, 0] = 1.0
    q, r = torch.linalg.qr(columns)
    return (q * r.diagonal().sign()).float()
