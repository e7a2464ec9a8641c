"""What a model computes before and after its blocks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from halfbyte.errors import Unsupported
from halfbyte.grids.activations import ActivationQuant
from halfbyte.models import filling, skeleton
from halfbyte.models.batches import Tokens
from halfbyte.models.matmuls import rounding
from halfbyte.models.streams import Hidden, Stream
from halfbyte.models.weight import Weight

if TYPE_CHECKING:
    from halfbyte.models.walk import Walk


class Ends:
    """Of the model of a pass, given what its last block returned."""

    def __init__(self, walk: "Walk", hidden: Stream):
        self.walk, self.model, self.hidden = walk, walk.model, hidden
        self._before_head: dict[nn.Module, Any] = {}
        """What the parts returned that a head may read, for one of the batches."""

    @property
    def predicts(self) -> bool:
        """Whether the model has a head that predicts tokens; reward and embedding models have none."""
        return self.model.can_generate()

    def logits(self) -> Iterator[tuple[Tokens, Tensor]]:
        """Tokens and what the whole model returns for every batch but the probe, which is logits where it has a
        head."""
        if self._ends_in_head:
            self.finish()
            with self.head() as predict:
                for number, tokens in list(enumerate(self.walk.batches))[1:]:
                    yield tokens, predict(number, slice(None))
        else:
            for tokens, out in self._finish(self.model):
                yield tokens, out.logits if hasattr(out, "logits") else out.last_hidden_state

    def states(self) -> Iterator[tuple[Tokens, Float[Tensor, "batch length width"]]]:
        """Tokens and last hidden states of every batch but the probe."""
        for tokens, out in self._finish(self.base):
            yield tokens, out.last_hidden_state

    @property
    def _ends_in_head(self) -> bool:
        return self.predicts and self.base is not self.model

    @property
    def _decoder(self) -> nn.Module:
        return self.model.get_submodule(self.walk.stack.rpartition(".")[0])

    @property
    def base(self) -> nn.Module:
        """All but the head: what the family calls its base, or where that is the whole model (Llama 4), its decoder."""
        base = self.model.base_model
        return self._decoder if base is self.model and self.predicts else base

    @property
    def _with_head(self) -> nn.Module:
        """What predicts from what the base returns, and does nothing else."""
        if self.model.base_model is not self.model:
            return self.model
        return self.model.get_submodule(self.walk.stack.rpartition(".")[0].rpartition(".")[0])

    @torch.no_grad()
    def finish(self) -> None:
        """What the head reads takes the place of hidden states. Raises Unsupported for a model without a head."""
        if not self._ends_in_head:
            raise Unsupported(
                f"'{self.walk.checkpoint.model_type}' ({type(self.model).__name__}) predicts no tokens, and "
                "predictions are what is compared"
            )
        base, decoder = self.base, self._decoder
        hook = decoder.register_forward_hook(
            lambda module, args, out: self._before_head.update(
                {module: out} if hasattr(out, "last_hidden_state") else {}
            )
        )
        for number, (_, out) in enumerate(self._finish(base), 1):
            self.hidden[number] = out.last_hidden_state
            self._before_head[base] = out
        hook.remove()

    @contextmanager
    def head(
        self, like: "Ends | None" = None
    ) -> Iterator[Callable[[int, slice], Float[Tensor, "batch positions vocabulary"]]]:
        """While this lasts: the logits of a batch at some positions, after `finish`. `like`: those whose head is in
        memory and is the same."""
        if like is None:
            self.walk.load(self._of_head)
        else:
            for name in self._of_head:
                filling.put(self.model, name, like.model.get_parameter(name))

        @torch.no_grad()
        def logits(batch: int, positions: slice) -> Tensor:
            return self.predict(self.hidden[batch][:, positions], self.walk.batches[batch][:, positions])

        try:
            yield logits
        finally:
            for module in self._before_head:
                module.__dict__.pop("forward", None)
            filling.release(self.model, self.walk.outside)

    def predict(self, hidden: Hidden, tokens: Tokens) -> Float[Tensor, "batch positions vocabulary"]:
        """Logits of what the head reads, while that is in memory (`head`); differentiable with respect to `hidden`."""
        for module, whole in self._before_head.items():  # most heads ask the base for it, or (OPT's) the decoder in it
            out = copy(whole)
            out.last_hidden_state = hidden.to(self.walk.device)
            module.forward = lambda *args, out=out, **kwargs: out
        with rounding(self._head_views(), self._read_by_head):
            return self._with_head(input_ids=tokens.to(self.walk.device), use_cache=False).logits

    @cached_property
    def _read_by_head(self) -> dict[Weight, ActivationQuant]:
        """How what the head reads is rounded, where it is."""
        walk = self.walk
        heads = (
            [w for w in walk.weights if w.block is None and w.tensor in walk.weight_map]
            if walk.fake_quantize_activations
            else []
        )
        rounded = {w: quant for w in heads if (quant := walk.checkpoint.read_inputs(w.name))}
        return {
            weight: quant._replace(params={name: value.to(walk.device) for name, value in quant.params.items()})
            for weight, quant in rounded.items()
        }

    def _head_views(self) -> dict[Weight, Tensor]:
        walk = self.walk
        views = {weight: walk.weight_map[weight.tensor] for weight in self._read_by_head}
        return {
            weight: view.view(filling.tensor(self.model, view.parameter), walk.shapes[weight.tensor])
            for weight, view in views.items()
        }

    def given(self, hidden: Stream) -> "Ends":
        """These as if other hidden states had come out of the last block."""
        other = copy(self)
        other.hidden, other._before_head = hidden, dict(self._before_head)
        return other

    def same_head(self, other: "Ends") -> bool:
        """Whether this model's head is, bit for bit, that of another, whose tensors bear the same names."""
        mine, its = self.walk, other.walk
        if self.model.dtype != other.model.dtype:
            return False
        if mine.checkpoint is its.checkpoint:
            return True
        homes = {mine.ties.get(name, name) for name in self._of_head}
        tensors = [tensor for tensor, view in mine.weight_map.items() if view.parameter in homes]
        return (
            self._of_head == other._of_head
            and bool(tensors)
            and all(mine.checkpoint.same(tensor, its.checkpoint) for tensor in tensors)
        )

    @property
    def _of_head(self) -> list[str]:
        """Parameters of what comes after the base."""
        base = set(self.outside_of(self.base))
        return [name for name in self.walk.outside if name not in base]

    @torch.no_grad()
    def _finish(self, part: nn.Module) -> Iterator[tuple[Tensor, Any]]:
        with self.loaded(part):
            for hidden, tokens in list(zip(self.hidden, self.walk.batches, strict=True))[1:]:
                yield tokens, self.around_blocks(part, tokens, lambda _, hidden=hidden: hidden)

    @contextmanager
    def loaded(self, part: nn.Module) -> Iterator[None]:
        """While this lasts, what runs before and after the blocks of a part of the model is in memory."""
        self.walk.load(self.outside_of(part))
        yield
        filling.release(self.model, self.walk.outside)

    def around_blocks(self, part: nn.Module, tokens: Tokens, instead: Callable[[Hidden], Hidden]) -> Any:
        """What a part of the model returns where `instead` of all its blocks something else makes hidden states of
        those that the first one reads; differentiable."""

        def stand_in(number: int) -> Callable:
            return lambda hidden, *args, **kwargs: self.walk.as_returned(
                hidden if number else instead(hidden).to(self.walk.device)
            )

        with self.walk.standing_in(stand_in), skeleton.refusing(self.walk.checkpoint, "run"):
            return part(input_ids=tokens.to(self.walk.device), use_cache=False)

    def outside_of(self, part: nn.Module) -> list[str]:
        """Parameters and buffers of a part of the model that are in no block."""
        prefix = next(f"{name}." if name else "" for name, module in self.model.named_modules() if module is part)
        return [name for name in self.walk.outside if name.startswith(prefix)]
