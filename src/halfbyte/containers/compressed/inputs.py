"""How inputs are rounded, as compressed-tensors says it: QuantizationArgs of `input_activations`
(quantization/quant_args.py)."""

from collections.abc import Mapping

from halfbyte.containers.container import Config
from halfbyte.errors import Unsupported
from halfbyte.files import matches
from halfbyte.grids.activations import ACTIVATION_GRIDS, ActivationGrid, ScaledActivations

MICRO: dict[str, Config] = {
    "mxfp8-e4m3": {"num_bits": 8, "strategy": "group", "group_size": 32, "dynamic": True, "scale_dtype": "torch.uint8"},
    "mxfp4": {"num_bits": 4, "strategy": "group", "group_size": 32, "dynamic": True, "scale_dtype": "torch.uint8"},
    "nvfp4": {
        "num_bits": 4,
        "strategy": "tensor_group",
        "group_size": 16,
        "dynamic": "local",
        "scale_dtype": "torch.float8_e4m3fn",
    },
}
STRATEGIES = {"token": ("token", True), "tensor": ("tensor", True), "static": ("tensor", False)}


def check_inputs(grid: ActivationGrid | None) -> None:
    """Raise Unsupported for what the config has no words for."""
    if grid is not None and str(grid) not in MICRO and not _is_said(grid):
        raise Unsupported(
            f"compressed-tensors has no words for {grid} inputs; it has int4 to int8 and fp8-e4m3 per -token, "
            f"-tensor, -static or -g128, {', '.join(MICRO)}"
        )


def _is_said(grid: ActivationGrid) -> bool:
    return (
        isinstance(grid, ScaledActivations)
        and grid.number != "fp8-e5m2"
        and (isinstance(grid.granularity, int) or grid.granularity in STRATEGIES)
    )


def input_arguments(grid: ActivationGrid | None) -> Config | None:
    """QuantizationArgs of a grid of activations; None where they stay in 16 bits. Raises Unsupported."""
    check_inputs(grid)
    if grid is None:
        return None
    common = {
        "symmetric": True,
        "group_size": None,
        "block_structure": None,
        "actorder": None,
        "observer": None,
        "observer_kwargs": {},
    }
    if not isinstance(grid, ScaledActivations):
        return {**common, "type": "float", **MICRO[str(grid)]}
    strategy, dynamic = ("group", True) if isinstance(grid.granularity, int) else STRATEGIES[grid.granularity]
    return {
        **common,
        "num_bits": grid.bits,
        "type": "int" if grid.number.startswith("int") else "float",
        "symmetric": grid.symmetric,
        "strategy": strategy,
        "group_size": grid.granularity if isinstance(grid.granularity, int) else None,
        "dynamic": dynamic,
        **({} if dynamic else {"observer": "static_minmax"}),
    }


def input_grid(args: Config | None) -> ActivationGrid | None:
    """The inverse of `input_arguments`, for files of others too. Raises Unsupported."""
    if not args:
        return None
    bits, is_float, strategy, group = (
        args.get("num_bits", 8),
        args.get("type") == "float",
        args.get("strategy"),
        args.get("group_size"),
    )
    for name, micro in MICRO.items():
        if is_float and (bits, strategy, group) == (micro["num_bits"], micro["strategy"], micro["group_size"]):
            return ACTIVATION_GRIDS[name]
    dynamic = args.get("dynamic", False)
    granularity = (
        f"g{group}"
        if strategy == "group" and dynamic
        else next((granularity for granularity, pair in STRATEGIES.items() if pair == (strategy, dynamic)), None)
    )
    number = "fp8-e4m3" if is_float else f"int{bits}"
    if granularity is None or (is_float and bits != 8):
        raise Unsupported(
            f"inputs rounded to {number} with strategy '{strategy}', dynamic {dynamic}, are not read; per token, per "
            "tensor and in groups they are"
        )
    return ScaledActivations.parse(
        f"{number}-{granularity}{'' if args.get('symmetric', True) or is_float else '-asym'}"
    )


def group_of(module: str, groups: Mapping[str, Config]) -> Config:
    """The group of the config that a module is in: the one that names it, or the one that names a class, such as
    Linear."""
    rest: Config = {}
    for group in groups.values():
        for target in group.get("targets") or []:
            if target == module or (target.startswith("re:") and matches(target[3:], module, "config.json")):
                return group
            if target[:1].isupper():  # a class; "lm_head" is a module's name
                rest = group
    return rest or next(iter(groups.values()), {})
