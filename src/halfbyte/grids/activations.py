"""How engines round what a linear reads.

    int8-token          one scale for each token (row), found as the engine runs
    int8-tensor         one scale for all tokens of a call, found as the engine runs
    int8-static         one scale for everything, stored with the weights: calibration has to find it
    int8-token-asym     with a zero point; of -tensor and -static too
    fp8-e4m3-g128       one scale for 128 in-features of a token (DeepSeek)
    fp8-e4m3-head       one stored scale for each head of a KV cache
    mxfp8-e4m3, mxfp4   a power of two for 32 in-features of a token
    nvfp4               an E4M3 scale for 16 in-features of a token, under one stored divisor
    llm-int8            int8-token but for in-features where an input is 6 or more, which stay in 16 bits
                        (Dettmers et al., 2208.07339)

Scales are those of vLLM's kernels (csrc/quantization: w8a8/int8/scaled_quant.cu, w8a8/fp8/common.cu,
fp4/nvfp4_quant_kernels.cu): the largest size over the largest number, in fp32.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor
from torch.nn import functional

from halfbyte.errors import BadRequest
from halfbyte.formats import ACTIVATIONS, SCALED_ACTIVATIONS, require_activations
from halfbyte.grids.grid import Grid, Params
from halfbyte.grids.scalar import NVFP4, SCALAR_GRIDS, ScalarGrid
from halfbyte.kernels.levels import E2M1, E4M3
from halfbyte.kernels.levels import FLOATS as LEVELS
from halfbyte.kernels.scales import BF16, Microscale, Scales, UnderGlobal


class ActivationStats(NamedTuple):
    """What a linear has read: its range by in-feature, and some tokens."""

    low: Float32[Tensor, " in"]
    high: Float32[Tensor, " in"]
    rows: Float32[Tensor, "rows in"]


class ActivationGrid(ABC):
    """How an engine rounds what a linear reads: frozen, equal by value, named as `str` says."""

    @property
    def stored(self) -> tuple[str, ...]:
        """Parameters that lie in the file: calibration has to find them."""
        return ()

    @property
    def static(self) -> bool:
        """Whether the file stores the parameters (calibrated); else the engine finds them as it runs (dynamic)."""
        return bool(self.stored)

    @abstractmethod
    def params(self, x: Float[Tensor, "... in"], stored: Mapping[str, Tensor]) -> Params:
        """All that `round` needs: what is stored, and what the engine finds as it runs."""

    @abstractmethod
    def round(self, x: Float[Tensor, "... in"], params: Mapping[str, Tensor]) -> Float32[Tensor, "... in"]:
        """The values that the engine computes with."""

    def fit(self, stats: ActivationStats, observer: str) -> Params:
        """The parameters to store, for activations such as those seen; `observer` is a key of
        `halfbyte.grids.activations.OBSERVERS`."""
        return {}

    def limits(self, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What lies below or above these is cut by the stored parameters."""
        return torch.tensor(-torch.inf), torch.tensor(torch.inf)

    @abstractmethod
    def __str__(self) -> str: ...


