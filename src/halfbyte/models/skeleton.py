"""A Transformers model without weights, and where each tensor of the checkpoint lies in it.

Transformers renames tensors and fuses experts while it loads; its own rules (conversion_mapping.py) say how. A Place
inverts them: it is a view of a parameter in which a tensor of the checkpoint lies as it does in the file.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping

from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.models.checkpoint import Checkpoint, require_finite

REFUSALS = (ValueError, KeyError, ImportError, OSError, AttributeError, TypeError, ArithmeticError, StrictDataclassError)
"""What Transformers raises at a config that it cannot read, as seen with broken ones."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of the checkpoint lies in a parameter."""

    parameter: str
    expert: int | None = None
    first: int = 0
    """First row of the tensor along `dim`, which counts after the expert's dimension is gone."""
    dim: int = 0
    transposed: bool = False

    def view(self, parameter: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The tensor of the checkpoint, of `shape`, sharing memory with the parameter."""
        view = parameter if self.expert is None else parameter[self.expert]
        if self.transposed:
            view = view.transpose(-1, -2)
        return view.narrow(self.dim, self.first, shape[self.dim]) if shape else view


def build(checkpoint: Checkpoint, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The model on the meta device, its buffers real. Raises BadCheckpoint for an architecture that nobody knows."""
    try:
        config = checkpoint.settings()
        for part in (config, config.get_text_config(decoder=True)):
            if hasattr(part, "quantization_config"):
                delattr(part, "quantization_config")
        with torch.device("meta"):
            # Attention is what Transformers takes by default: not every family has SDPA, and some have it in another formula.
            causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
            kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForImageTextToText
            model = kind.from_config(config, dtype=dtype, experts_implementation="eager", trust_remote_code=False)
    except REFUSALS as error:
        reason = " ".join(str(error).split())
        raise BadCheckpoint(
            f"Transformers {transformers.__version__} cannot build '{checkpoint.model_type}': {reason} "
            "(methods without calibration need no model: --method nearest)"
        ) from None
    model.eval().requires_grad_(False)
    _keep_precision(model, dtype)
    for module in model.modules():
        lost = [name for name, b in module.named_buffers(recurse=False) if b.is_meta]
        for name in lost:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if lost:
            model._init_weights(module)  # Transformers computes every buffer here, as from_pretrained does
    return model


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


def outline(checkpoint: Checkpoint) -> transformers.PreTrainedModel:
    """The model on the meta device, of the class that config.json names: to be asked and not to be run. Raises BadCheckpoint."""
    named = getattr(transformers, str((checkpoint.config.get("architectures") or [""])[0]), None)
    try:
        config = checkpoint.settings()
        with torch.device("meta"):
            if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
                return named(config)
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except REFUSALS as error:
        reason = " ".join(str(error).split())
        raise BadCheckpoint(f"Transformers {transformers.__version__} cannot build '{checkpoint.model_type}': {reason}") from None


class Names:
    """What Transformers calls the tensors of a checkpoint."""

    def __init__(self, model: transformers.PreTrainedModel):
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

    def stack(self, name: str) -> tuple[str, int] | None:
        """The fused tensor in which one expert lies that we quantized by itself, and its number."""
        if split := re.fullmatch(r"(.*)\.(\d+)\.([^.]+)\.weight", name):
            for stack in (f"{split[1]}.{split[3]}", f"{split[1]}.{split[3]}.weight"):
                target, pattern = self.rename(stack)
                if target in self.known and pattern is None:
                    return target, int(split[2])
        return None

    def find(self, name: str) -> tuple[str | None, loading.WeightConverter | None]:
        """The parameter that a tensor is, or is a part of, and how it is converted; None where the model reads no such tensor."""
        target, pattern = self.rename(name)
        if target in self.known:
            return target, None if pattern is None else self.owner[pattern]
        stack = self.stack(name)
        return (stack[0], None) if stack else (None, None)


def places(model: transformers.PreTrainedModel, tensors: dict[str, tuple[int, ...]]) -> dict[str, Place]:
    """Where each tensor of the checkpoint lies; tensors that the model does not use are absent."""
    names = Names(model)
    found: dict[str, Place] = {}
    fused: dict[str, dict[str, list[str]]] = {}
    for name in sorted(tensors, key=loading.dot_natural_key):
        target, pattern = names.rename(name)
        if pattern is not None and target in names.known:
            fused.setdefault(target, {}).setdefault(pattern, []).append(name)
        elif target in names.known:
            found[name] = Place(target)
        elif stack := names.stack(name):
            found[name] = Place(stack[0], expert=stack[1])
    for target, sources in fused.items():
        converter = next(names.owner[pattern] for pattern in sources)
        found.update(_fused(target, converter, sources, tensors))
    return found


def aliases(checkpoint: Checkpoint, modules: list[str]) -> list[str]:
    """What Transformers calls those of the modules that it renames: compressed-tensors looks for kept modules under these names."""
    try:
        found = places(outline(checkpoint), checkpoint.tensors())
    except (BadCheckpoint, Unsupported):
        return []
    return sorted({found[f"{m}.weight"].parameter.removesuffix(".weight") for m in modules if f"{m}.weight" in found} - set(modules))


def _fused(target: str, converter: loading.WeightConverter, sources: dict[str, list[str]], tensors: dict[str, tuple[int, ...]]) -> dict[str, Place]:
    """Follow the conversion's operations for the names instead of the numbers."""
    merged, dim, transposed = False, None, False
    for operation in converter.operations:
        if isinstance(operation, loading.MergeModulelist) and operation.dim == 0:
            merged = True
        elif isinstance(operation, loading.Concatenate):
            dim = operation.dim - (1 if merged else 0)
        elif isinstance(operation, loading.Transpose) and {operation.dim0 - merged, operation.dim1 - merged} == {0, 1}:
            transposed = True
        else:
            raise Unsupported(
                f"Transformers makes '{target}' of the checkpoint by {operation!r}, which calibration cannot follow; --method nearest needs no model"
            )
    found, first = {}, 0
    for pattern in converter.source_patterns:
        names = sources.get(pattern, [])
        for number, name in enumerate(names):
            expert = number if merged else None
            found[name] = Place(target, expert, first if dim is not None else 0, dim or 0, transposed)
            if dim is not None and not merged:
                first += tensors[name][dim]
        if dim is not None and merged and names:
            first += tensors[names[0]][dim]
    return found


def tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or a buffer by its full name; DeepSeek's routers keep a bias in a buffer that checkpoints hold."""
    home, _, last = name.rpartition(".")
    return getattr(model.get_submodule(home), last).data


def require_whole(model: transformers.PreTrainedModel, checkpoint: Checkpoint, found: dict[str, Place]) -> None:
    """Raise BadCheckpoint for parameters that no tensor of the checkpoint fills."""
    filled = {place.parameter for place in found.values()} | set(model.all_tied_weights_keys)
    if missing := [n for n, _ in model.named_parameters() if n not in filled]:
        raise BadCheckpoint(f"{checkpoint.path} lacks {len(missing)} tensors of '{checkpoint.model_type}', the first '{missing[0]}'")


def materialize(module: nn.Module, device: torch.device | str) -> None:
    """Give every parameter of the module memory, without values."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            if p.is_meta:
                part._parameters[name] = nn.Parameter(torch.empty_like(p, device=device), requires_grad=False)


def release(module: nn.Module) -> None:
    """Take the memory of every parameter back."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            part._parameters[name] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)


def fill(model: nn.Module, checkpoint: Checkpoint, found: dict[str, Place], names: Iterable[str], device: torch.device | str) -> None:
    """Read tensors of the checkpoint into the parameters in which they lie."""
    state = dict(model.state_dict(keep_vars=True))
    for name in names:
        value = checkpoint.read(name)
        require_finite(name, value)
        try:
            found[name].view(state[found[name].parameter].data, tuple(value.shape)).copy_(value.to(device))
        except RuntimeError:
            raise BadCheckpoint(f"tensor '{name}' is {list(value.shape)}, which config.json has no place for") from None
