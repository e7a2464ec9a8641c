"""A model of Transformers, as `halfbyte.load` gives it and `chat`, `run` and `serve` use it."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

from halfbyte import nn
from halfbyte.devices import device_named, kind_of, wait
from halfbyte.inference.generation import Forward
from halfbyte.inference.timing.load import Load, Seconds
from halfbyte.kernels.cpu.panels import arithmetic, target
from halfbyte.kernels.panels import Activations
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.multiplying import PanelLinear, ready_to_answer
from halfbyte.packed import PackedModule, QuantLinear

STEPS = 8
"""Of decoding, in which products are timed one by one."""
MULTIPLY = (torch.nn.Linear, QuantLinear, PanelLinear)


class InTransformers:
    """A checkpoint, loaded once and timed as often as is asked."""

    model: Any

    def open(
        self, path: str, threads: int, device: str, vocabulary: int, activations: Activations = "exact"
    ) -> dict[str, Any]:
        """What became of it."""
        torch.set_num_threads(threads)
        self.device, self._vocabulary = device_named(device), vocabulary
        started = time.perf_counter()
        schemes = self.load(path, activations)
        wait(self.device)
        seconds = time.perf_counter() - started
        return {
            "load_seconds": seconds,
            "version": transformers.__version__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "products": products(self.model, schemes),
        }

    def load(self, path: str, activations: Activations) -> dict[str, str]:
        """Returns what linears are stored as, where that is quantized."""
        checkpoint = Checkpoint.open(path)
        self.model = nn.built(checkpoint, None, self.device)
        ready_to_answer(self.model, checkpoint, self.device, activations)
        return nn.schemes(checkpoint)

    def run(self, batch: int, prompt: int, tokens: int) -> Seconds:
        """Greedy decoding, whatever the tokens are."""
        forward = Forward(self.model)
        ids = torch.tensor(Load(batch, prompt, tokens).prompts(self._vocabulary), device=self.device)
        began = time.perf_counter()
        cache, chosen = self._step(forward, None, ids)
        first = time.perf_counter()
        for _ in range(tokens):
            cache, chosen = self._step(forward, cache, chosen)
        return Seconds(first - began, time.perf_counter() - first)

    def device_bytes(self) -> int | None:
        """The most of a GPU's memory."""
        kind = kind_of(self.device)
        return None if kind.is_host else kind.peak_bytes(self.device)

    def share_of_products(self, batch: int, prompt: int) -> float:
        """Of the time of a step of decoding, what products take."""
        forward = Forward(self.model)
        ids = torch.tensor(Load(batch, prompt, 0).prompts(self._vocabulary), device=self.device)
        cache, chosen = self._step(forward, None, ids)
        cache, chosen = self._step(forward, cache, chosen)
        with self._timed_products() as spent:
            began = time.perf_counter()
            for _ in range(STEPS):
                cache, chosen = self._step(forward, cache, chosen)
            return sum(spent) / (time.perf_counter() - began)

    def _step(self, forward: Forward, cache: Any, ids: Tensor) -> tuple[Any, Tensor]:
        logits, cache = forward(ids, cache)
        chosen = logits.argmax(-1, keepdim=True)
        wait(self.device)
        return cache, chosen

    @contextmanager
    def _timed_products(self) -> Iterator[list[float]]:
        spent: list[float] = []
        began: list[float] = []

        def begin(*_: Any) -> None:
            wait(self.device)
            began.append(time.perf_counter())

        def end(*_: Any) -> None:
            wait(self.device)
            spent.append(time.perf_counter() - began.pop())

        with ExitStack() as hooks:
            for _, module in _multiplying(self.model):
                hooks.enter_context(module.register_forward_pre_hook(begin))
                hooks.enter_context(module.register_forward_hook(end))
            yield spent


def _multiplying(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, MULTIPLY))


def products(model: torch.nn.Module, schemes: dict[str, str]) -> list[dict[str, Any]]:
    """How linears are multiplied by, and what is stored of their weights: how many, and bytes of those in memory."""
    found: dict[tuple[str, str | None], dict[str, int]] = defaultdict(lambda: {"linears": 0, "size_bytes": 0})
    for name, module in _multiplying(model):
        row = found[_way(module, name in schemes), schemes.get(name)]
        row["linears"] += 1
        tensors = module.matrix.tensors.values() if isinstance(module, PackedModule) else [module.weight]
        row["size_bytes"] += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    return [{"way": way, "grid": grid, **row} for (way, grid), row in found.items()]


def _way(module: Any, is_quantized: bool) -> str:
    """See `report.types.Products`."""
    if isinstance(module, QuantLinear):
        return "rounded" if module.activations else "decoded"
    if not isinstance(module, PanelLinear):
        return "held" if is_quantized else "unquantized"
    here = target() if kind_of(module.like.device).is_host else None
    if here is None:
        return "packed"
    return f"packed, in {arithmetic(module.matrix.form.levels, module.dtype, module.activations, here)}"