class ActivationQuant(NamedTuple):
    """How a linear's inputs are rounded, and the parameters of it that are stored."""

    grid: ActivationGrid
    params: Params

    def round(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... in"]:
        """What the linear computes with, in the dtype of x."""
        return self.grid.round(x, self.grid.params(x, self.params)).to(x.dtype) if x.numel() else x


STORED = ("static", "head")
FLOATS = {"fp8-e4m3": torch.float8_e4m3fn, "fp8-e5m2": torch.float8_e5m2}
SHARES = [1 - k / 40 for k in range(31)]
"""Of the largest size: ranges tried for the least squared error."""
PERCENTILE = 0.9999


@dataclass(frozen=True)
class ScaledActivations(ActivationGrid):
    """Integers or 8-bit floats times a scale in fp32."""

    number: str
    """int2 to int8, or a key of FLOATS."""
    granularity: int | str
    """In-features per scale, or "token", "tensor", "static", "head"."""
    symmetric: bool = True

    @classmethod
    def parse(cls, name: str) -> "ScaledActivations":
        """Raises BadRequest."""
        require_activations(name)
        match = ACTIVATIONS.fullmatch(name)
        if match is None:
            raise BadRequest(f"'{name}' has no scale of its own; write int8-token, fp8-e4m3-token or the like")
        return cls(match["number"], int(match["group"]) if match["group"] else match["granularity"], not match["asym"])

    def __str__(self) -> str:
        granularity = f"g{self.granularity}" if isinstance(self.granularity, int) else self.granularity
        return f"{self.number}-{granularity}{'' if self.symmetric else '-asym'}"

    @property
    def stored(self) -> tuple[str, ...]:
        """A scale, and a zero point if asymmetric, where these are static or of a head."""
        return () if self.granularity not in STORED else ("scale",) if self.symmetric else ("scale", "zero")

    @property
    def bits(self) -> int:
        """Bits of one number."""
        return 8 if self.number in FLOATS else int(self.number[3:])

    @property
    def top(self) -> float:
        """The largest number."""
        return torch.finfo(FLOATS[self.number]).max if self.number in FLOATS else float((1 << (self.bits - 1)) - 1)

    @property
    def bottom(self) -> float:
        """The smallest number."""
        return -self.top if self.number in FLOATS else -self.top - 1

    def spanning(self, low: Float32[Tensor, "*scales"], high: Float32[Tensor, "*scales"]) -> Params:
        """Parameters for inputs from `low` to `high`."""
        if (
            self.static
        ):  # engines keep the zero point in a byte, so zero is in the range (compressed-tensors calculate_qparams)
            low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (
            torch.maximum(low.abs(), high.abs()) / self.top
            if self.symmetric
            else (high - low) / (self.top - self.bottom)
        )
        scale = torch.where(scale == 0, 1.0, scale)
        if self.static:  # whatever precision an engine keeps it in, it is the same number
            scale = BF16.store(scale).float()
        if self.symmetric:
            return {"scale": scale}
        return {"scale": scale, "zero": torch.round(self.bottom - low / scale)}

    def params(self, x: Float[Tensor, "... in"], stored: Mapping[str, Tensor]) -> Params:
        """Scales of each token, group or call, from its own range; or those stored."""
        if self.static:
            return dict(stored)
        x = x.float()
        if self.granularity == "tensor":
            return self.spanning(x.min(), x.max())
        grouped = self._grouped(x)
        return self.spanning(grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True))

    def _grouped(self, x: Tensor) -> Tensor:
        """The groups of each token, the last filled up with zeros."""
        return (
            functional.pad(x, (0, -x.shape[-1] % self.granularity)).unflatten(-1, (-1, self.granularity))
            if isinstance(self.granularity, int)
            else x
        )

    def codes(self, x: Float[Tensor, "... in"], params: Mapping[str, Tensor]) -> Shaped[Tensor, "... in"]:
        """int8 or floats of 8 bits, as an engine multiplies them."""
        return self._numbers(x.float(), params).to(FLOATS.get(self.number, torch.int8))

    def _numbers(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        if self.number in FLOATS:
            return (x / params["scale"]).clamp(-self.top, self.top).to(FLOATS[self.number]).float()
        return (torch.round(x / params["scale"]) + params.get("zero", 0)).clamp(self.bottom, self.top)

    def round(self, x: Float[Tensor, "... in"], params: Mapping[str, Tensor]) -> Float32[Tensor, "... in"]:
        """Rounded to numbers, and multiplied by their scales again."""
        numbers = self._numbers(self._grouped(x.float()), params)
        values = (numbers - params.get("zero", 0)) * params["scale"]
        return values.flatten(-2)[..., : x.shape[-1]] if isinstance(self.granularity, int) else values

    def fit(self, stats: ActivationStats, observer: str) -> Params:
        """One scale, and a zero point if asymmetric, for the range that the observer chooses."""
        if not self.static:
            return {}
        params = self.spanning(*OBSERVERS[observer](self, stats))
        return {name: value.float().view(1) for name, value in params.items()}

    def limits(self, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Half a step beyond the smallest and the largest number."""
        if not params:
            return super().limits(params)
        # To half a step beyond the last number, the nearest one is the last: nothing is cut yet.
        beyond = (
            self.top * 2.0 ** -(LEVELS[self.number.removeprefix("fp8-")].mantissa + 2) if self.number in FLOATS else 0.5
        )
        low, high = (
            (number - params.get("zero", 0)) * params["scale"] for number in (self.bottom - beyond, self.top + beyond)
        )
        return low, high


def _max(grid: ScaledActivations, stats: ActivationStats) -> tuple[Tensor, Tensor]:
    return stats.low.min(), stats.high.max()


def _percentile(grid: ScaledActivations, stats: ActivationStats) -> tuple[Tensor, Tensor]:
    """All but one in ten thousand, on each side."""
    values = stats.rows.flatten().sort().values
    cut = round((1 - PERCENTILE) * len(values))
    return values[cut], values[len(values) - 1 - cut]


def _mse(grid: ScaledActivations, stats: ActivationStats) -> tuple[Tensor, Tensor]:
    """The range that minimises the squared error of the rows stats."""
    low, high = _max(grid, stats)
    errors = [
        (grid.round(stats.rows, grid.spanning(low * share, high * share)) - stats.rows).square().sum()
        for share in SHARES
    ]
    share = SHARES[int(torch.stack(errors).argmin())]
    return low * share, high * share


OBSERVERS = {"max": _max, "percentile": _percentile, "mse": _mse}
"""What a stored scale spans."""


@dataclass(frozen=True)
class BlockActivations(ActivationGrid):
    """Inputs on a grid of weights, whose scales a token has for itself."""

    grid: Grid

    def __str__(self) -> str:
        return str(self.grid)

    def params(self, x: Float[Tensor, "... in"], stored: Mapping[str, Tensor]) -> Params:
        """Min-max scales of each token's own groups, as the weights' grid has them."""
        return self.grid.fit(x.flatten(0, -2), None, search=False)

    def round(self, x: Float[Tensor, "... in"], params: Mapping[str, Tensor]) -> Float32[Tensor, "... in"]:
        """Encoded to the weights' grid, token by token, and decoded."""
        rows = x.float().flatten(0, -2)
        return self.grid.decode(self.grid.encode(rows, dict(params)), dict(params)).view(x.shape)


@dataclass(frozen=True)
class MXFP4Activations(BlockActivations):
    """MXFP4 inputs: scales span as those of MXFP8 do (compressed-tensors mxfp_utils.py); of weights they are
    searched."""

    def __str__(self) -> str:
        return "mxfp4"


@dataclass(frozen=True)
class NVFP4Activations(BlockActivations):
    """NVFP4 inputs: a block's scale is an E4M3 number over one stored divisor."""

    grid: ScalarGrid = NVFP4

    @property
    def stored(self) -> tuple[str, ...]:
        """The divisor of all scales."""
        return ("divisor",)

    def __str__(self) -> str:
        return "nvfp4"

    def params(self, x: Float[Tensor, "... in"], stored: Mapping[str, Tensor]) -> Params:
        """A scale of each token's 16 in-features, from their largest magnitude, under the stored divisor."""
        x = x.flatten(0, -2)
        largest = self.grid.scales.grouped(x).abs().amax(-1).float()
        return UnderGlobal().under(largest, stored["divisor"])

    def fit(self, stats: ActivationStats, observer: str) -> Params:
        """The divisor that puts the largest magnitude seen on the largest scale and the largest level."""
        low, high = OBSERVERS["max"](
            ScaledActivations("fp8-e4m3", "static"), stats
        )  # blocks have scales of their own: nothing is won by cutting
        most = E4M3.top * E2M1.top
        return {"divisor": (most / torch.maximum(low.abs(), high.abs()).clamp(min=1e-12)).view(1)}

    def limits(self, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the largest scale times the largest level reaches, and half a step of the scale more."""
        high = E4M3.top * E2M1.top * (1 + 1 / 32) / params["divisor"]
        return -high, high


@dataclass(frozen=True)
class LLMInt8Activations(ActivationGrid):
    """LLM.int8(): in-features with an input of `threshold` or more stay as they are (bitsandbytes
    int8_vectorwise_quant)."""

    threshold: float = 6.0

    tokens = ScaledActivations("int8", "token")

    def __str__(self) -> str:
        return "llm-int8"

    def params(self, x: Float[Tensor, "... in"], stored: Mapping[str, Tensor]) -> Params:
        """Scales by token, of all but outliers; and which in-features have outliers (`stays`)."""
        large = x.abs() >= self.threshold
        return {**self.tokens.params(x.masked_fill(large, 0), {}), "stays": large.flatten(0, -2).any(0)}

    def round(self, x: Float[Tensor, "... in"], params: Mapping[str, Tensor]) -> Float32[Tensor, "... in"]:
        """Rounded by token, but for in-features with outliers."""
        return torch.where(params["stays"], x.float(), self.tokens.round(x, params))


ACTIVATION_GRIDS: dict[str, ActivationGrid] = {
    **{name: ScaledActivations.parse(name) for name in SCALED_ACTIVATIONS},
    "mxfp8-e4m3": BlockActivations(SCALAR_GRIDS["mxfp8-e4m3"]),
    "mxfp4": MXFP4Activations(ScalarGrid("mxfp4-e2m1", E2M1, Scales(32, Microscale()))),
    "nvfp4": NVFP4Activations(),
    "llm-int8": LLMInt8Activations(),
}


def parse(name: str) -> ActivationGrid:
    """`str(parse(name)) == name`. Raises BadRequest."""
    require_activations(name)
    return ACTIVATION_GRIDS.get(name) or ScaledActivations.parse(name)
