"""Models side by side on the same tokens: perplexity, KL divergence from the first, top-1 agreement.

All models walk through the text together, a slice of windows at a time, and their logits meet batch by batch: memory
holds hidden states and the logits of a few positions, however long the text is and however many words the models know:
1 GB in all, beside a block or two heads. Per token a few numbers are kept.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from halfbyte.evaluation.classes import CLASSES
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.ends import Ends
from halfbyte.models.placement import Placement
from halfbyte.models.walk import Walk
from halfbyte.progress import Progress, silent

HIDDEN_BYTES = 512e6
"""Hidden states of all models kept at once; a longer text is walked in slices."""
LOGITS_BYTES, COPIES = 512e6, 4
"""Predictions in memory, and how many of one size there are at a time: the original's twice, and a model's as logits
and as logarithms, or as these and as probabilities."""
STRETCHES = 16
"""Parts of a window of which the divergence is told apart."""


@dataclass
class Tokens:
    """Per scored token, [windows, positions]: what is known of one model."""

    nll: Tensor
    kl: Tensor
    """From the original to this model: what is lost where the original is right."""
    reverse_kl: Tensor
    """From this model to the original: what this one says that the original would not."""
    same_top: Tensor
    change: Tensor
    """Of the probability of the token that came next."""

    def cpu(self) -> "Tokens":
        """The same in the CPU's memory."""
        return Tokens(*(getattr(self, field.name).cpu() for field in fields(self)))


@torch.no_grad()
def compare(
    checkpoints: Sequence[Checkpoint],
    windows: Int64[Tensor, "windows length"],
    first_scored: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: Progress = silent,
    placement: Placement | None = None,
    noise_floor: bool = False,
    classes: Int64[Tensor, "windows length"] | None = None,
) -> list[dict[str, Any]]:
    """A row of measures for each checkpoint, the first being the reference; rows after the second are also compared
    with the second, pair by pair. With `noise_floor`, one more row at the end: the reference computed in bfloat16.

    `first_scored`: the first position of each window whose prediction is scored. `classes`: the kind of each token, as
    `halfbyte.evaluation.classes` has them.
    """
    runs = [(checkpoint, dtype) for checkpoint in checkpoints]
    runs += [(checkpoints[0], torch.bfloat16)] if noise_floor else []
    per_token = _measure(runs, windows, first_scored, progress, placement)
    rows = [_summary(t, first_scored, reference=i == 0) for i, t in enumerate(per_token)]
    for row, tokens in list(zip(rows, per_token, strict=True))[1:]:
        difference, error = mean_and_error(tokens.nll - per_token[0].nll)
        row["nll_minus_reference"] = difference, error
        row["perplexity_minus_reference"] = (
            row["perplexity"] - rows[0]["perplexity"],
            error and row["perplexity"] * error,
        )
        if classes is not None:
            row["kl_by_class"] = by_class(tokens.kl, classes[:, first_scored + 1 :])
    for row, tokens in list(zip(rows, per_token, strict=True))[2:]:
        row["kl_minus_first"] = mean_and_error(tokens.kl - per_token[1].kl)
        row["nll_minus_first"] = mean_and_error(tokens.nll - per_token[1].nll)
    return rows


def _measure(
    runs: Sequence[tuple[Checkpoint, torch.dtype]],
    windows: Tensor,
    first_scored: int,
    progress: Progress,
    placement: Placement | None,
) -> list[Tokens]:
    at_once = windows_at_once(runs[0][0], windows.shape[1], sum(dtype.itemsize for _, dtype in runs))
    parts: list[list[Tokens]] = [[] for _ in runs]
    slices = windows.split(at_once)
    for number, part in enumerate(slices):
        walks = [Walk(c, part, dtype, placement, fake_quantize_activations=True) for c, dtype in runs]
        for index, walk in enumerate(walks):
            for at, _ in enumerate(walk):
                progress("running the models", number + (index + at / len(walk.blocks)) / len(walks), len(slices))
            walk.ends.finish()
        progress("comparing predictions", number + 1, len(slices))
        for collected, tokens in zip(parts, scores([walk.ends for walk in walks], first_scored), strict=True):
            collected.append(tokens)
    return [joined(part) for part in parts]


