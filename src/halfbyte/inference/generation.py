"""An answer, token by token: one forward pass for each, with the cache that Transformers keeps."""

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float32, Int64, Shaped
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from halfbyte import devices
from halfbyte.devices import kind_of
from halfbyte.errors import BadCheckpoint, BadRequest, brief
from halfbyte.inference.model import Answering
from halfbyte.inference.sampling import Sampling
from halfbyte.inference.text import TextStream
from halfbyte.inference.types import FinishReason
from halfbyte.kernels.cpu.team import for_products_alone
from halfbyte.multiplying import multiplies_packed

CACHES = ("past_key_values", "cache_params", "state")
"""What families call the cache that they return and take."""
PLACES = {"attention_mask", "position_ids"}
"""What they call which tokens are seen, and where they stand."""
FEW, FEW_SEEN = 8, 2048
"""Tokens that one thread is enough for, but for products, and those that they see."""


class TokenLogprobs(NamedTuple):
    """How likely a token was, by the model's own prediction, and which were most likely."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """What one forward pass adds to an answer: whole characters, which may be none yet."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


class Forward:
    """A model that reads tokens after those that its cache is of, whatever its family calls the cache. That of a model
    which keeps none is the tokens themselves."""

    def __init__(self, model: Any):
        self._model, parameters = model, inspect.signature(model.forward).parameters
        self._name = next((name for name in CACHES if name in parameters), None)
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self.device: torch.device = model.get_input_embeddings().weight.device
        self._is_packed = kind_of(self.device).is_host and multiplies_packed(model)
        self.takes_places = parameters.keys() >= PLACES and self._name == CACHES[0]
        """Whether it may be told which tokens it sees, and where they stand."""

    @torch.inference_mode()
    def __call__(
        self, ids: Int64[Tensor, "batch tokens"], cache: Any = None, **places: Tensor
    ) -> tuple[Shaped[Tensor, "batch vocabulary"], Any]:
        """Logits of the token that follows these in each sequence, and the cache with them; `cache` is used up."""
        if self._name is None:
            ids = ids if cache is None else torch.cat([cache, ids], 1)
        given = places | ({self._name: cache} if self._name and cache is not None else {})
        with self._threads(ids, cache):
            output = self._model(
                input_ids=ids, use_cache=self._name is not None, return_dict=True, **given, **self._last
            )
        return output.logits[:, -1], output.get(self._name) if self._name else ids

    def _threads(self, ids: Int64[Tensor, "batch tokens"], cache: Any) -> AbstractContextManager:
        """For few tokens that see few others, of products alone."""
        layers = (layer for layer in getattr(cache, "layers", ()) if isinstance(layer, DynamicLayer))
        seen = ids.shape[1] + next((layer.get_seq_length() for layer in layers), 0)
        is_small = self._is_packed and ids.numel() <= FEW and len(ids) * seen <= FEW_SEEN
        return for_products_alone() if is_small else nullcontext()


class CachedSequence:
    """Tokens that a model has read, and its cache of them."""

    def __init__(self, model: Any):
        self.forward = Forward(model)
        self.clear()

    def clear(self) -> None:
        """Forget all of them."""
        self.tokens: list[int] = []
        self._cache: Any = None

    def keep_prefix(self, tokens: Sequence[int]) -> int:
        """Forget what these tokens do not begin with, of which one at least has to be read. Returns how many are
        left."""
        most = min(len(self.tokens), len(tokens) - 1)
        same = next((at for at in range(most) if self.tokens[at] != tokens[at]), most)
        if same < len(self.tokens) and same and self._may_shorten:
            self._cache.crop(same - len(self.tokens))
            del self.tokens[same:]
        elif same < len(self.tokens) or not self._may_go_on:
            self.clear()
        return len(self.tokens)

    @property
    def _layers(self) -> list[Any]:
        return getattr(self._cache, "layers", [None])

    @property
    def _may_go_on(self) -> bool:
        """Whether several tokens may be read after those that are cached: recurrent layers begin anew with them."""
        return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in self._layers)

    @property
    def _may_shorten(self) -> bool:
        """Whether the cache still has what was before its last tokens: windows that slid have not."""
        return self._may_go_on and all(
            type(layer) is DynamicLayer or len(self.tokens) < layer.sliding_window for layer in self._layers
        )

    @property
    def is_plain(self) -> bool:
        """Whether the cache is keys and values of all tokens, of a model that is told where they stand."""
        return bool(self.forward.takes_places and self.tokens) and all(type(of) is DynamicLayer for of in self._layers)

    def lend(self) -> tuple[list[int], Any]:
        """The tokens and their cache, for somebody who reads on. Until it is given back nothing is here, as an
        interrupted pass leaves half a cache."""
        lent = self.tokens, self._cache
        self.clear()
        return lent

    def give_back(self, tokens: list[int], cache: Any) -> None:
        """The same with what was read."""
        self.tokens, self._cache = tokens, cache

    @torch.inference_mode()
    def read(self, tokens: Sequence[int]) -> Float32[Tensor, " vocabulary"]:
        """Logits of the token that follows these, which follow those that were read."""
        before, cache = self.lend()
        logits, cache = self.forward(torch.tensor([list(tokens)], device=self.forward.device), cache)
        self.give_back([*before, *tokens], cache)
        return logits[0].float()


