"""Models without a head that predicts tokens, such as reward and embedding models: their last hidden states on the same
tokens.

Of every token, the distance of a model's last hidden state from the reference's, as a share of the reference's length,
and the cosine of the angle between them: a score or an embedding is made of these states.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.nn import functional

from halfbyte.errors import BadRequest
from halfbyte.evaluation.divergence import mean_and_error, windows_at_once
from halfbyte.models import skeleton
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.placement import Placement
from halfbyte.models.walk import Walk
from halfbyte.progress import Progress, silent


def predicts(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether these models predict tokens. Raises BadRequest where some do and some do not."""
    can_generate = [skeleton.outline(checkpoint).can_generate() for checkpoint in checkpoints]
    if odd := next(
        (c for c, generates in zip(checkpoints, can_generate, strict=True) if generates != can_generate[0]), None
    ):
        raise BadRequest(
            f"one of {checkpoints[0].path} and {odd.path} predicts tokens and the other has no head for it; name a "
            "model of the same architecture"
        )
    return can_generate[0]


@torch.no_grad()
def compare(
    checkpoints: Sequence[Checkpoint],
    windows: Int64[Tensor, "windows length"],
    dtype: torch.dtype = torch.float32,
    progress: Progress = silent,
    placement: Placement | None = None,
) -> list[dict[str, Any]]:
    """A row of measures for each checkpoint, the first being the reference."""
    slices = windows.split(windows_at_once(checkpoints[0], windows.shape[1], len(checkpoints) * dtype.itemsize))
    errors: list[list[Tensor]] = [[] for _ in checkpoints]
    cosines: list[list[Tensor]] = [[] for _ in checkpoints]
    for number, part in enumerate(slices):
        walks = [Walk(c, part, dtype, placement, fake_quantize_activations=True) for c in checkpoints]
        for index, walk in enumerate(walks):
            for at, _ in enumerate(walk):
                progress("running the models", number + (index + at / len(walk.blocks)) / len(walks), len(slices))
        for batch in zip(*(walk.ends.states() for walk in walks), strict=True):
            reference = batch[0][1].float()
            for error, cosine, (_, states) in zip(errors, cosines, batch, strict=True):
                hidden = states.float()
                error.append(((hidden - reference).norm(dim=-1) / reference.norm(dim=-1).clamp(min=1e-30)).cpu())
                cosine.append(functional.cosine_similarity(hidden, reference, dim=-1).cpu())
    return [
        _summary(torch.cat(e), torch.cat(c), reference=i == 0)
        for i, (e, c) in enumerate(zip(errors, cosines, strict=True))
    ]


def _summary(
    error: Float32[Tensor, "windows length"], cosine: Float32[Tensor, "windows length"], reference: bool
) -> dict[str, Any]:
    """Mean, tail and worst of the errors and cosines."""
    row: dict[str, Any] = {"tokens": error.numel()}
    if not reference:
        mean, unsure = mean_and_error(error)
        flat = error.flatten().sort().values
        row |= {
            "state_error": mean,
            "state_error_error": unsure,
            "state_error_p99": float(flat[int(0.99 * (len(flat) - 1))]),
            "state_error_max": float(flat[-1]),
        }
        row |= {"cosine": float(cosine.double().mean()), "cosine_min": float(cosine.min())}
    return row
