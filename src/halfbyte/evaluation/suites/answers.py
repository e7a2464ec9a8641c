"""What a model answers: greedy decoding of many prompts at a time, and the likelihood of each of some choices."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import GenerationConfig

from halfbyte.evaluation.suites import checks
from halfbyte.evaluation.suites.asking import Asked, Reading
from halfbyte.evaluation.suites.checks import CHECKS, Completion
from halfbyte.evaluation.whole import model_of
from halfbyte.models.checkpoint import Checkpoint

TOKENS_AT_ONCE = 8192
"""Of prompts and answers that are decoded side by side: what a KV cache holds at a time."""
NEAR = 1e-2
"""How far the next token's logits of a padded prompt may be from its own, as a share of how they are spread."""


@dataclass(frozen=True)
class Answer:
    """Of one prompt: what was said, or how likely each choice is."""

    tokens: tuple[int, ...] = ()
    text: str = ""
    loops: bool = False
    choice: str | None = None
    passes: bool | None = None
    """None: there is nothing right or wrong about it."""


@torch.no_grad()
def answers(
    checkpoint: Checkpoint,
    reading: Reading,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[float], None],
) -> list[Answer]:
    """One for each prompt, in their order; the whole model is in memory meanwhile."""
    model = model_of(checkpoint, dtype, device)
    asked = list(enumerate(reading.asked))
    chosen = [(n, one) for n, one in asked if one.choices]
    free = [(n, one) for n, one in asked if not one.choices]
    by_number: dict[int, Answer] = {}
    pads = _pads(model, [one for _, one in free], device)
    for batch in _batches(chosen, lambda one: sum(len(one.tokens) + len(c) for c in one.choices)):
        for (number, one), choice in zip(batch, _choices(model, [one for _, one in batch], device), strict=True):
            by_number[number] = Answer(choice=choice, text=choice, passes=choice == one.prompt.expected)
        progress(len(by_number) / len(asked))
    for batch in _batches(free, lambda one: len(one.tokens) + one.most, None if pads else lambda one: len(one.tokens)):
        continuations = _continued(model, [one for _, one in batch], reading.ends, device)
        for (number, one), tokens in zip(batch, continuations, strict=True):
            by_number[number] = _answer(one, tokens, reading)
        progress(len(by_number) / len(asked))
    return [by_number[number] for number in range(len(asked))]


def _answer(asked: Asked, tokens: list[int], reading: Reading) -> Answer:
    text, ended = reading.text(tokens), bool(tokens) and tokens[-1] in reading.ends
    loops = not ended and checks.loops(tokens)
    check, completion = CHECKS[asked.prompt.check], Completion(text, asked.before, loops)
    passes = check.passes(completion, asked.prompt.expected) if check.passes else None
    return Answer(tuple(tokens), text, loops, passes=passes)


def _batches(
    asked: Sequence[tuple[int, Asked]], size: Callable[[Asked], int], alike: Callable[[Asked], int] | None = None
) -> Iterator[list[tuple[int, Asked]]]:
    """Prompts of about one length, so many at a time as there is room for; `alike`: of what is the same in each."""
    batch: list[tuple[int, Asked]] = []
    for number, one in sorted(asked, key=lambda pair: (pair[1].most, len(pair[1].tokens))):
        largest = max((size(other) for _, other in batch), default=0)
        full = (len(batch) + 1) * max(largest, size(one)) > TOKENS_AT_ONCE
        if batch and (full or (alike and alike(one) != alike(batch[0][1]))):
            yield batch
            batch = []
        batch.append((number, one))
    if batch:
        yield batch


def _padded(rows: Sequence[Sequence[int]], device: torch.device, left: bool) -> tuple[Tensor, Tensor]:
    """Tokens of one length, and which of them count."""
    longest = max(map(len, rows))
    tokens, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for row, padded, counts in zip(rows, tokens, mask, strict=True):
        part = slice(longest - len(row), None) if left else slice(len(row))
        padded[part], counts[part] = torch.tensor(row), 1
    return tokens.to(device), mask.to(device)


def _pads(model: Any, asked: Sequence[Asked], device: torch.device) -> bool:
    """Whether a prompt before which there is padding is answered as it is without: of some recurrent models, and of
    activations that share one scale, it is not."""
    rows = sorted((one.tokens for one in asked), key=len)
    if not rows or len(rows[0]) == len(rows[-1]):
        return True
    padded = _first(model, [rows[0], rows[-1]], device)[0]
    alone = _first(model, [rows[0]], device)[0]
    return bool((padded - alone).abs().max() <= NEAR * alone.std())


def _first(model: Any, rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """What generation would choose the next token by."""
    tokens, mask = _padded(rows, device, left=True)
    made = model.generate(tokens, attention_mask=mask, generation_config=_greedy(1, set(), scores=True))
    return made.logits[0].float()


def _greedy(most: int, ends: set[int], scores: bool = False) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=most,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
        use_cache=True,
        output_logits=scores,
        return_dict_in_generate=scores,
    )


def _continued(model: Any, batch: Sequence[Asked], ends: set[int], device: torch.device) -> list[list[int]]:
    """Tokens of each answer, with the one that ends it."""
    tokens, mask = _padded([one.tokens for one in batch], device, left=True)
    most = max(one.most for one in batch)
    made = model.generate(tokens, attention_mask=mask, generation_config=_greedy(most, ends))
    continuations = []
    for one, row in zip(batch, made[:, tokens.shape[1] :].tolist(), strict=True):
        end = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
        continuations.append(row[: min(end, one.most)])
    return continuations


def _choices(model: Any, batch: Sequence[Asked], device: torch.device) -> list[str]:
    """The most likely choice of each: by the sum of its tokens' log-probabilities."""
    rows = [[*one.tokens, *choice] for one in batch for choice in one.choices]
    tokens, _ = _padded(rows, device, left=False)  # which tokens after the last that counts do not change
    first = min(len(one.tokens) for one in batch) - 1
    logits = _logits(model, tokens, tokens.shape[1] - first)
    chosen, row = [], 0
    for one in batch:
        start, likely = len(one.tokens) - 1 - first, []
        for choice in one.choices:
            log_probs = logits[row, start : start + len(choice)].float().log_softmax(-1)
            likely.append(float(log_probs.gather(-1, torch.tensor(choice, device=log_probs.device)[:, None]).sum()))
            row += 1
        chosen.append(one.prompt.choices[max(range(len(likely)), key=likely.__getitem__)])
    return chosen


def _logits(model: Any, tokens: Int64[Tensor, "rows length"], last: int) -> Tensor:
    """Of so many positions at the end."""
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    logits = model(tokens, use_cache=False, **({"logits_to_keep": last} if keeps else {})).logits
    return logits[:, -last:]
