"""What each engine takes of a device's memory beside weights and cache, as published loads have it."""

from dataclasses import dataclass
from typing import Literal

from halfbyte.sizing.cache import TYPES, CacheType, ModelConfig, Paging
from halfbyte.sizing.devices import GIB, Device

LARGE = 70 * GIB
"""Memory of a card from which on vLLM takes more sequences at a time (vllm/engine/arg_utils.py get_batch_defaults)."""
LOGIT_BYTES = 14.55
"""Of a sequence's token of the vocabulary while vLLM samples: fitted to 27 loads of vLLM 0.19 (tests/sizing)."""
UBATCH = 512
"""Tokens that llama.cpp computes at a time."""


def chosen_experts(s: ModelConfig) -> int:
    """Experts of a layer that a token runs through; 0 where there are none."""
    return s.number("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk")


@dataclass(frozen=True)
class Accounting:
    """An engine's habits."""

    kind: Literal["served", "ggml", "eager"]
    """How it computes: batches of many requests; a graph that is laid out before; module after module."""
    share: float
    """Of a device's memory that it may take."""
    outside: int
    """Bytes of a card that libraries and drivers take."""
    outside_many: int
    """... and where several cards talk to each other."""
    types: tuple[str, ...]
    """Of caches."""
    source: str

    def tokens(self, memory: int) -> int:
        """That are computed at a time."""
        return {"served": 8192 if memory >= LARGE else 2048, "ggml": UBATCH, "eager": 0}[self.kind]

    def paging(self, memory: int) -> Paging:
        """How it sets tokens aside on a device of so much memory."""
        if self.kind == "served":
            return Paging(block=16, ahead=self.tokens(memory), grouped=True)
        return Paging(block=256, ahead=UBATCH) if self.kind == "ggml" else Paging()

    def activations(self, s: ModelConfig, memory: int, cards: int, context: int, batch: int) -> int:
        """Bytes of a card for what is computed and not kept."""
        vocabulary = s.number("vocab_size")
        if self.kind == "ggml":
            return UBATCH * (vocabulary + s.hidden) * 4 + context * batch * UBATCH * 2
        tokens = self.tokens(memory) or context * batch
        body = tokens * (3 * self._width(s) / cards + 4 * s.hidden) * 2
        sequences = 1024 if memory >= LARGE else 256
        head = batch * vocabulary * 6 if self.kind == "eager" else sequences * vocabulary * LOGIT_BYTES
        return int(max(body, head + tokens * s.hidden * 2) + self._experts(s, tokens, cards))

    def _width(self, s: ModelConfig) -> int:
        """Of what every token's MLP computes; a mixture's is counted apart."""
        return 0 if chosen_experts(s) else s.number("intermediate_size", "n_inner", "ffn_dim") or 4 * s.hidden

    def _experts(self, s: ModelConfig, tokens: int, cards: int) -> float:
        """What each token's experts compute, which lies side by side."""
        width = s.number("moe_intermediate_size") or s.number("intermediate_size")
        return tokens * chosen_experts(s) * (3 * width / cards + s.hidden) * 2

    def beside(self, device: Device, cards: int) -> int:
        """Bytes of a card that libraries and drivers take: of a device of its own memory."""
        if device.vendor not in ("nvidia", "amd", "intel", "unknown") or device.unified:
            return 0
        return self.outside if cards == 1 else self.outside_many


VLLM_LOADS = "27 loads of vLLM 0.19 on H100 (jgchn/llm-d-planner, accuracy/results/v0.19.0); 0.9 is its default share"
SERVED = Accounting("served", 0.9, GIB // 4, int(2.1 * GIB), tuple(TYPES)[:5], VLLM_LOADS)
GGML = Accounting(
    "ggml",
    1.0,
    451 << 20,
    456 << 20,
    ("16 bits", "q8_0", "q4_0"),
    "llama.cpp: src/llama-kv-cache-iswa.cpp, src/llama-context.cpp; ggml-org/llama.cpp pull request 15860 (451 MiB)",
)
EAGER = Accounting("eager", 1.0, GIB // 2, GIB // 2, ("16 bits",), "PyTorch: half a GiB for CUDA; not checked")
ACCOUNTINGS = {
    "vllm": SERVED,
    "sglang": Accounting(
        "served", 0.88, GIB // 4, int(2.1 * GIB), ("16 bits", "fp8"), "as vLLM, which is not checked for SGLang"
    ),
    "transformers": EAGER,
    "llama.cpp": GGML,
    "ollama": GGML,
    "lm-studio": GGML,
    "jan": GGML,
    "mlx": EAGER,
}


def accounting_of(engine: str) -> Accounting:
    """Of an engine that plans are made for."""
    return ACCOUNTINGS[engine]


def cache_types(engine: str) -> tuple[CacheType, ...]:
    """That an engine can be told to use."""
    return tuple(TYPES[name] for name in ACCOUNTINGS[engine].types)
