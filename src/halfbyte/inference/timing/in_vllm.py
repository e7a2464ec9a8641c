"""vLLM through its offline API (docs.vllm.ai, "Offline inference"): read there, and not run here."""

import time
from typing import Any

import vllm  # pyright: ignore[reportMissingImports]

from halfbyte.devices import device_named, kind_of
from halfbyte.inference.timing.load import Load, Seconds


class InVllm:
    """A folder, loaded once and timed as often as is asked."""

    def open(
        self, path: str, threads: int, device: str, vocabulary: int, sequences: int = 1, length: int = 1024
    ) -> dict[str, Any]:
        """Threads are its own affair."""
        self._vocabulary, self._device = vocabulary, device
        started = time.perf_counter()
        self._engine = vllm.LLM(
            path, max_model_len=length, max_num_seqs=sequences, enable_prefix_caching=False, skip_tokenizer_init=True
        )
        seconds = time.perf_counter() - started
        return {"load_seconds": seconds, "version": vllm.__version__}

    def run(self, batch: int, prompt: int, tokens: int) -> Seconds:
        """The time of one token, and how much longer more of them take: vLLM returns when all are there."""
        load = Load(batch, prompt, tokens)
        first = self._seconds(load, 1)
        return Seconds(first, self._seconds(load, 1 + tokens) - first)

    def device_bytes(self) -> int | None:
        """The most of a GPU's memory, of which it takes 90 % for its cache whatever the model."""
        device = device_named(self._device)
        kind = kind_of(device)
        return None if kind.is_host else kind.peak_bytes(device)

    def _seconds(self, load: Load, tokens: int) -> float:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": ids} for ids in load.prompts(self._vocabulary)]
        began = time.perf_counter()
        self._engine.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - began
