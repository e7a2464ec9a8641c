"""A model that is in memory as a whole, to answer: in which dtype, and ready for one token at a time."""

from collections.abc import Sequence
from typing import Any

import psutil
import torch

from halfbyte import nn
from halfbyte.devices import kind_of
from halfbyte.errors import BadRequest
from halfbyte.evaluation import states
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.multiplying import unpack

SHARE = 0.6
"""Of the free memory that a model in float32 may take; a larger one runs in its own dtype."""


def dtype_for(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """float32, in which rounding while a model runs changes no answer, where there is room for it."""
    free = psutil.virtual_memory().available if kind_of(device).is_host else kind_of(device).free_bytes(device)
    size = 4 * sum(torch.Size(shape).numel() for shape in checkpoint.tensors().values())
    return torch.float32 if size <= SHARE * free else checkpoint.unquantized_dtype


def model_of(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """A Transformers model."""
    model = nn.built(checkpoint, dtype, device)
    unpack(model)
    return model


def require_answers(checkpoints: Sequence[Checkpoint]) -> None:
    """Raises BadRequest for models that predict no tokens."""
    if not states.predicts(checkpoints):
        raise BadRequest(f"{checkpoints[0].path} predicts no tokens, so it answers nothing")