class Generation(Iterator[Piece]):
    """The answer to a prompt. `next` runs the model once, so several may take turns."""

    def __init__(
        self, answering: Answering, tokens: Sequence[int], sampling: Sampling, sequence: CachedSequence | None = None
    ):
        """`sequence`: what was read before, of which the prompt may be the continuation. Raises BadRequest for a prompt
        that the model cannot read."""
        _require_readable(answering, tokens)
        self._answering, self.sampling = answering, sampling
        self.sequence = sequence or CachedSequence(answering.model)
        """What was read."""
        self.reused_tokens = self.sequence.keep_prefix(tokens)
        """Of the prompt, that were in the cache."""
        self.pending = list(tokens[self.reused_tokens :])
        """What is to be read next."""
        self._text = TextStream(answering.tokenizer, tokens, sampling.stop)
        self._processors = _processors(sampling)
        device = answering.device
        self._ids = torch.tensor([list(tokens)], device=device)
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self.prompt_tokens = len(tokens)
        self.completion_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.prefill_seconds = self.decode_seconds = 0.0
        self._is_closed = False

    def __next__(self) -> Piece:
        if self.finish_reason or self._is_closed:
            raise StopIteration
        started = time.perf_counter()
        return self.take(self.sequence.read(self.pending), started)

    def take(self, logits: Float32[Tensor, " vocabulary"], started: float) -> Piece:
        """The next token, where `pending` was read for these logits since then (`time.perf_counter`)."""
        token = self._chosen(logits)
        devices.wait(self._answering.device)
        took = time.perf_counter() - started
        if self.completion_tokens:
            self.decode_seconds += took
        else:
            self.prefill_seconds = took
        self.completion_tokens += 1
        self.pending = [token]
        return Piece(self._said(token), (token,), self._logprobs(logits, token))

    def close(self) -> None:
        """End here, and free the cache, unless it is somebody else's."""
        self._is_closed = True
        self.sequence = CachedSequence(self._answering.model)

    def _said(self, token: int) -> str:
        """The text that this token completes, and whether it is the last."""
        if token in self._answering.ends:
            self.finish_reason = "stop"
            return self._text.end()
        text = self._text.add(token)
        if self._text.stopped:
            self.finish_reason = "stop"
        elif self.completion_tokens == self.sampling.max_tokens or self._is_full:
            text += self._text.end()
            self.finish_reason = "stop" if self._text.stopped else "length"
        return text

    @property
    def _is_full(self) -> bool:
        return self.prompt_tokens + self.completion_tokens >= self._answering.context

    def _chosen(self, logits: Float32[Tensor, " vocabulary"]) -> int:
        """The next token. Raises BadCheckpoint where the model computes none."""
        likeliest = logits.max(0)
        if not likeliest.values.isfinite():
            raise BadCheckpoint(
                f"{self._answering.checkpoint.path} predicts {float(likeliest.values)} after "
                f"{self.prompt_tokens + self.completion_tokens} tokens, computed in "
                f"{str(self._answering.model.dtype).removeprefix('torch.')}; --dtype float32 has the widest range"
            )
        if not self._processors:
            return int(likeliest.indices)
        scores = self._processors(self._ids, logits[None])  # pyright: ignore[reportArgumentType]
        if self.sampling.temperature == 0:
            token = scores.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
        self._ids = torch.cat([self._ids, token], 1)
        return int(token)

    def _logprobs(self, logits: Float32[Tensor, " vocabulary"], token: int) -> tuple[TokenLogprobs, ...]:
        if self.sampling.logprobs is None:
            return ()
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(min(self.sampling.logprobs, len(logprobs)))
        pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return (TokenLogprobs(token, float(logprobs[token]), pairs),)


def _processors(sampling: Sampling) -> LogitsProcessorList:
    """Of Transformers, in the order in which its `generate` has them."""
    chosen = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chosen.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature:
        chosen.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            chosen.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            chosen.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            chosen.append(MinPLogitsWarper(sampling.min_p))
    return chosen


def _require_readable(answering: Answering, tokens: Sequence[int]) -> None:
    """Raise BadRequest for a prompt of no tokens, of too many, or of some that there are not."""
    if not tokens:
        raise BadRequest("the prompt is empty; give at least one word")
    if len(tokens) >= answering.context:
        raise BadRequest(
            f"the prompt has {len(tokens)} tokens, and the context has {answering.context} with an answer; give less, "
            "or a larger --context where the model reads more"
        )
    count = answering.model.get_input_embeddings().num_embeddings
    if odd := next((token for token in tokens if not 0 <= token < count), None):
        raise BadRequest(f"the prompt has token {brief(odd)}, and the model has tokens 0 to {count - 1}")
