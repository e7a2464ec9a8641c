"""What an engine needs of each card to serve a model: weights, cache, activations and the rest."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod

from halfbyte.models import roles
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.sizing.accounting import Accounting, chosen_experts
from halfbyte.sizing.cache import CacheType, LayerCache, ModelConfig, cache_bytes
from halfbyte.sizing.devices import Device

ROUTED = re.compile(r"(^|\.)experts(\.|$)|_exps\.")
"""Tensors of which a token reads those of the experts that are chosen for it."""
LONGEST = 1 << 24
"""Tokens, beyond any model's context."""


@dataclass(frozen=True)
class Weights:
    """Numbers or bytes of a model's tensors, by how often a token reads them."""

    always: int
    experts: int
    """Of all routed experts."""
    looked_up: int
    """An embedding that is no head, and what reads images or sound: in memory, and not read by each token."""
    share: float = 1.0
    """Of the experts that one token runs through."""

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return self.always + self.experts + self.looked_up

    def read(self, batch: int) -> float:
        """By a step in which each of so many sequences gets a token; their experts are taken to be independent."""
        return self.always + self.experts * (1 - (1 - self.share) ** batch)

    @property
    def of_token(self) -> float:
        """What one token is multiplied by."""
        return self.always + self.experts * self.share


def weights_of(sizes: Mapping[str, int], checkpoint: Checkpoint, s: ModelConfig) -> Weights:
    """Of tensors by name, with how much each is."""
    parts = {"always": 0, "experts": 0, "looked_up": 0}
    for name, size in sizes.items():
        if ROUTED.search(name):
            parts["experts"] += size
        else:
            is_embedding = bool(roles.EMBEDDING.match(name)) and not checkpoint.tied
            parts["looked_up" if is_embedding or roles.FOREIGN.search(name) else "always"] += size
    experts = s.number("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    share = min(1.0, chosen_experts(s) / experts) if experts and chosen_experts(s) else 1.0
    return Weights(**parts, share=share)


def parameters_of(checkpoint: Checkpoint, s: ModelConfig) -> Weights:
    """Numbers of the model, however it is stored."""
    return weights_of({name: prod(shape) for name, shape in checkpoint.tensors().items()}, checkpoint, s)


@dataclass(frozen=True)
class Load:
    """A model that an engine serves: how long, how many, on how many cards."""

    context: int
    batch: int
    kind: CacheType
    cards: int = 1


@dataclass(frozen=True)
class Memory:
    """Bytes of each card."""

    weights: int
    cache: int
    activations: int
    beside: int
    """Of libraries and drivers."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.cache + self.activations + self.beside


@dataclass(frozen=True)
class MemoryModel:
    """All that memory depends on, of a model in one form."""

    weights: Weights
    layers: tuple[LayerCache, ...]
    settings: ModelConfig
    accounting: Accounting
    device: Device

    @property
    def budget(self) -> int | None:
        """Bytes of a card that the engine may take; None where its memory is not known."""
        memory = self.device.memory_bytes
        if memory is None:
            return None
        return int(memory * (self.accounting.share if not self.device.unified else UNIFIED_SHARE))

    def memory(self, load: Load) -> Memory:
        """Of each card, if weights and cache are split evenly."""
        memory = self.device.memory_bytes or 0
        paging = self.accounting.paging(memory)
        layers = tuple(self._own(layer, load.cards) for layer in self.layers)
        share = load.cards if self.accounting.kind == "served" else 1
        cache = cache_bytes(layers if share > 1 else self.layers, load.context, load.batch, load.kind, paging)
        return Memory(
            -(-self.weights.total // load.cards),
            cache if share > 1 else -(-cache // load.cards),
            self.accounting.activations(self.settings, memory, load.cards, load.context, load.batch),
            self.accounting.beside(self.device, load.cards),
        )

    def _own(self, layer: LayerCache, cards: int) -> LayerCache:
        """What one card of a tensor-parallel engine keeps: whole heads, of which each has one at least; a latent is on
        all of them."""
        heads = -(-layer.heads // cards) if layer.heads else 0
        return replace(layer, heads=heads, state_bytes=-(-layer.state_bytes // cards))

    def fits(self, load: Load) -> bool | None:
        """None where the device's memory is not known."""
        return None if self.budget is None else self.memory(load).total <= self.budget

    def longest(self, load: Load, most: int) -> int:
        """The longest context, up to `most`, with which it fits; 0 for none."""
        return _most(lambda context: bool(self.fits(replace(load, context=context))), most or LONGEST)

    def largest(self, load: Load) -> int:
        """The largest batch with which it fits."""
        return _most(lambda batch: bool(self.fits(replace(load, batch=batch))), 1 << 16)


UNIFIED_SHARE = 0.75
"""Of memory that is the system's too (Metal's recommendedMaxWorkingSetSize; a system needs some for itself)."""


def _most(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, where smaller ones fit as well."""
    low, high = 0, most
    if fits(most):
        return most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
