"""Parameters of a model get the values that a checkpoint has for them, and lose them again."""

from collections.abc import Collection, Iterable
from math import prod
from typing import Protocol, runtime_checkable

import torch
import transformers
from torch import Tensor, nn

from halfbyte.errors import BadCheckpoint, Unsupported, plural
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.mapping import ParamView, WeightMap
from halfbyte.models.poison import is_poisoned, poison
from halfbyte.models.precision import require_finite

NO_MODEL = "--method nearest quantizes it all the same, and runs no model"
"""What to do with a model that cannot be run."""


@runtime_checkable
class TensorSource(Protocol):
    """What tensors are read from."""

    def read(self, tensor: str) -> Tensor:
        """A tensor of the unquantized checkpoint, by its name."""
        ...


def tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or a buffer by its full name; DeepSeek's routers keep a bias in a buffer that checkpoints hold."""
    home, _, last = name.rpartition(".")
    return getattr(model.get_submodule(home), last).data


def ties(model: transformers.PreTrainedModel, weight_map: WeightMap) -> dict[str, str]:
    """Parameters without a tensor of their own, each with the one whose values it shares, by Transformers' rules."""
    stored = {view.parameter for view in weight_map.values()}
    groups: dict[str, list[str]] = {}
    first: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):  # a module may stand in several places
        groups.setdefault(first.setdefault(id(p), name), []).append(name)
    for name, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, [source]).append(name)
    tied: dict[str, str] = {}
    for names in groups.values():
        if home := next((name for name in names if name in stored), None):
            tied |= {name: home for name in names if name not in stored}
    return tied


def require_whole(
    model: transformers.PreTrainedModel, checkpoint: Checkpoint, weight_map: WeightMap, names: Collection[str]
) -> None:
    """Raise BadCheckpoint for parameters and buffers among `names` of which the checkpoint fills not every element."""
    shapes, tied = checkpoint.tensors(), ties(model, weight_map)
    filled: dict[str, dict[tuple, int]] = {}
    for tensor, view in weight_map.items():
        filled.setdefault(view.parameter, {})[view.expert, view.offset] = prod(shapes[tensor])
    sizes = {name: p.numel() for name, p in model.named_parameters(remove_duplicate=False)}
    bare = [
        name for name in names if name in sizes and sum(filled.get(tied.get(name, name), {}).values()) < sizes[name]
    ]
    if made := next((name for name in bare if name in weight_map.lost), None):
        raise Unsupported(
            f"Transformers makes '{made}' of the checkpoint by {weight_map.lost[made]}, which halfbyte does not "
            f"follow; {NO_MODEL}"
        )
    if bare:
        raise BadCheckpoint(
            f"{checkpoint.path} lacks {plural(len(bare), 'tensor')} of '{checkpoint.model_type}', or parts of them, "
            f"the first '{bare[0]}'"
        )
    buffers = dict(model.named_buffers(remove_duplicate=False))
    if empty := next(
        (name for name in names if name in buffers and name not in filled and is_poisoned(buffers[name])), None
    ):
        raise BadCheckpoint(
            f"neither {checkpoint.path} nor Transformers {transformers.__version__} has values for '{empty}' of "
            f"'{checkpoint.model_type}' ({NO_MODEL})"
        )


def inside(model: nn.Module, prefix: str) -> list[str]:
    """Names of the parameters and buffers of a part of the model."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return [name for name, _ in named if name.startswith(prefix)]


def put(model: nn.Module, name: str, p: nn.Parameter) -> None:
    """Make `p` the parameter of this name."""
    home, _, last = name.rpartition(".")
    model.get_submodule(home)._parameters[last] = p


def load(
    model: nn.Module,
    source: TensorSource,
    weight_map: WeightMap,
    tied: dict[str, str],
    names: Iterable[str],
    device: torch.device | str,
) -> None:
    """Give those of the parameters (and buffers that the checkpoint holds) their values, unless they have them; what is
    tied shares its memory."""
    state = dict(model.state_dict(keep_vars=True))
    names = [name for name in names if name in state]
    fresh = {
        home
        for name in names
        if (home := tied.get(name, name)) in state
        and (state[home].is_meta or not isinstance(state[home], nn.Parameter))
    }
    for name in fresh:
        if state[name].is_meta:
            put(model, name, nn.Parameter(torch.empty_like(state[name], device=device), requires_grad=False))
    _fill(model, source, weight_map, [tensor for tensor, view in weight_map.items() if view.parameter in fresh], device)
    for name in names:
        if name in tied:
            put(model, name, model.get_parameter(tied[name]))


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Have the model's tables on a device; its parameters come there as they are loaded."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def blind(model: nn.Module, names: Iterable[str]) -> None:
    """Poison in place of the parameters, which takes no memory: they may be looked at (of which kind, on which device),
    and not be computed with."""
    for name in names:
        p = model.get_parameter(name)
        put(model, name, nn.Parameter(poison(p.flatten()[:1]).expand(p.numel()).view(p.shape), requires_grad=False))


def release(model: nn.Module, names: Iterable[str]) -> None:
    """Take the memory of the parameters back."""
    for name in names:
        home, _, last = name.rpartition(".")
        if (p := model.get_submodule(home)._parameters.get(last)) is not None:
            put(model, name, nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False))


def _fill(
    model: nn.Module, source: TensorSource, weight_map: WeightMap, names: Iterable[str], device: torch.device | str
) -> None:
    """Read tensors of the checkpoint into the parameters in which they lie."""
    state = dict(model.state_dict(keep_vars=True))
    for name in names:
        value = source.read(name)
        require_finite(name, value)
        try:
            view = weight_map[name].view(state[weight_map[name].parameter].data, tuple(value.shape))
        except (RuntimeError, IndexError):
            view = None
        if view is None or view.shape != value.shape:
            raise BadCheckpoint(f"tensor '{name}' is {list(value.shape)}, which config.json has no place for")
        home = state[weight_map[name].parameter]
        if weight_map[name] == ParamView(weight_map[name].parameter) and _is_as(value, home):
            home.data = value  # and no second one beside it, which of an embedding is the peak of a small model's run
        else:
            view.copy_(value.to(device, non_blocking=True))


def _is_as(value: Tensor, home: Tensor) -> bool:
    """Whether a tensor may be a parameter as it is."""
    return (
        isinstance(home, nn.Parameter)
        and (value.shape, value.dtype, value.device) == (home.shape, home.dtype, home.device)
        and value.is_contiguous()
    )