def windows_at_once(checkpoint: Checkpoint, length: int, itemsize: int) -> int:
    """How many windows run side by side, if one number of a hidden state takes so many bytes in all the models."""
    width = checkpoint.text_config.get("hidden_size") or checkpoint.text_config.get("n_embd") or 4096
    return max(1, int(HIDDEN_BYTES / (length * width * itemsize)))


def scores(ends: Sequence[Ends], first_scored: int) -> list[Tokens]:
    """Of every finished pass against the first. Those with one head are compared in one go: two heads are in memory at
    most."""
    groups: list[list[int]] = []
    for number, candidate in enumerate(ends):
        if group := next((g for g in groups if candidate.same_head(ends[g[0]])), None):
            group.append(number)
        else:
            groups.append([number])
    results: dict[int, Tokens] = {}
    for group in groups:
        alike = [ends[number] for number in group]
        compared = _compared(ends[0], alike if group[0] else alike[1:], group[0] == 0, first_scored)
        results |= dict(zip([0, *group] if group[0] else group, compared, strict=True))
    return [results[number] for number in range(len(ends))]


def _compared(reference: Ends, others: Sequence[Ends], share_its_head: bool, first_scored: int) -> list[Tokens]:
    """Of the reference, and of others that have one head, which may be the reference's."""
    parts: list[list[Tokens]] = [[] for _ in (reference, *others)]
    with ExitStack() as heads:
        reference_logits = heads.enter_context(reference.head())
        leader = reference if share_its_head else None
        other_logits = []
        for other in others:
            other_logits.append(heads.enter_context(other.head(leader)))
            leader = leader or other
        for batch in range(1, len(reference.walk.batches)):
            tokens = reference.walk.batches[batch]
            rows: list[list[Tokens]] = [[] for _ in parts]
            for positions in _positions(reference, tokens.shape, first_scored):
                following = tokens[:, positions.start + 1 : positions.stop + 1]
                original = _Original(_log_probs(reference_logits(batch, positions)), following)
                rows[0].append(original.of_itself())
                for collected, logits in zip(rows[1:], other_logits, strict=True):
                    collected.append(original.against(_log_probs(logits(batch, positions))))
            for collected, row in zip(parts, rows, strict=True):
                collected.append(joined(row, dim=1).cpu())
    return [joined(part) for part in parts]


def _positions(ends: Ends, shape: Sequence[int], first_scored: int) -> Iterator[slice]:
    """The scored positions of a batch, few enough at a time for the logits' share of the memory."""
    vocab_size = ends.model.config.get_text_config(decoder=True).vocab_size
    step = max(1, int(LOGITS_BYTES / (COPIES * 4 * vocab_size * shape[0])))
    last = shape[1] - 1
    return (slice(start, min(start + step, last)) for start in range(first_scored, last, step))


def joined(parts: Sequence[Tokens], dim: int = 0) -> Tokens:
    """Along windows, or positions (1)."""
    return Tokens(*(torch.cat([getattr(part, field.name) for part in parts], dim) for field in fields(Tokens)))


