"""A Transformers model without weights, of the class and with the tables that from_pretrained gives."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import initialization

from halfbyte.errors import BadCheckpoint, plural
from halfbyte.models import roles
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.filling import NO_MODEL, release
from halfbyte.models.mapping import places
from halfbyte.models.poison import poison

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


def aliases(checkpoint: Checkpoint, modules: list[str]) -> list[str]:
    """What Transformers calls those of the modules that it renames: compressed-tensors looks for kept modules under
    these names."""
    try:
        weight_map = places(outline(checkpoint), checkpoint.tensors())
    except BadCheckpoint:
        return []
    return sorted(
        {weight_map[f"{m}.weight"].parameter.removesuffix(".weight") for m in modules if f"{m}.weight" in weight_map}
        - set(modules)
    )
