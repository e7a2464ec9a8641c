"""Models side by side on the same tokens: perplexity, KL divergence from the first, top-1 agreement.

All models walk through the text together, a slice of windows at a time, and their logits meet batch by batch: memory holds
hidden states and one batch of logits for each, however long the text is. Per token a few numbers are kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.walk import Walk

HIDDEN_BYTES = 256e6
"""Hidden states kept at once for each model; a longer text is walked in slices."""


@dataclass
class Tokens:
    """Per scored token, [windows, positions]: what is known of one model."""

    nll: Tensor
    kl: Tensor
    same_top: Tensor
    change: Tensor
    """Of the probability of the token that came next."""


@torch.no_grad()
def compare(
    checkpoints: Sequence[Checkpoint],
    windows: Int64[Tensor, "windows length"],
    first: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[str, float, float], None] = lambda *_: None,
) -> list[dict[str, Any]]:
    """A row of measures for each checkpoint, the first being the reference; rows after the second are also compared with the second, pair by pair.

    `first`: the first position of each window whose prediction is scored.
    """
    per_token = measure(checkpoints, windows, first, dtype, progress)
    rows = [summary(t, reference=i == 0) for i, t in enumerate(per_token)]
    for row, tokens in list(zip(rows, per_token, strict=True))[2:]:
        row["kl_minus_first"] = mean_and_error(tokens.kl - per_token[1].kl)
        row["nll_minus_first"] = mean_and_error(tokens.nll - per_token[1].nll)
    return rows


def measure(checkpoints: Sequence[Checkpoint], windows: Tensor, first: int, dtype: torch.dtype, progress: Callable) -> list[Tokens]:
    width = checkpoints[0].text_config.get("hidden_size") or checkpoints[0].text_config.get("n_embd") or 4096
    at_once = max(1, int(HIDDEN_BYTES / (windows.shape[1] * width * dtype.itemsize)))
    parts: list[list[Tokens]] = [[] for _ in checkpoints]
    slices = windows.split(at_once)
    for number, part in enumerate(slices):
        walks = [Walk(c, part, dtype, as_served=True) for c in checkpoints]
        for index, walk in enumerate(walks):
            walk.start()
            for block in walk.blocks:
                done = (index + block_share(walk, block)) / len(walks)
                progress("running the models", number + done, len(slices))
                block.load(walk.checkpoint)
                walk.advance(block)
                block.free()
        for batch in zip(*(walk.logits() for walk in walks), strict=True):
            tokens = batch[0][0]
            reference = _log_probabilities(batch[0][1], first)
            for collected, (_, logits) in zip(parts, batch, strict=True):
                collected.append(_score(reference, _log_probabilities(logits, first), tokens[:, first + 1 :]))
    return [Tokens(*(torch.cat([getattr(t, name) for t in part]) for name in ("nll", "kl", "same_top", "change"))) for part in parts]


def block_share(walk: Walk, block) -> float:
    return walk.blocks.index(block) / len(walk.blocks)


def _log_probabilities(logits: Tensor, first: int) -> Float32[Tensor, "batch positions vocabulary"]:
    return logits[:, first:-1].float().log_softmax(-1)


def _score(reference: Tensor, own: Tensor, following: Tensor) -> Tokens:
    following = following[..., None].to(own.device)
    chosen, was = own.gather(-1, following)[..., 0], reference.gather(-1, following)[..., 0]
    kl = (reference.exp() * (reference - own)).sum(-1).clamp(min=0)
    return Tokens(-chosen, kl, (own.argmax(-1) == reference.argmax(-1)).float(), chosen.exp() - was.exp())


def summary(tokens: Tokens, reference: bool) -> dict[str, Any]:
    nll, nll_error = mean_and_error(tokens.nll)
    perplexity = float(torch.tensor(nll).exp())
    row = {"tokens": tokens.nll.numel(), "nll": nll, "perplexity": perplexity, "perplexity_error": nll_error and perplexity * nll_error}
    if not reference:
        kl, kl_error = mean_and_error(tokens.kl)
        flat = tokens.kl.flatten().double().sort().values
        top, top_error = mean_and_error(tokens.same_top)
        row |= {
            "kl": kl, "kl_error": kl_error,
            "kl_median": _quantile(flat, 0.5), "kl_p99": _quantile(flat, 0.99), "kl_max": float(flat[-1]),
            "same_top": top, "same_top_error": top_error,
            "probability_change": float(tokens.change.double().mean()), "probability_change_rms": float(tokens.change.double().square().mean().sqrt()),
        }  # fmt: skip
    return row


def mean_and_error(values: Float32[Tensor, "windows positions"]) -> tuple[float, float | None]:
    """Mean and its standard error, which nobody knows of one token. Tokens of one window hang together, so windows are what is counted."""
    values = values.double()
    units = values.mean(1) if values.shape[0] > 1 else values.flatten()
    return float(values.mean()), float(units.std() / len(units) ** 0.5) if len(units) > 1 else None


def _quantile(sorted_values: Tensor, share: float) -> float:
    return float(sorted_values[min(int(share * len(sorted_values)), len(sorted_values) - 1)])