def _log_probs(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


class _Original:
    """What the first model says at some positions, looked at once for all the others: each of these looks takes as long
    as a model's head."""

    def __init__(self, log_probs: Tensor, following: Tensor):
        """Logarithms of probabilities, and the tokens that came next."""
        self.log_probs, self.probabilities = log_probs, log_probs.exp()
        self.following = following[..., None].to(log_probs.device)
        self.chosen = self._chosen(log_probs)
        self.top = log_probs.argmax(-1, keepdim=True)

    def _chosen(self, log_probs: Tensor) -> Tensor:
        return log_probs.gather(-1, self.following)[..., 0]

    def of_itself(self) -> Tokens:
        zeros = torch.zeros_like(self.chosen)
        return Tokens(-self.chosen, zeros, zeros, torch.ones_like(zeros), zeros)

    def against(self, log_probs: Tensor) -> Tokens:
        """Another model at these positions. `log_probs` is spent: what is large here is the vocabulary, and fresh
        memory takes longer than the sums."""
        chosen = self._chosen(log_probs)
        same_top = (log_probs.argmax(-1, keepdim=True) == self.top)[..., 0].float()
        probabilities = log_probs.exp()
        apart = log_probs.sub_(self.log_probs)
        reverse_kl = probabilities.mul_(apart).sum(-1).clamp_(min=0)
        kl = apart.mul_(self.probabilities).sum(-1).neg_().clamp_(min=0)
        return Tokens(-chosen, kl, reverse_kl, same_top, chosen.exp() - self.chosen.exp())


def _summary(tokens: Tokens, first_scored: int, reference: bool) -> dict[str, Any]:
    nll, nll_error = mean_and_error(tokens.nll)
    perplexity = float(torch.tensor(nll).exp())
    row = {
        "tokens": tokens.nll.numel(),
        "nll": nll,
        "perplexity": perplexity,
        "perplexity_error": nll_error and perplexity * nll_error,
    }
    if not reference:
        kl, kl_error = mean_and_error(tokens.kl)
        flat = tokens.kl.flatten().double().sort().values
        top, top_error = mean_and_error(tokens.same_top)
        row |= {
            "kl": kl, "kl_error": kl_error, "reverse_kl": mean_and_error(tokens.reverse_kl),
            "kl_median": _quantile(flat, 0.5), "kl_p99": _quantile(flat, 0.99), "kl_max": float(flat[-1]),
            "kl_by_position": by_position(tokens.kl, first_scored),
            "same_top": top, "same_top_error": top_error,
            "probability_change": float(tokens.change.double().mean()),
            "probability_change_rms": float(tokens.change.double().square().mean().sqrt()),
        }  # fmt: skip
    return row


def by_position(values: Float32[Tensor, "windows positions"], first_scored: int) -> list[dict[str, Any]]:
    """The mean and its error in some stretches of the windows, whose first scored position is `first_scored`."""
    stretches, rows, start = values.tensor_split(min(STRETCHES, values.shape[1]), dim=1), [], first_scored
    for stretch in stretches:
        mean, error = mean_and_error(stretch)
        rows.append({"first": start, "last": start + stretch.shape[1] - 1, "kl": mean, "kl_error": error})
        start += stretch.shape[1]
    return rows


def by_class(
    values: Float32[Tensor, "windows positions"], classes: Int64[Tensor, "windows positions"]
) -> list[dict[str, Any]]:
    """The mean where a token of each class comes next, and its standard error: over windows, of which those without
    such a token tell nothing."""
    rows = []
    for number, name in enumerate(CLASSES):
        is_one = classes == number
        counts = is_one.sum(1)
        if counts.any():
            sums = (values.double() * is_one).sum(1)
            means = (sums / counts.clamp(min=1))[counts > 0]
            error = float(means.std() / len(means) ** 0.5) if len(means) > 1 else None
            kl = float(sums.sum() / counts.sum())
            rows.append({"name": name, "tokens": int(counts.sum()), "kl": kl, "kl_error": error})
    return rows


def mean_and_error(values: Float32[Tensor, "windows positions"]) -> tuple[float, float | None]:
    """Mean and its standard error, which nobody knows of one token. Tokens of one window hang together, so windows are
    what is counted."""
    values = values.double()
    observations = values.mean(1) if values.shape[0] > 1 else values.flatten()
    return float(values.mean()), float(observations.std() / len(observations) ** 0.5) if len(observations) > 1 else None


def _quantile(sorted_values: Tensor, share: float) -> float:
    return float(sorted_values[min(int(share * len(sorted_values)), len(sorted_values) - 1)])
