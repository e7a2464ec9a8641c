"""What the modules of a model say of the tensors that they read."""

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers import core_model_loading as loading
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import BadCheckpoint
from halfbyte.grids.grid import Shape
from halfbyte.models import mapping
from halfbyte.models.linears import Linears


def ask(model: PreTrainedModel, candidates: dict[str, Shape]) -> Linears:
    """Raises BadCheckpoint for a matrix that lies the other way."""
    names = mapping.Names(model)
    transposed: dict[str, bool] = {}
    others: dict[str, str] = {}
    for name, shape in candidates.items():
        parameter, converter = names.find(name)
        if parameter is None:
            others[name] = "the model does not read it"
            continue
        home, expected = model.get_submodule(parameter.rpartition(".")[0]), tuple(names.state_dict[parameter].shape)
        if isinstance(home, nn.Linear | Conv1D) or "Linear" in type(home).__name__:
            if converter is None and shape != expected and shape == expected[::-1]:
                raise BadCheckpoint(
                    f"tensor '{name}' is {list(shape)}, and {type(model).__name__} has it as {list(expected)}; is "
                    "config.json of another model?"
                )
            transposed[name] = isinstance(home, Conv1D)
        elif "Experts" in type(home).__name__:
            apart = None if converter else names.stack(name)
            turned = apart.transposed if apart else converter is not None and _turns(converter, shape, expected)
            transposed[name] = mapping.lies_transposed(model, parameter) != turned
        else:
            others[name] = f"{type(home).__name__}, which reads it, is no linear"
    return Linears(transposed, others)


def read_in_stacks(model: PreTrainedModel, modules: Iterable[str]) -> str | None:
    """The first of some modules that Transformers reads as a part of a stack alone, and not under its own name."""
    names = mapping.Names(model)
    return next(
        (m for m in modules if names.rename(f"{m}.weight")[0] not in names.state_dict and names.stack(f"{m}.weight")),
        None,
    )


def _turns(converter: loading.WeightConverter, shape: Shape, expected: Shape) -> bool:
    """Whether Transformers transposes what it reads."""
    turns = [operation for operation in converter.operations if isinstance(operation, loading.Transpose)]
    return bool(turns) and (shape != expected or not any(t.check_dims for t in turns))
