"""Where each tensor of a checkpoint lies in a Transformers model.

Transformers renames tensors and fuses experts while it loads; its own rules (conversion_mapping.py) say how. A
ParamView inverts them: it is a view of a parameter in which a tensor of the checkpoint lies as it does in the file.
"""

import re
from dataclasses import dataclass

import transformers
from torch import Tensor
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping

from halfbyte.models import roles


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


class Names:
    """What Transformers calls the tensors of a checkpoint."""

    def __init__(self, model: transformers.PreTrainedModel):
        self.model = model
        transforms = get_model_conversion_mapping(model)
        self.renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
        self.owner = {pattern: c for c in self.converters for pattern in c.source_patterns}
        self.state_dict = dict(model.state_dict(keep_vars=True))
        self.prefix = model.base_model_prefix

    def rename(self, name: str) -> tuple[str, str | None]:
        """What may be a parameter, and the pattern of the conversion that makes it."""
        target, pattern = loading.rename_source_key(name, self.renamings, self.converters, self.prefix, self.state_dict)
        return (name, None) if target not in self.state_dict and name in self.state_dict else (target, pattern)

    def stack(self, name: str, rows: int = 0) -> ParamView | None:
        """Where a linear of one expert lies in a fused tensor, though Transformers has no rule that puts it there: we
        wrote it apart."""
        if not (split := re.fullmatch(r"(.*)\.(\d+)\.([^.]+)\.weight", name)):
            return None
        kind = self.model.config.get_text_config(decoder=True).model_type
        for stack, number in [(f"{split[1]}.{split[3]}", 0), *roles.stacks_of(split[1], split[3], kind)]:
            for target, _ in map(self.rename, (stack, f"{stack}.weight")):
                if target in self.state_dict:
                    turned = lies_transposed(self.model, target) != roles.is_transposed(name, kind)
                    return ParamView(target, int(split[2]), number * rows, transposed=turned)
        return None

    def find(self, name: str) -> tuple[str | None, loading.WeightConverter | None]:
        """The parameter that a tensor is, or is a part of, and how it is converted; None where the model reads no such
        tensor."""
        target, pattern = self.rename(name)
        if target in self.state_dict:
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
    weight_map = WeightMap()
    fused: dict[str, dict[str, list[str]]] = {}
    for name in sorted(tensors, key=loading.dot_natural_key):
        target, pattern = names.rename(name)
        if pattern is not None and target in names.state_dict:
            fused.setdefault(target, {}).setdefault(pattern, []).append(name)
        elif target in names.state_dict:
            weight_map[name] = ParamView(target)
        elif stack := names.stack(name, tensors[name][0]):
            weight_map[name] = stack
    for target, sources in fused.items():
        converter = next(names.owner[pattern] for pattern in sources)
        merged = _fused(target, converter, sources, tensors, tuple(names.state_dict[target].shape))
        if merged is None:
            weight_map.lost[target] = ", ".join(type(operation).__name__ for operation in converter.operations)
        else:
            weight_map.update(merged)
    return weight_map


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
    views, first = {}, 0
    for pattern in converter.source_patterns:
        names = sources.get(pattern, [])
        for number, name in enumerate(names):
            expert = number if merged else None
            views[name] = ParamView(target, expert, first if dim is not None else 0, dim or 0, transposed)
            if dim is not None and not merged:
                first += tensors[name][dim]
        if dim is not None and merged and names:
            first += tensors[names[0]][dim]
    return views
