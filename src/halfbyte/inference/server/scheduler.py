"""Who runs the model when: one thread, in which several answers go on side by side, a token each in turn."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from halfbyte.errors import HalfbyteError
from halfbyte.inference.generation import Generation, Piece
from halfbyte.inference.model import Answering
from halfbyte.inference.sampling import Sampling
from halfbyte.inference.together import read_together, reads_together
from halfbyte.inference.types import FinishReason


class Busy(HalfbyteError):
    """All slots are taken and the queue is full."""


class Stopped(HalfbyteError):
    """The server ends."""


class Accepted(NamedTuple):
    """The prompt was read, and waits for a slot."""

    prompt_tokens: int


class Done(NamedTuple):
    """The answer is whole."""

    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    """Of the model's own work."""


Event = Accepted | Piece | Done | HalfbyteError
"""What becomes of a request. Done and errors are the last."""


@dataclass(eq=False)
class Job:
    """A request to answer."""

    prompt: Callable[[], list[int]]
    """Its tokens, made in the thread of the model, as tokenizers are not to be used in two. Raises HalfbyteError."""
    sampling: Sampling
    tell: Callable[[Event], None]
    """Called in that thread."""
    is_dropped: bool = False
    """Whether nobody waits for it any more."""
    generation: Generation | None = field(default=None, init=False)

    def drop(self) -> None:
        """Nobody waits for it: it gets no further turn."""
        self.is_dropped = True


class Scheduler:
    """Answers `slots` requests in turn, and lets `queue` more wait, first come, first served."""

    def __init__(self, answering: Answering, slots: int, queue: int):
        self._answering, self._slots, self._most = answering, slots, slots + queue
        self._jobs: set[Job] = set()
        """All that are not over."""
        self._new: deque[Job] = deque()
        """Those of which nobody has read the prompt."""
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._is_stopped = self._reads_together = False

    @property
    def running(self) -> int:
        """How many slots are taken."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many requests wait for one."""
        return len(self._jobs) - len(self._running)

    @property
    def is_stopped(self) -> bool:
        """Whether it takes no more."""
        return self._is_stopped

    def submit(self, job: Job) -> None:
        """Raises Busy where it would have to wait behind too many, and Stopped."""
        with self._changed:
            if self._is_stopped:
                raise Stopped("the server is shutting down")
            if len(self._jobs) >= self._most:
                raise Busy(
                    f"{self._slots} requests are answered and {self._most - self._slots} wait, which is all that the "
                    "queue holds; try again later"
                )
            self._jobs.add(job)
            self._new.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """End after the forward pass that is under way, and tell all that wait."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()

    def run(self) -> None:
        """Until `stop`, in a thread that does nothing else."""
        try:
            self._reads_together = self._slots > 1 and reads_together(self._answering)
            while self._wait():
                self._admit()
                self._fill()
                self._step([job for job in self._running if job.generation and not job.is_dropped])
        finally:
            self.stop()
            for job in self._jobs:
                job.tell(Stopped("the server was shut down before the answer was whole"))

    def _wait(self) -> bool:
        """Until there is something to do. Returns False where that is to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or self._jobs)
            return not self._is_stopped

    def _admit(self) -> None:
        """Read the prompts that came since the last round."""
        while self._new:
            job = self._new.popleft()
            try:
                if not job.is_dropped:
                    job.generation = Generation(self._answering, job.prompt(), job.sampling)
                    job.tell(Accepted(job.generation.prompt_tokens))
            except HalfbyteError as refusal:
                job.tell(refusal)
                job.drop()
            self._waiting.append(job)

    def _fill(self) -> None:
        """Take over jobs from the queue, in place of those that are over."""
        self._running = [job for job in self._running if not self._is_over(job)]
        self._waiting = deque(job for job in self._waiting if not self._is_over(job))
        while self._waiting and len(self._running) < self._slots:
            self._running.append(self._waiting.popleft())

    def _step(self, jobs: Sequence[Job]) -> None:
        """One turn of each: prompts by themselves, and answers together, where the model does that."""
        generations = {job: job.generation for job in jobs if job.generation}
        joined = [job for job, of in generations.items() if len(of.pending) == 1 and of.sequence.is_plain]
        if not self._reads_together or len(joined) == 1:
            joined = []
        for job in [job for job in generations if job not in joined]:
            self._take(job, generations[job].__next__)
        if joined:
            started = time.perf_counter()
            of = [generations[job] for job in joined]
            logits = read_together(self._answering, [one.sequence for one in of], [one.pending[0] for one in of])
            for job, row in zip(joined, logits, strict=True):
                self._take(job, partial(generations[job].take, row, started))

    def _take(self, job: Job, taken: Callable[[], Piece]) -> None:
        """Tell what a turn adds, and the end."""
        generation = job.generation
        try:
            job.tell(taken())
        except HalfbyteError as error:
            job.tell(error)
            job.drop()
            return
        if generation is not None and generation.finish_reason:
            seconds = generation.prefill_seconds + generation.decode_seconds
            counts = generation.prompt_tokens, generation.completion_tokens
            job.tell(Done(generation.finish_reason, *counts, seconds))
            job.drop()

    def _is_over(self, job: Job) -> bool:
        """Whether nobody waits for the job; then it gives back its place, and the memory of its cache."""
        if job.is_dropped:
            if job.generation is not None:
                job.generation.close()
            job.generation = None
            with self._changed:
                self._jobs.discard(job)
        return job.is_dropped
