"""Tensors of a checkpoint, read by a thread while what was read before is computed with."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from halfbyte.devices import kind_of
from halfbyte.models.filling import TensorSource
from halfbyte.models.placement import Placement


class ReadAhead:
    """Reads a checkpoint, or what stands for one, as it is, and what it was told to expect before that is asked for."""

    def __init__(self, source: TensorSource, placement: Placement):
        self._source = source
        self._pins = kind_of(placement.device).pins
        self._expected: dict[str, Future[Tensor]] = {}
        self._thread = ThreadPoolExecutor(1) if placement.reads_ahead else None

    def expect(self, tensors: Iterable[str]) -> None:
        """Begin to read these; what was expected before and not asked for is forgotten."""
        self.forget()
        if self._thread is not None:
            self._expected = {tensor: self._thread.submit(self._read, tensor) for tensor in tensors}

    def read(self, tensor: str) -> Tensor:
        """As `Checkpoint.read`."""
        expected = self._expected.pop(tensor, None)
        return self._source.read(tensor) if expected is None else expected.result()

    def _read(self, tensor: str) -> Tensor:
        value = self._source.read(tensor)
        return value.pin_memory() if self._pins else value

    def forget(self) -> None:
        """Expect nothing any more."""
        for expected in self._expected.values():
            expected.cancel()
        self._expected = {}

    def close(self) -> None:
        """End the thread; reading goes on without it."""
        self.forget()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
