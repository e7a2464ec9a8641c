"""Where a model caches keys and values: what goes into the cache is seen, and rounded as an engine would.

Every attention of Transformers hands its new keys and values, after positions are put into them, to the `update` of the
cache that it is given, and computes with what comes back. So a cache that rounds is all it takes, whatever the family;
with latent attention (DeepSeek), what is cached are the latents, as in engines.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from halfbyte.containers.kv import KVCache
from halfbyte.errors import Unsupported
from halfbyte.grids.activations import ActivationGrid, ActivationQuant, ActivationStats, ScaledActivations
from halfbyte.grids.grid import Params
from halfbyte.grids.kv import KVGrid
from halfbyte.models import mapping, skeleton
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.mapping import ParamView

KV = Float[Tensor, "batch heads tokens dim"]
CacheHook = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Keys and values on their way into a cache."""
NAMES = ("past_key_values", "layer_past", "past_key_value")
"""What families call the cache that an attention is given."""
SAMPLED = 1024
"""Tokens of a head whose values are kept for ranges that look at all of them."""


class CacheProxy:
    """Stands where an attention expects its cache; what goes in passes through a function first."""

    def __init__(self, through: CacheHook, cache: Cache | None, model: PreTrainedModel):
        self.through, self.cache, self.model = through, cache, model

    def update(self, key: Tensor, value: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """What the attention computes with: keys and values after the function, cached if there is a cache."""
        key, value = self.through(key, value)
        return (key, value) if self.cache is None else self.cache.update(key, value, *args, **kwargs)

    def __getattr__(self, name: str):
        # Without a cache, whatever else is asked for (lengths, states of convolutions) is answered as by one that is
        # empty.
        return getattr(DynamicCache(config=self.model.config) if self.cache is None else self.cache, name)


@contextmanager
def cache_proxies(model: PreTrainedModel, throughs: dict[nn.Module, CacheHook]) -> Iterator[None]:
    """While this lasts, what these attentions cache goes through their functions."""
    handles = [put(model, attention, through) for attention, through in throughs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def put(model: PreTrainedModel, attention: nn.Module, through: CacheHook):
    """Have a proxy stand before the attention's cache; returns the handle that removes it."""
    signature = inspect.signature(attention.forward)
    name = _name(attention)

    def give(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        bound = signature.bind_partial(*args, **kwargs)
        bound.arguments[name] = CacheProxy(through, bound.arguments.get(name), model)
        return bound.args, bound.kwargs

    return attention.register_forward_pre_hook(give, with_kwargs=True)


def attentions(block: nn.Module) -> dict[str, nn.Module]:
    """The modules of a block that are given a cache and do not pass it on, by their path in it."""
    takers = {path: module for path, module in block.named_modules() if path and _name(module)}
    return {
        path: module for path, module in takers.items() if not any(other.startswith(f"{path}.") for other in takers)
    }


def _name(module: nn.Module) -> str:
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in NAMES if name in parameters), "")


def names(model: PreTrainedModel, weight_map: Mapping[str, ParamView], block: nn.Module) -> dict[str, nn.Module]:
    """The attentions in a part of the model that cache keys and values, by what the checkpoint calls them."""
    layers = DynamicCache(config=model.config).layers
    paths = {module: path for path, module in model.named_modules()}
    by_name: dict[str, nn.Module] = {}
    for attention in attentions(block).values():
        inside = f"{paths[attention]}."
        owned = {
            tensor: view.parameter.removeprefix(inside)
            for tensor, view in weight_map.items()
            if view.parameter.startswith(inside)
        }
        homes = [tensor.split(".")[: -len(rest.split("."))] for tensor, rest in owned.items()]
        layer = dict(enumerate(layers)).get(getattr(attention, "layer_idx", -1))
        if homes and isinstance(layer, CacheLayerMixin):  # others keep the state of a convolution, or nothing
            by_name[".".join(min(homes, key=len))] = attention
    return by_name


def apply(
    model: PreTrainedModel, weight_map: Mapping[str, ParamView], cache: KVCache, device: torch.device | str = "cpu"
) -> None:
    """From now on, the model computes with keys and values as this cache would return them. Raises Unsupported where it
    has none."""
    by_name = names(model, weight_map, model)
    if not by_name:
        raise Unsupported(f"{model.config.model_type} has no attention that caches keys and values")
    for name, attention in by_name.items():
        key, value = (_on(device, part) for part in cache.of(name))
        put(model, attention, rounded(key, value))


def _on(device: torch.device | str, part: ActivationQuant) -> ActivationQuant:
    return ActivationQuant(part.grid, {name: p.to(device) for name, p in part.params.items()})


def blank(checkpoint: Checkpoint, grid: KVGrid) -> KVCache:
    """A cache of the right names and shapes, whose scales are still to be found. Raises Unsupported for a model without
    attention."""
    model = skeleton.build(checkpoint, checkpoint.dtype)
    by_name = names(model, mapping.places(model, checkpoint.tensors()), model)
    if not by_name:
        raise Unsupported(f"{checkpoint.model_type} has no attention that caches keys and values")
    text = model.config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    scale = {"scale": torch.ones(heads, 1, 1) if "-head" in str(grid) else torch.ones(1)}
    return KVCache(
        grid, dict.fromkeys(by_name, scale), dict.fromkeys(by_name, scale), any(map(is_latent, by_name.values()))
    )


def rounded(key: ActivationQuant, value: ActivationQuant) -> CacheHook:
    """What comes back is what an engine reads from its cache."""
    return lambda k, v: (key.round(k), value.round(v))


def is_latent(attention: nn.Module) -> bool:
    """Whether latents are cached: as keys; as values, the part of keys that has positions."""
    return hasattr(attention, "kv_lora_rank")


class KVObserver:
    """Keys or values of one attention: what those of each head range over, and some of them."""

    def __init__(self):
        self.low = self.high = torch.empty(0)
        self.rows: list[Tensor] = []

    def add(self, x: KV) -> None:
        """See more keys or values."""
        x = x.float().transpose(0, 1).flatten(1, 2)  # [heads, batch * tokens, dim]
        low, high = x.amin(1), x.amax(1)
        self.low = torch.minimum(self.low, low) if self.rows else low
        self.high = torch.maximum(self.high, high) if self.rows else high
        self.rows.append(x[:, :: -(-x.shape[1] // SAMPLED)].clone())

    def fit(self, grid: ActivationGrid, observer: str) -> Params:
        """The parameters to store; none if scales are found as the engine runs."""
        rows = torch.cat(self.rows, 1)
        if isinstance(grid, ScaledActivations) and grid.granularity == "head":
            heads = [
                grid.fit(ActivationStats(low, high, some), observer)["scale"]
                for low, high, some in zip(self.low, self.high, rows, strict=True)
            ]
            return {"scale": torch.stack(heads).view(-1, 1, 1)}
        return grid.fit(ActivationStats(self.low.amin(0), self.high.amax(0), rows.flatten(0, 1)), observer)
