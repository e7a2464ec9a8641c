"""A Transformers model without weights, and where each tensor of the checkpoint lies in it.

Transformers renames tensors and fuses experts while it loads; its own rules (conversion_mapping.py) say how. A
ParamView inverts them: it is a view of a parameter in which a tensor of the checkpoint lies as it does in the file.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, runtime_checkable

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import core_model_loading as loading
from transformers import initialization
from transformers.conversion_mapping import get_model_conversion_mapping

from halfbyte.errors import BadCheckpoint, Unsupported, plural
from halfbyte.models import roles
from halfbyte.models.checkpoint import Checkpoint, require_finite

REFUSALS = (
    ValueError, LookupError, ImportError, OSError, AttributeError, TypeError, ArithmeticError, AssertionError,
    RuntimeError, StrictDataclassError,
)  # fmt: skip
"""What Transformers raises at a config that it cannot read, as seen with broken ones."""
ATTENTION = ("eager", "sdpa")
"""Formulas of attention that a config may ask for; any other name makes Transformers fetch a kernel of that name from
the hub."""
MOST_BUFFERS = 1 << 30
"""Bytes of all that a model computes from its config alone; real ones have a few megabytes of tables and masks."""
LAYERS = re.compile(r"(num_(hidden_|decoder_|encoder_)?|n_|(en|de)coder_)layers?|depth|num_blocks")
CHOICES = (
    transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    transformers.MODEL_MAPPING,
)
INITIALIZED = "_is_hf_initialized"
"""Where Transformers marks what it has not to initialize."""
NO_MODEL = "--method nearest quantizes it all the same, and runs no model"


@runtime_checkable
class TensorSource(Protocol):
    """What tensors are read from."""

    def read(self, tensor: str) -> Tensor:
        """A tensor of the unquantized checkpoint, by its name."""
        ...


@dataclass(frozen=True)
class ParamView:
    """Where a tensor of the checkpoint lies in a parameter."""

    parameter: str
    expert: int | None = None
    offset: int = 0
    """First row of the tensor along `dim`, which counts after the expert's dimension is gone."""
    dim: int = 0
    transposed: bool = False

    def view(self, parameter: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The tensor of the checkpoint, of `shape`, sharing memory with the parameter."""
        view = parameter if self.expert is None else parameter[self.expert]
        if self.transposed:
            view = view.transpose(-1, -2)
        return view.narrow(self.dim, self.offset, shape[self.dim]) if shape else view


def build(checkpoint: Checkpoint, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The model on the meta device, its buffers real. Raises BadCheckpoint for an architecture that nobody knows."""
    with refusing(checkpoint, "build"):
        model = _construct(checkpoint, dtype).eval().requires_grad_(False)
        _keep_precision(model, dtype)
        _initialize(model, checkpoint)
    return model


@contextmanager
def refusing(checkpoint: Checkpoint, verb: str, advice: str = f" ({NO_MODEL})") -> Iterator[None]:
    """What Transformers raises becomes one line."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError, and no fault of the model
        raise
    except REFUSALS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadCheckpoint(
            f"Transformers {transformers.__version__} cannot {verb} '{checkpoint.model_type}': {reason}{advice}"
        ) from None


def outline(checkpoint: Checkpoint) -> transformers.PreTrainedModel:
    """The model on the meta device, of the class that config.json names: to be asked and not to be run. Raises
    BadCheckpoint."""
    with refusing(checkpoint, "build", ""):
        return _construct(checkpoint, checkpoint.dtype)


def _construct(checkpoint: Checkpoint, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """Every tensor on the meta device, none shared: which ones are, the checkpoint decides."""
    _require_layers(checkpoint)
    config = checkpoint.settings()
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            delattr(part, "quantization_config")
    if not all(part._attn_implementation in ATTENTION for part in _parts(config)):
        # What Transformers takes by default: not every family has SDPA, and some have it in another formula.
        config._attn_implementation = None
    kind = _architecture(checkpoint, config)
    with torch.device("meta"), initialization.no_tie_weights():
        model = kind._from_config(config, dtype=dtype, experts_implementation="eager")
    release(
        model, [name for name, p in model.named_parameters(remove_duplicate=False) if not p.is_meta]
    )  # torch.FloatTensor and torch.normal pay no heed
    return model


def _parts(config: transformers.PreTrainedConfig) -> Iterator[transformers.PreTrainedConfig]:
    yield config
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), transformers.PreTrainedConfig):
            yield from _parts(part)


def _require_layers(checkpoint: Checkpoint) -> None:
    """Raise BadCheckpoint for more layers than there are tensors, before a list of so many is made."""
    parts = [checkpoint.config, *(part for part in checkpoint.config.values() if isinstance(part, dict))]
    for name, count in (item for part in parts for item in part.items()):
        if isinstance(count, int) and LAYERS.fullmatch(name) and count > len(checkpoint.tensors()):
            raise BadCheckpoint(
                f"{checkpoint.path}/config.json has {name} {count}, and the checkpoint only "
                f"{plural(len(checkpoint.tensors()), 'tensor')}"
            )


def _architecture(checkpoint: Checkpoint, config: transformers.PreTrainedConfig) -> type[transformers.PreTrainedModel]:
    """The class that config.json names, where it is a model of such a config; else the one that Transformers chooses by
    the config."""
    names = checkpoint.config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    kind: Any = getattr(transformers, name, None)
    if not (
        isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and type(config) is kind.config_class
    ):
        kind = next((mapping[type(config)] for mapping in CHOICES if type(config) in mapping), None)
        if kind is None:
            raise BadCheckpoint(
                f"Transformers {transformers.__version__} has no language model for '{config.model_type}' ({NO_MODEL})"
            )
    headless = not checkpoint.tied and not any(map(roles.is_head, checkpoint.tensors()))
    if (
        headless
        and kind.can_generate()
        and not any(t.startswith(f"{kind.base_model_prefix}.") for t in checkpoint.tensors())
    ):
        kind = transformers.MODEL_MAPPING[
            type(config)
        ]  # an embedding model, saved without the head that its config speaks of
    return kind


def _initialize(model: transformers.PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Give buffers the values that from_pretrained gives them, by the same call. What that leaves is poisoned, to be
    found."""
    lost = [
        (module, name, b) for module in model.modules() for name, b in module.named_buffers(recurse=False) if b.is_meta
    ]
    size_bytes = sum(b.nbytes for _, _, b in lost)
    if size_bytes > MOST_BUFFERS:
        raise BadCheckpoint(
            f"{checkpoint.path}/config.json describes a model whose tables take {size_bytes / 1e9:.0f} GB; some "
            "number in it is wrong"
        )
    for module, name, b in lost:
        module._buffers[name] = poison(b)
    for p in model.parameters():
        setattr(p, INITIALIZED, True)  # the checkpoint has it
    for module in model.modules():
        setattr(module, INITIALIZED, False)
    model.initialize_weights()


def poison(b: Tensor) -> Tensor:
    """A tensor of the same kind whose values nobody takes for real ones."""
    if b.dtype == torch.bool:
        return torch.full_like(b, 255, dtype=torch.uint8, device="cpu").view(torch.bool)
    value = (
        float("nan")
        if b.is_floating_point() or b.is_complex()
        else torch.iinfo(b.dtype).min or torch.iinfo(b.dtype).max
    )
    return torch.full_like(b, value, device="cpu")


def is_poisoned(b: Tensor) -> bool:
    """Whether a tensor still holds values of `poison`."""
    if b.dtype == torch.bool:
        return bool((b.view(torch.uint8) == 255).any())
    if b.is_floating_point() or b.is_complex():
        return bool(b.isnan().any())
    return bool((b == (torch.iinfo(b.dtype).min or torch.iinfo(b.dtype).max)).any())


def _keep_precision(model: transformers.PreTrainedModel, dtype: torch.dtype) -> None:
    """Tensors that a family wants in 32 bits whatever the model's dtype, as from_pretrained gives them."""
    wanted = set(model._keep_in_fp32_modules_strict or ()) if dtype.itemsize == 2 else set()
    if dtype == torch.float16:
        wanted |= set(model._keep_in_fp32_modules or ())
    if wanted:
        alternatives = re.compile("|".join(name.replace("*", ".*") for name in sorted(wanted)))
        for name, value in model.state_dict(keep_vars=True).items():
            if alternatives.search(name) and value.is_floating_point():
                value.data = value.data.float()


class Names:
    """What Transformers calls the tensors of a checkpoint."""

    def __init__(self, model: transformers.PreTrainedModel):
        self.model = model
        transforms = get_model_conversion_mapping(model)
        self.renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
        self.owner = {pattern: c for c in self.converters for pattern in c.source_patterns}
        self.known = dict(model.state_dict(keep_vars=True))
        self.prefix = model.base_model_prefix

    def rename(self, name: str) -> tuple[str, str | None]:
        """What may be a parameter, and the pattern of the conversion that makes it."""
        target, pattern = loading.rename_source_key(name, self.renamings, self.converters, self.prefix, self.known)
        return (name, None) if target not in self.known and name in self.known else (target, pattern)

    def stack(self, name: str, rows: int = 0) -> ParamView | None:
        """Where a linear of one expert lies in a fused tensor, though Transformers has no rule that puts it there: we
        wrote it apart."""
        if not (split := re.fullmatch(r"(.*)\.(\d+)\.([^.]+)\.weight", name)):
            return None
        kind = self.model.config.get_text_config(decoder=True).model_type
        for stack, number in [(f"{split[1]}.{split[3]}", 0), *roles.stacks_of(split[1], split[3], kind)]:
            for target, _ in map(self.rename, (stack, f"{stack}.weight")):
                if target in self.known:
                    turned = lies_transposed(self.model, target) != roles.is_transposed(name, kind)
                    return ParamView(target, int(split[2]), number * rows, transposed=turned)
        return None

    def find(self, name: str) -> tuple[str | None, loading.WeightConverter | None]:
        """The parameter that a tensor is, or is a part of, and how it is converted; None where the model reads no such
        tensor."""
        target, pattern = self.rename(name)
        if target in self.known:
            return target, None if pattern is None else self.owner[pattern]
        stack = self.stack(name)
        return (stack.parameter, None) if stack else (None, None)


def lies_transposed(model: transformers.PreTrainedModel, stack: str) -> bool:
    """Whether a parameter that holds experts is [experts, in, out]."""
    home, kind = model.get_submodule(stack.rpartition(".")[0]), model.config.get_text_config(decoder=True).model_type
    return getattr(home, "is_transposed", roles.is_transposed(stack, kind))


class WeightMap(dict[str, ParamView]):
    """Where each tensor of the checkpoint lies; tensors that the model does not use are absent."""

    def __init__(self):
        super().__init__()
        self.lost: dict[str, str] = {}
        """Parameters that are made of the checkpoint in a way that no ParamView tells, and how."""


def places(model: transformers.PreTrainedModel, tensors: dict[str, tuple[int, ...]]) -> WeightMap:
    """Where each tensor of the checkpoint lies."""
    names = Names(model)
    found = WeightMap()
    fused: dict[str, dict[str, list[str]]] = {}
    for name in sorted(tensors, key=loading.dot_natural_key):
        target, pattern = names.rename(name)
        if pattern is not None and target in names.known:
            fused.setdefault(target, {}).setdefault(pattern, []).append(name)
        elif target in names.known:
            found[name] = ParamView(target)
        elif stack := names.stack(name, tensors[name][0]):
            found[name] = stack
    for target, sources in fused.items():
        converter = next(names.owner[pattern] for pattern in sources)
        merged = _fused(target, converter, sources, tensors, tuple(names.known[target].shape))
        if merged is None:
            found.lost[target] = ", ".join(type(operation).__name__ for operation in converter.operations)
        else:
            found.update(merged)
    return found


def aliases(checkpoint: Checkpoint, modules: list[str]) -> list[str]:
    """What Transformers calls those of the modules that it renames: compressed-tensors looks for kept modules under
    these names."""
    try:
        found = places(outline(checkpoint), checkpoint.tensors())
    except BadCheckpoint:
        return []
    return sorted(
        {found[f"{m}.weight"].parameter.removesuffix(".weight") for m in modules if f"{m}.weight" in found}
        - set(modules)
    )


def _fused(
    target: str,
    converter: loading.WeightConverter,
    sources: dict[str, list[str]],
    tensors: dict[str, tuple[int, ...]],
    shape: tuple[int, ...],
) -> dict[str, ParamView] | None:
    """Follow the conversion's operations for the names instead of the numbers. None where no view of the parameter is
    the tensor."""
    merged, dim, transposed = False, None, False
    for operation in converter.operations:
        if isinstance(operation, loading.MergeModulelist) and operation.dim == 0:
            merged = True
        elif isinstance(operation, loading.Concatenate):
            dim = operation.dim - (1 if merged else 0)
        elif isinstance(operation, loading.Transpose) and {
            operation.dim0 - len(shape),
            operation.dim1 - len(shape),
        } == {-1, -2}:
            first = next(iter(sources.values()))[0]
            transposed = not (operation.check_dims and tensors[first] == shape)
        else:
            return None
    found, first = {}, 0
    for pattern in converter.source_patterns:
        names = sources.get(pattern, [])
        for number, name in enumerate(names):
            expert = number if merged else None
            found[name] = ParamView(target, expert, first if dim is not None else 0, dim or 0, transposed)
            if dim is not None and not merged:
                first += tensors[name][dim]
        if dim is not None and merged and names:
            first += tensors[names[0]][dim]
    return found


def tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or a buffer by its full name; DeepSeek's routers keep a bias in a buffer that checkpoints hold."""
    home, _, last = name.rpartition(".")
    return getattr(model.get_submodule(home), last).data


def ties(model: transformers.PreTrainedModel, weight_map: WeightMap) -> dict[str, str]:
    """Parameters without a tensor of their own, each with the one whose values it shares, by Transformers' rules."""
    own = {view.parameter for view in weight_map.values()}
    groups: dict[str, list[str]] = {}
    first: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):  # a module may stand in several places
        groups.setdefault(first.setdefault(id(p), name), []).append(name)
    for name, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, [source]).append(name)
    tied: dict[str, str] = {}
    for names in groups.values():
        if home := next((name for name in names if name in own), None):
            tied |= {name: home for name in names if name not in own}
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
