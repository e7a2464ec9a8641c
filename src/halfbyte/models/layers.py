"""Which of a model's modules are the decoder layers that a pass walks through."""

import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from halfbyte.errors import Unsupported
from halfbyte.models import roles
from halfbyte.models.filling import NO_MODEL

MASKED = set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
"""Classes that fill gaps in a text. By their names: Transformers would import the code of all these families to compare
classes."""


def require_decoder(model: transformers.PreTrainedModel) -> None:
    """Raise Unsupported for a model that does not predict a text from its beginning."""
    if model.config.is_encoder_decoder or type(model).__name__ in MASKED:
        raise Unsupported(f"calibration and eval run decoders on text, and {type(model).__name__} is none; {NO_MODEL}")


def decoder_layers(model: transformers.PreTrainedModel, model_type: str) -> tuple[str, nn.ModuleList]:
    """The decoder's layers, with their name. Raises Unsupported."""
    config = model.config.get_text_config(decoder=True)
    counts = {getattr(config, name, None) for name in ("num_hidden_layers", "num_layers")}  # LongCat's are two in one
    decoder = model.get_decoder()
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) in counts and not roles.FOREIGN.search(f"{name}.")
    }
    name = next((name for name in lists if name.rpartition(".")[0] == prefix), next(iter(lists), None))
    if name is None:
        raise Unsupported(f"'{model_type}' ({type(model).__name__}) has no list of decoder layers to walk; {NO_MODEL}")
    return name, lists[name]
