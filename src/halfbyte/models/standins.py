"""What blocks are called with: while the model's own forward runs, a stand-in in place of each block notes it and hands
its input on.

That is the model's own computation where the blocks run once each, in order, and hand one another what they return,
untouched. The stand-ins look whether it is so, and a model of another kind is refused by name.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from torch import Tensor, nn

from halfbyte.errors import Unsupported
from halfbyte.models import filling
from halfbyte.models.poison import is_poisoned, poison

if TYPE_CHECKING:
    from halfbyte.models.walk import Walk

DROPPED = {"past_key_values", "past_key_value", "use_cache", "cache_position"}


@dataclass(frozen=True)
class Carried:
    """An argument that the block before returns beside its hidden states: the one of this number."""

    number: int


class Call(NamedTuple):
    """Of some samples of a batch: what a block is called with beside their hidden states."""

    samples: slice
    args: tuple
    kwargs: dict[str, Any]


class Calls:
    """What every block is called with, batch by batch; a batch runs in one part, or in several that take less
    memory."""

    def __init__(self) -> None:
        self._noted: dict[nn.Module, list[list[Call]]] = {}
        self.carried: dict[int, list[Sequence[Any]]] = {}
        """What the last block returned beside hidden states, by batch and part, where the next one reads it."""

    def note(self, module: nn.Module, batch: int, call: Call) -> None:
        """Note one call of a block, for a part of a batch."""
        noted = self._noted.setdefault(module, [])
        if batch == len(noted):
            noted.append([])
        noted[batch].append(call)

    def of(self, module: nn.Module, batch: int) -> Iterator[Call]:
        """With what the block before has returned in its places."""
        for part, (samples, args, kwargs) in enumerate(self._noted[module][batch]):

            def given(value: Any, part: int = part) -> Any:
                return self.carried[batch][part][value.number] if isinstance(value, Carried) else value

            yield Call(samples, tuple(map(given, args)), {name: given(value) for name, value in kwargs.items()})

    @property
    def carries(self) -> bool:
        """Whether blocks hand on more than hidden states."""
        first = (call for batches in self._noted.values() for call in batches[0])
        return any(isinstance(value, Carried) for call in first for value in (*call.args, *call.kwargs.values()))


class StandIns:
    """For all blocks of one run: they note what each is called with, and that hidden states are all that passes between
    them."""

    def __init__(
        self, walk: "Walk", calls: Calls, batch: int, samples: slice = slice(None), forward: Callable | None = None
    ):
        """`forward`: the first block's own, to see what it returns."""
        self.walk, self.calls, self.batch, self.samples, self.forward = walk, calls, batch, samples, forward
        self.done = 0
        self.first: Tensor | None = None
        """What the first block reads."""
        self._handed: Tensor | None = None

    def __call__(self, number: int) -> Callable:
        """What runs in place of the block of this number."""

        def stand_in(hidden: Tensor, *args, **kwargs) -> Any:
            if number != self.done:
                self._refuse("calls its blocks in another order than they stand in")
            self.done += 1
            given = {name: value for name, value in kwargs.items() if name not in DROPPED}
            if self.first is None:
                self.walk.require_finite(hidden, "what comes before the first block computes")
                if self.forward is not None:
                    self._learn(self.forward(hidden, *args, **given), hidden)
                self.first = hidden
            elif (
                hidden.shape != self.first.shape or self._handed is None or hidden.data_ptr() != self._handed.data_ptr()
            ):
                self._refuse("computes something between its blocks")
            call = Call(
                self.samples,
                tuple(self._carried(value) for value in args),
                {name: self._carried(value) for name, value in given.items()},
            )
            self.calls.note(self.walk.blocks[number].module, self.batch, call)
            self._handed = hidden
            return self.walk.as_returned(hidden)

        return stand_in

    def _learn(self, out: Any, hidden: Tensor) -> None:
        """What a block returns beside its hidden states is poisoned: where it is used, it shows."""
        first, *others = out if isinstance(out, (tuple, list)) else [out]
        if not isinstance(first, Tensor) or first.shape != hidden.shape:
            self._refuse("has blocks that return something else than hidden states")
        if isinstance(out, (tuple, list)):
            self.walk.returned_beside = [
                poison(x) if isinstance(x, Tensor) else None if x is None else Carried(i) for i, x in enumerate(others)
            ]

    def _carried(self, value: Any) -> Any:
        """An argument as it is to be noted: what the block before has returned is known when that has run."""
        for number, other in enumerate(self.walk.returned_beside or ()):
            if other is not None and other is value:
                return Carried(number)
        if self.forward is not None and isinstance(value, Tensor) and is_poisoned(value):
            self._refuse("computes with more than hidden states between its blocks")
        return value

    def close(self) -> Tensor:
        """After the run: what the first block reads. Raises Unsupported unless every block was called."""
        if self.first is None or self.done != len(self.walk.blocks):
            self._refuse(f"runs {self.done} of its {len(self.walk.blocks)} blocks")
        return self.first

    def _refuse(self, what: str) -> NoReturn:
        raise Unsupported(
            f"'{self.walk.checkpoint.model_type}' {what}, which calibration and eval do not follow; {filling.NO_MODEL}"
        )
