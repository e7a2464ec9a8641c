"""Numbers move by Adam along the gradient of the KL divergence from the original, over windows of the calibration text.
Some of them are held out and judge: of all that was tried, what lost least on them is taken."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from halfbyte.grids.grid import Params
from halfbyte.models.student import Student
from halfbyte.polish.written import Written
from halfbyte.progress import Progress

RATE, MOST = 0.04, 0.01
"""How far a step moves a number at most, as a share of the mean magnitude of its kind: the first, halved for each bit
that a weight has, since so does what rounding missed. (bookworm-6m, int2-g128-asym: .74 of the KL is left with .01, .78
with .003; int4-g128-asym: .95 with .003, 1.05 with .01.)"""
BETAS, TINY = (0.9, 0.99), 1e-15
"""Of Adam."""
TOGETHER, FEWEST_BATCHES = 4, 8
"""Windows of a step; fewer where else there would be fewer batches than so many."""
HELD_OUT = 8
"""One batch in so many judges."""
EPOCHS, WARM_UP = 4, 10
"""Times that the text is gone through; steps until the rate is full, which then sinks to nothing by a cosine."""
CHECKS, PATIENCE = 16, 4
"""Times that the windows held out are looked at; after so many without a gain, nothing more is tried."""


@dataclass
class Best:
    """The best so far."""

    first: float
    """KL divergence on the windows held out, in nats per token, before anything was tuned."""
    kl: float
    step: int
    numbers: Params

    @property
    def is_first(self) -> bool:
        """Whether nothing that was tried is better."""
        return self.step == 0


def shuffled(windows: Int64[Tensor, "samples length"]) -> Int64[Tensor, "samples length"]:
    """Windows of all kinds of text in every batch, and among those held out."""
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]


def together(windows: int) -> int:
    """How many windows a step takes of so many."""
    return max(1, min(TOGETHER, windows // FEWEST_BATCHES))


def divided(batches: list[int]) -> tuple[list[int], list[int]]:
    """Those that are tuned to, and those that judge."""
    held_out = max(1, len(batches) // HELD_OUT)
    return batches[:-held_out], batches[-held_out:]


class Tuning:
    """Numbers on their way, which can be put down in a file and taken up again."""

    def __init__(self, student: Student, written: Written, progress: Progress):
        self.student, self.written, self.progress = student, written, progress
        self.batches, self.held_out = divided(student.batches)
        self.steps = EPOCHS * len(self.batches)
        self._every = -(-self.steps // CHECKS)
        rate = min(MOST, RATE * 2**-written.bits)
        kinds = [
            {"params": [p], "lr": 0.0, "full": rate * p.detach().abs().mean().item()} for p in written.numbers.values()
        ]
        self._adam = torch.optim.Adam(kinds, betas=BETAS, eps=TINY)
        self.step, self.idle = 0, 0
        self.best: Best | None = None

    def run(self, state: Path) -> Best:
        """Until nothing is won any more, or there are no more steps."""
        if state.exists():
            self._restore(torch.load(state, weights_only=True))
        while self.best is None or (self.step < self.steps and self.idle < PATIENCE):
            if self.best is not None:
                self._move()
            if self.step % self._every == 0 or self.step == self.steps:
                self._check()
                _save(state, self._state())
        return self.best

    def _move(self) -> None:
        epoch, number = divmod(self.step, len(self.batches))
        order = torch.randperm(len(self.batches), generator=torch.Generator().manual_seed(epoch)).tolist()
        self._adam.zero_grad()
        self.student.step(self.batches[order[number]], self.written.back)
        share = min(1.0, (self.step + 1) / WARM_UP) * (1 + math.cos(math.pi * self.step / self.steps)) / 2
        for kind in self._adam.param_groups:
            kind["lr"] = share * kind["full"]
        self._adam.step()
        self.step += 1
        self._say()

    def _check(self) -> None:
        kl = sum(map(self.student.divergence, self.held_out)) / len(self.held_out)
        if self.best is None or kl < self.best.kl:
            first = kl if self.best is None else self.best.first
            numbers = {name: p.detach().clone() for name, p in self.written.numbers.items()}
            self.best, self.idle = Best(first, kl, self.step, numbers), 0
        else:
            self.idle += 1
        self._say()

    def _say(self) -> None:
        known = f", KL {self.best.kl:.5f} of {self.best.first:.5f} on windows held out" if self.best else ""
        self.progress(f"polish{known}", self.step, self.steps)

    def _state(self) -> dict[str, Any]:
        numbers = {name: p.detach() for name, p in self.written.numbers.items()}
        best = vars(self.best)
        return {"numbers": numbers, "adam": self._adam.state_dict(), "step": self.step, "idle": self.idle, "best": best}

    def _restore(self, state: dict[str, Any]) -> None:
        self.written.take(state["numbers"])
        self._adam.load_state_dict(state["adam"])
        self.step, self.idle, self.best = state["step"], state["idle"], Best(**state["best"])


def _save(path: Path, state: dict[str, Any]) -> None:
    """Whole or not there."""
    beside = path.with_suffix(".new")
    torch.save(state, beside)
    beside.replace(path)
