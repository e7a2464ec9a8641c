"""A fact planted in a long text: is it still read back from far away? What a rounded KV cache loses first.

Somewhere in a text of a given length stands a sentence such as "The password of the old lighthouse keeper is Tobias
Marlow 4182.", and the text ends in "The password of the old lighthouse keeper is". The score is the log-probability of
the answer, per token, minus that after the same text without the sentence: what the model gained by reading it. So a
model too small to answer questions is measured too, as soon as it copies (Kamradt's needle in a haystack asks for the
answer in words).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from halfbyte.errors import BadRequest
from halfbyte.models import calibrate
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.placement import Placement
from halfbyte.models.walk import Walk
from halfbyte.progress import Progress, silent

CUES = (
    "The password of the old lighthouse keeper is",
    "The captain of the ship that never came home was",
    "The letter in the drawer was written by",
    "The box under the stairs belongs to",
)
FIRST = ("Tobias", "Harriet", "Silas", "Matilda", "Ambrose", "Cordelia", "Jasper", "Winifred")
LAST = ("Marlow", "Pennington", "Thorne", "Ashby", "Calloway", "Whitlock", "Graves", "Underhill")


@dataclass(frozen=True)
class Planted:
    """Texts of one length; each ends in an answer."""

    tokens: Int64[Tensor, "texts length"]
    answers: list[int]
    """Tokens of the answer at the end of each."""
    depths: list[float | None]
    """Where in the text the fact stands: 0 at its beginning, 1 right before the question; None: nowhere."""
    facts: list[int]
    """Which fact it is."""


def plant(checkpoint: Checkpoint, text: str, length: int, depths: Sequence[float], facts: int, seed: int) -> Planted:
    """Every fact at every depth and nowhere, in a text of its own. Raises BadRequest where a text of this length does
    not hold a fact."""
    tokenizer = calibrate.tokenizer_of(checkpoint)
    first, stream = calibrate.opening(tokenizer), calibrate.read(checkpoint, tokenizer, text, length).tokens.tolist()

    def encode(string: str) -> list[int]:
        return tokenizer(string, add_special_tokens=False)["input_ids"]

    draw = random.Random(seed)
    tokens, answers, where, which = [], [], [], []
    for fact in range(facts):
        cue = CUES[fact % len(CUES)]
        answer = f"{cue} {draw.choice(FIRST)} {draw.choice(LAST)} {draw.randint(1000, 9999)}"
        asked, whole = encode(f"\n\n{cue}"), encode(f"\n\n{answer}")
        fact_tokens = encode(f"\n\n{answer}.\n\n")
        size = len(whole) - next(i for i, (a, b) in enumerate(zip([*asked, -1], whole, strict=False)) if a != b)
        room = length - len(first) - len(whole)
        if room < 2 * len(fact_tokens):
            raise BadRequest(
                f"{length} tokens hold no text around a fact of {len(fact_tokens)} and its question of {len(whole)}; "
                "give a larger --length"
            )
        start = draw.randrange(max(1, len(stream) - length))
        hay = stream[start : start + room]
        for depth in (None, *depths):
            at = round((depth or 0) * (room - len(fact_tokens)))
            middle = hay if depth is None else [*hay[:at], *fact_tokens, *hay[at : room - len(fact_tokens)]]
            tokens.append([*first, *middle, *whole])
            answers.append(size)
            where.append(depth)
            which.append(fact)
    return Planted(torch.tensor(tokens), answers, where, which)


@torch.no_grad()
def score(
    checkpoint: Checkpoint,
    planted: Planted,
    dtype: torch.dtype = torch.float32,
    placement: Placement | None = None,
):
    """Log-probability of each answer per token, and whether every token of it is the most likely one: [texts],
    [texts]."""
    walk = Walk(checkpoint, planted.tokens, dtype, placement, fake_quantize_activations=True)
    for _ in walk:
        pass  # it runs as it is
    walk.ends.finish()
    likely, found = [], []
    sizes, last, longest = iter(planted.answers), planted.tokens.shape[1] - 1, max(planted.answers)
    with walk.ends.head() as predict:
        for number, tokens in list(enumerate(walk.batches))[1:]:
            for row, row_logits in zip(tokens, predict(number, slice(last - longest, last)), strict=True):
                size = next(sizes)
                answer, log_probs = row[-size:].to(row_logits.device), row_logits[-size:].float().log_softmax(-1)
                likely.append(log_probs.gather(-1, answer[:, None]).mean())
                found.append((log_probs.argmax(-1) == answer).all())
    return torch.stack(likely).cpu(), torch.stack(found).float().cpu()


def grid(planted: Planted, likely: Tensor, found: Tensor) -> list[dict[str, float]]:
    """For every depth, the mean over facts: `gain` in nats per token, `found` the share of answers that greedy decoding
    gives."""
    nowhere = {
        fact: i for i, (fact, depth) in enumerate(zip(planted.facts, planted.depths, strict=True)) if depth is None
    }
    rows = []
    for depth in dict.fromkeys(d for d in planted.depths if d is not None):
        here = [i for i, d in enumerate(planted.depths) if d == depth]
        gains = torch.stack([likely[i] - likely[nowhere[planted.facts[i]]] for i in here])
        rows.append({"depth": depth, "gain": float(gains.mean()), "found": float(found[here].mean())})
    return rows


def measure(
    checkpoints: Sequence[Checkpoint],
    text: str,
    lengths: Sequence[int],
    depths: int,
    facts: int,
    seed: int,
    progress: Progress = silent,
    placement: Placement | None = None,
) -> list[list[dict[str, Any]]]:
    """For every checkpoint, a row for every length and depth: `length`, `depth`, `gain`, `found`. All read the same
    texts."""
    places = [i / (depths - 1) for i in range(depths)] if depths > 1 else [0.5]
    results: list[list[dict[str, Any]]] = [[] for _ in checkpoints]
    for number, length in enumerate(lengths):
        planted = plant(checkpoints[0], text, length, places, facts, seed)
        for rows, checkpoint in zip(results, checkpoints, strict=True):
            progress(f"{length} tokens", number, len(lengths))
            rows += [
                {"length": length, **row} for row in grid(planted, *score(checkpoint, planted, placement=placement))
            ]
    return results
