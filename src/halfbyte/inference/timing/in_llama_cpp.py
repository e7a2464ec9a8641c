"""llama.cpp through its own binding, llama-cpp-python."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as binding

from halfbyte.devices import KINDS
from halfbyte.errors import Unsupported
from halfbyte.inference.timing.load import Load, Seconds

api: Any = binding
"""Functions of C, whose pointers may all be null."""
AT_ONCE = 2048
"""Tokens that it is given at a time; it computes 512 of them at a time."""
ALL_LAYERS = 999
"""More than any model has: to put all of them on a GPU."""


class Place(NamedTuple):
    """A token, where it stands, and whether what follows it is asked for."""

    token: int
    position: int
    sequence: int
    is_asked: bool


class InLlamaCpp:
    """A GGUF, loaded once and timed as often as is asked."""

    def open(self, path: str, threads: int, device: str, vocabulary: int, laid_out_anew: bool = True) -> dict[str, Any]:
        """`laid_out_anew`: whether it may lay weights out as its fastest kernels want them."""
        self._threads, self._vocabulary, self._contexts = threads, vocabulary, {}
        settings = api.llama_model_default_params()
        settings.use_extra_bufts = laid_out_anew
        settings.n_gpu_layers = 0 if KINDS.get(device.partition(":")[0], KINDS["cpu"]).is_host else ALL_LAYERS
        started = time.perf_counter()
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(path.encode(), settings)
        if not self._model:
            raise Unsupported(f"llama.cpp (llama-cpp-python {llama_cpp.__version__}) does not load {Path(path).name}")
        self._words = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        seconds = time.perf_counter() - started
        return {"load_seconds": seconds, "version": f"llama-cpp-python {llama_cpp.__version__}"}

    def run(self, batch: int, prompt: int, tokens: int) -> Seconds:
        """Greedy decoding, whatever the tokens are."""
        load = Load(batch, prompt, tokens)
        context = self._contexts.get(load) or self._contexts.setdefault(load, self._context(load))
        api.llama_memory_clear(api.llama_get_memory(context), True)
        prompts = enumerate(load.prompts(min(self._vocabulary, self._words)))
        places = [Place(token, at, s, at == prompt - 1) for s, ids in prompts for at, token in enumerate(ids)]
        parts = [places[at : at + AT_ONCE] for at in range(0, len(places), AT_ONCE)]
        with ExitStack() as batches:
            filled = [(batches.enter_context(_batch(part)), part) for part in parts]
            began = time.perf_counter()
            chosen = [token for part in filled for token in self._read(context, *part)]
            first = time.perf_counter()
        for at in range(prompt, prompt + tokens):
            step = [Place(token, at, s, True) for s, token in enumerate(chosen)]
            with _batch(step) as filled:
                chosen = self._read(context, filled, step)
        return Seconds(first - began, time.perf_counter() - first)

    def device_bytes(self) -> int | None:
        """The most of a GPU's memory, which it does not say."""
        return None

    def _context(self, load: Load) -> Any:
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = load.length * load.batch, load.batch
        settings.n_batch = AT_ONCE
        settings.n_threads = settings.n_threads_batch = self._threads
        context = api.llama_init_from_model(self._model, settings)
        if not context:
            raise Unsupported(f"llama.cpp has no context of {load.length} tokens for {load.batch} sequences")
        return context

    def _read(self, context: Any, batch: Any, places: Sequence[Place]) -> list[int]:
        """The likeliest token after each place where it is asked for."""
        if status := api.llama_decode(context, batch):
            raise Unsupported(f"llama.cpp stops at {len(places)} tokens (llama_decode: {status})")
        rows = (api.llama_get_logits_ith(context, i) for i, place in enumerate(places) if place.is_asked)
        return [int(np.ctypeslib.as_array(row, (self._words,)).argmax()) for row in rows]


@contextmanager
def _batch(places: Sequence[Place]) -> Iterator[Any]:
    """As llama.cpp takes them."""
    batch = api.llama_batch_init(len(places), 0, 1)
    batch.n_tokens = len(places)
    for i, place in enumerate(places):
        batch.token[i], batch.pos[i], batch.logits[i] = place.token, place.position, place.is_asked
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, place.sequence
    try:
        yield batch
    finally:
        api.llama_batch_free(batch)
