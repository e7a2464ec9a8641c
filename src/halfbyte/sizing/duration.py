"""How long a run takes: what it computes, reads and writes, known from shapes, at the pace at which this machine does a
small piece of each as the run begins. An estimate, held against runs by benchmarks/run_resources.py."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import inf, prod
from pathlib import Path
from tempfile import TemporaryFile
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from halfbyte.devices import wait
from halfbyte.grids.activations import ActivationQuant
from halfbyte.grids.quantized import Quantized, Scheme, WeightActivation
from halfbyte.models.memory import guiding_tokens, hidden_size, reading_group
from halfbyte.models.placement import BATCH_TOKENS
from halfbyte.models.weight import Weight
from halfbyte.recipe import OTHER_COMMANDS
from halfbyte.sizing.cache import ModelConfig
from halfbyte.sizing.memory import ROUTED, parameters_of
from halfbyte.solvers import SOLVERS, outputs, solved
from halfbyte.solvers.descent import SWEEPS
from halfbyte.solvers.statistics import ERROR_PRODUCTS, Statistics
from halfbyte.targets.plan import Plan

FACTORING = ("gptq", "gptaq")
"""Solvers that factor a Hessian."""
MAX_WIDTH, SAMPLE_WEIGHTS, SAMPLE_TOKENS = 2048, 1 << 19, 512
"""In-features and weights of a matrix that is tried, at most, and rows that it is multiplied by."""
ROWS = 128
"""... and out-features of which it has a multiple, as containers pack several into a word."""
WRITTEN_BYTES = 1 << 22
"""Bytes that are written to see how fast that is."""
MIN_REPEATS, MAX_SECONDS = 2, 0.02
"""Times, and seconds, for which a piece is tried."""
WEIGHTS_SHARE, SECONDS_PER_WEIGHT = 32, 1e-9
"""Of a small model less is tried, since to wait for the estimate would take longer than the run: one weight in so many;
seconds a piece for each."""
NUMBERS_MOVED = 40
"""Numbers that a block reads or writes beside its products for each of a hidden state and of an MLP: norms, rotations,
activations, sums."""
AWQ_SCALES, SECONDS_PER_SCALE = 22, 0.0015
"""Scales that AWQ tries for each matrix; seconds that each takes beside its arithmetic: threads, fresh memory."""
RUNS_PER_FOLD, FOLDS, FOLDS_PER_MATRIX = 7, 4, 2
"""Times that SmoothQuant runs a block on one sample for each place of a scale; places in a block; those that a matrix
is part of."""
SECONDS_PER_RUN, BYTES_PER_RESCALED = 0.005, 48
"""Seconds that such a run takes beside its arithmetic; bytes that are moved for each weight that is rescaled for it."""
LEARNING_STEPS = 200
"""Of `halfbyte.refinements.learning`, which imports the walk through the model: a plan has no use for that."""
POLISH_PASSES = 18
"""Of all tokens, as `polish` goes through the text four times, there twice and back at the cost of two, and looks at
windows held out."""
BYTES_PER_STEP = 150
"""Bytes that are moved for each weight that learns, in a step."""
MODEL_SECONDS, SECONDS_PER_ENTRY = 0.2, 1.5e-5
"""Seconds in which a model is built; in which an entry of the vocabulary is read."""
TURNING = 64
"""Bytes that are moved for each weight that is rotated, on both sides, by the small factors of a large matrix."""
REPORT_SECONDS, ACTIVATION_REPORT_SECONDS = 0.0035, 0.01
"""Seconds in which a matrix is compared with its original and told of in the report; and what it reads."""


@dataclass(frozen=True)
class Pace:
    """Seconds for one of each, on this machine as it is now."""

    product: float
    """A floating-point operation of a product in the model's precision."""
    wide_product: float
    """... in float32."""
    factoring: float
    """... of a Cholesky factor."""
    touched: float
    """A byte that is read or written in memory."""
    read: float
    """A byte of a tensor of the source, decoded."""
    written: float
    """A byte in a file."""


@dataclass(frozen=True)
class MatrixPace:
    """Seconds for each weight of a matrix, on one grid; 0 for what the run does not do."""

    streaming: float = 0.0
    """Rounded without calibration, packed and read again, in the threads that one of several side by side has."""
    solving: float = 0.0
    """By the method's solver, beside products."""
    nearest: float = 0.0
    """To the nearest, with a search for scales; and decoded."""
    coarse: float = 0.0
    """... without a search."""
    committing: float = 0.0
    """Packed, digested, decoded, and read again."""
    activation: float = 0.0
    """A number that it is multiplied by, rounded."""


def seconds(plan: Plan, output_bytes: int, device: torch.device, scratch: Path, together: int) -> float | None:
    """Of a run of this plan, from here on; `scratch` is a folder of the disk on which it writes, and `together` how
    many matrices are rounded side by side without calibration. None where the device has no memory for a small piece of
    it: the run itself may still do with less."""
    microbenchmark = Microbenchmark(plan, device, together)
    try:
        with torch.no_grad():
            paces = {scheme: microbenchmark.matrix(scheme) for scheme in dict.fromkeys(plan.schemes.values())}
            machine = microbenchmark.machine(scratch)
    except torch.OutOfMemoryError:
        return None
    return sum(Work(plan, machine, paces, together).parts(output_bytes).values()) * microbenchmark.crowding


@dataclass(frozen=True)
class Work:
    """What a run computes, and how long that takes."""

    plan: Plan
    pace: Pace
    paces: dict[Scheme, MatrixPace]
    together: int = 1

    def parts(self, output_bytes: int) -> dict[str, float]:
        """Seconds, by what they go into."""
        plan, pace, method = self.plan, self.pace, self.plan.method
        weights, kept = sum(prod(w.shape) for w in plan.schemes), sum(plan.spec(t).size_bytes for t in plan.unquantized)
        parts = {
            "reading": (weights * plan.checkpoint.dtype.itemsize + kept) * pace.read,
            "writing": output_bytes * (pace.written + 2 * pace.touched),
            "streaming": self._sum(self._streamed, lambda w, own: prod(w.shape) * own.streaming + REPORT_SECONDS)
            / self.together,
            "committing": self.sum(lambda w, own: prod(w.shape) * own.committing + REPORT_SECONDS),
            "rotating": self._rotating(weights) if method.rotated else 0.0,
        }
        if not plan.calibrated:
            return parts
        passes = 2 + method.full_precision + (2 if plan.scales else 0)  # to see what is read, and as quantized
        named = (*method.transforms, method.solver, *method.refinements)
        return parts | {
            "starting": MODEL_SECONDS + SECONDS_PER_ENTRY * self.vocabulary,
            "blocks": passes * self.forward(self.tokens) + self.rounding_activations(self.tokens),
            "statistics": self._statistics(),
            "guiding": _guided(self) if method.guided else 0.0,
            "solving": self.sum(self._solving),
            **{name: SECONDS_OF[name](self) for name in named if name in SECONDS_OF},
        }

    def sum(self, of: Callable[[Weight, MatrixPace], float]) -> float:
        """Over the matrices that are solved with calibration."""
        return self._sum([weight for weight in self.plan.schemes if self.plan.calibrated and weight.block], of)

    def _sum(self, weights: Sequence[Weight], of: Callable[[Weight, MatrixPace], float]) -> float:
        return sum(of(weight, self.paces[self.plan.schemes[weight]]) for weight in weights)

    @property
    def _streamed(self) -> list[Weight]:
        """What is rounded without calibration."""
        return [weight for weight in self.plan.schemes if not (self.plan.calibrated and weight.block)]

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return self.plan.recipe.calibration.samples * self.plan.recipe.calibration.length

    @cached_property
    def _blocks(self) -> list[Weight]:
        return [weight for weight in self.plan.checkpoint.weights() if weight.block]

    @property
    def products(self) -> float:
        """Operations of all blocks' matrices on one token."""
        return sum(2 * self.share(weight) * prod(weight.shape) for weight in self._blocks)

    @property
    def layers(self) -> int:
        """How many blocks there are."""
        return len({weight.block for weight in self._blocks})

    @property
    def vocabulary(self) -> int:
        """Of how many entries."""
        size = self.plan.checkpoint.text_config.get("vocab_size")
        return size if isinstance(size, int) else 0

    @cached_property
    def _routed(self) -> float:
        """Of all tokens, the share that an expert sees."""
        return parameters_of(self.plan.checkpoint, ModelConfig(self.plan.checkpoint.config)).share

    def share(self, weight: Weight) -> float:
        """Of all tokens, those that a weight sees."""
        return self._routed if ROUTED.search(weight.tensor) else 1.0

    def forward(self, tokens: int) -> float:
        """All blocks on so many tokens."""
        plan, width = self.plan, hidden_size(self.plan.checkpoint)
        inner = max((max(weight.shape) for weight in self._blocks), default=width)
        attention = 4 * plan.recipe.calibration.length * width * self.layers
        numbers = NUMBERS_MOVED * (width + inner) * self.layers
        of_token = (self.products + attention) * self.pace.product
        return tokens * (of_token + numbers * plan.checkpoint.dtype.itemsize * self.pace.touched)

    def rounding_activations(self, tokens: int) -> float:
        """Of what all linears read of so many tokens."""
        return self.sum(lambda w, own: tokens * self.share(w) * w.shape[1] * own.activation)

    def _rotating(self, weights: int) -> float:
        """To find and prove a rotation, the model runs twice on few tokens; each weight is turned then and later."""
        read = 2 * weights * self.plan.checkpoint.dtype.itemsize * self.pace.read
        return 2 * MODEL_SECONDS + read + 2 * weights * TURNING * self.pace.touched

    def _statistics(self) -> float:
        """Of what linears read, those that read the same together, and their factors."""
        first = {reading_group(weight): weight for weight in self.plan.schemes if weight.block}
        factored, drift = self.plan.method.solver in FACTORING, self.plan.method.full_precision
        return sum(
            _summing(w.shape[1]) * self.tokens * self.share(w) * (3 if drift else 1) * self.pace.wide_product
            + (w.shape[1] ** 3 / 3 * self.pace.factoring if factored else 0.0)
            for w in first.values()
        )

    def _solving(self, weight: Weight, own: MatrixPace) -> float:
        """A matrix rounded, and the error of what it returns."""
        out, width = weight.shape
        moved = out * width**2 * self.pace.product if self.plan.method.solver in FACTORING else 0.0
        products = moved + 4 * _rows(weight) * width**2 * self.pace.wide_product
        return ACTIVATION_REPORT_SECONDS + out * width * own.solving + products


def _awq(work: Work) -> float:
    """Scales that are tried, of each matrix."""
    return AWQ_SCALES * work.sum(
        lambda w, own: (
            SECONDS_PER_SCALE + _rows(w) * w.shape[1] * (own.nearest + 2 * w.shape[1] * work.pace.wide_product)
        )
    )


def _smoothquant(work: Work) -> float:
    """Runs of blocks on one sample."""
    length = work.plan.recipe.calibration.length
    rounding = work.sum(
        lambda w, own: FOLDS_PER_MATRIX * prod(w.shape) * (own.coarse + BYTES_PER_RESCALED * work.pace.touched)
    )
    runs = FOLDS * (work.forward(length) + SECONDS_PER_RUN * work.layers)
    return RUNS_PER_FOLD * (runs + work.rounding_activations(length) + rounding)


def _descent(work: Work) -> float:
    """What all weights of a row miss, times the Hessian, once a sweep; the rest is measured as a solver is."""
    return SWEEPS * work.sum(lambda w, _: 2 * w.shape[0] * w.shape[1] ** 2 * work.pace.wide_product)


def _guided(work: Work) -> float:
    """A pass back over some of the text: every block runs twice, and once backwards, in float32; so does the head."""
    plan = work.plan
    asked, solved = plan.recipe.calibration, [weight for weight in plan.schemes if weight.block]
    tokens = guiding_tokens(asked.samples, asked.length)
    products = work.products + 2 * work.vocabulary * hidden_size(plan.checkpoint)
    seen = sum(2 * work.share(w) * w.shape[0] * min(w.shape[0], outputs.WIDEST) for w in solved)
    owed = sum(prod(w.shape) * min(w.shape[0], outputs.WIDEST) for w in solved)
    return tokens * (3 * products + seen) * work.pace.wide_product + owed * work.pace.product


def _polish(work: Work) -> float:
    """Passes in float32, through blocks and head."""
    head = 2 * hidden_size(work.plan.checkpoint) * work.vocabulary * work.pace.wide_product
    wide = max(1.0, work.pace.wide_product / work.pace.product)
    return POLISH_PASSES * (wide * work.forward(work.tokens) + head * work.tokens)


def _learned(work: Work) -> float:
    """Steps forward and, at twice the cost, back, with all that is read and written of each weight; and the passes that
    tell whether they were worth it."""
    forward = work.forward(min(work.tokens, BATCH_TOKENS))
    moved = work.sum(lambda w, own: prod(w.shape) * BYTES_PER_STEP * work.pace.touched)
    return LEARNING_STEPS * (3 * forward + moved) + 2 * work.forward(work.tokens)


SECONDS_OF: dict[str, Callable[[Work], float]] = {
    "awq": _awq,
    "smoothquant": _smoothquant,
    "descent": _descent,
    "polish": _polish,
    "learned": _learned,
}
"""By the name of a transform, a solver of blocks or a refinement: what it takes beside the passes over the blocks,
their statistics and solvers of matrices."""


def _rows(weight: Weight) -> int:
    """Of a matrix of which errors are estimated."""
    return min(weight.shape[0], max(32, ERROR_PRODUCTS // weight.shape[1] ** 2))


def _summing(width: int) -> float:
    """Operations by which a token is added to a statistic that is kept up in stripes of an eighth."""
    return 1.125 * width**2


@dataclass(frozen=True)
class Microbenchmark:
    """Small pieces of a run, done with random numbers."""

    plan: Plan
    device: torch.device
    together: int = 1
    taken: list[tuple[float, float]] = field(default_factory=list)
    """Of each piece, seconds of all times that it was done, and what as many of the fastest would have taken."""

    @cached_property
    def _weights(self) -> int:
        """In all matrices of the plan."""
        return sum(prod(weight.shape) for weight in self.plan.schemes)

    @property
    def crowding(self) -> float:
        """How much longer pieces take than at their best, as others use the machine too: a piece alone is too short to
        tell."""
        return sum(all_of_it for all_of_it, _ in self.taken) / sum(best for _, best in self.taken)

    def machine(self, scratch: Path) -> Pace:
        """What all matrices share."""
        width = min(MAX_WIDTH, max((w.shape[1] for w in self.plan.schemes), default=hidden_size(self.plan.checkpoint)))
        x = self._random(SAMPLE_TOKENS, width)
        narrow = x.to(self.plan.checkpoint.dtype)
        product = wide = factoring = inf
        if self.plan.calibrated:
            w, statistics = self._random(width, width).to(narrow.dtype), Statistics(width, self.device)
            product = self._seconds(lambda: narrow @ w.T) / (2 * SAMPLE_TOKENS * width**2)
            wide = self._seconds(lambda: statistics.add(x)) / (SAMPLE_TOKENS * _summing(width))
        if self.plan.calibrated and self.plan.method.solver in FACTORING:
            factoring = self._seconds(lambda: self._filled(width, x).factor()) / (width**3 / 3)
        touched = self._seconds(lambda: narrow.mul(2)) / (2 * narrow.nbytes)
        return Pace(product, wide, factoring, touched, self._reading(), _writing(scratch))

    def matrix(self, scheme: Scheme) -> MatrixPace:
        """A matrix on the ways that those of the plan take."""
        of_scheme = [weight for weight, s in self.plan.schemes.items() if s == scheme]
        out, width = max((weight.shape for weight in of_scheme), key=prod)
        width = min(width, MAX_WIDTH)
        rows = min(SAMPLE_WEIGHTS, self._weights // WEIGHTS_SHARE) // width
        out = min(out, max(ROWS, rows // ROWS * ROWS))
        w = self._random(out, width).to(self.plan.checkpoint.dtype)
        solved = [self.plan.calibrated and weight.block is not None for weight in of_scheme]
        calibrated = self._calibrated(w, scheme) if any(solved) else MatrixPace()
        return calibrated if all(solved) else replace(calibrated, streaming=self._streaming(w, scheme))

    def _streaming(self, w: Tensor, scheme: Scheme) -> float:
        solver = SOLVERS["nearest" if self.plan.calibrated else self.plan.method.solver]
        rounded = partial(solver, w, scheme.weight)
        with _threads(max(1, torch.get_num_threads() // self.together)):
            committing = self._committing(rounded())
            made_elsewhere = self.plan.recipe.method in OTHER_COMMANDS
            return (committing + (0.0 if made_elsewhere else self._seconds(rounded))) / w.numel()

    def _calibrated(self, w: Tensor, scheme: Scheme) -> MatrixPace:
        method, width = self.plan.method, w.shape[1]
        nearest = partial(SOLVERS["nearest"], w, scheme.weight)

        def rounding(search: bool = True) -> float:
            return self._seconds(lambda: nearest(search=search).decode()) / w.numel()

        statistics = self._filled(width, self._random(SAMPLE_TOKENS, width))
        solver = method.solver if method.solver in SOLVERS else "nearest"  # in place of one that needs a whole block
        solve = partial(SOLVERS[solver], w, scheme.weight)
        if method.calibrated:
            solve = partial(solved, solver, method.refinements, w, scheme.weight, statistics)
        return MatrixPace(
            solving=self._seconds(solve) / w.numel(),
            nearest=rounding() if "awq" in method.transforms else 0.0,
            coarse=rounding(search=False) if "smoothquant" in method.transforms else 0.0,
            committing=self._committing(nearest()) / w.numel(),
            activation=self._activation(scheme, statistics),
        )

    def _committing(self, q: Quantized) -> float:
        target = self.plan.target

        def there_and_back() -> None:
            packed = target.pack(q)
            q.decode()
            target.unpack(packed, q.scheme, q.shape)

        return self._seconds(there_and_back)

    def _activation(self, scheme: Scheme, statistics: Statistics) -> float:
        if not isinstance(scheme, WeightActivation):
            return 0.0
        grid, seen = scheme.activations, statistics.activation_stats
        quant, x = ActivationQuant(grid, grid.fit(seen, "max")), self._random(BATCH_TOKENS, statistics.width)
        x = x.to(self.plan.checkpoint.dtype)
        return self._seconds(lambda: quant.round(x)) / x.numel()

    def _filled(self, width: int, x: Tensor) -> Statistics:
        statistics = Statistics(width, self.device)
        statistics.add(x)
        return statistics

    def _reading(self) -> float:
        """Seconds for a byte of one of the source's tensors, of no great size where there are such."""
        plan = self.plan
        tensor = min(plan.checkpoint.tensors().items(), key=lambda item: abs(prod(item[1]) - SAMPLE_WEIGHTS))[0]
        started = perf_counter()
        size_bytes = plan.checkpoint.replaced(rotation=None).read(tensor).nbytes
        return _elapsed(started) / max(size_bytes, 1)

    def _random(self, rows: int, width: int) -> Tensor:
        return torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(self.device)

    def _seconds(self, work: Callable[[], Any]) -> float:
        """Of doing it once, at its best; but for the first time, which loads kernels."""
        work()
        wait(self.device)
        times: list[float] = []
        while len(times) < MIN_REPEATS or sum(times) < min(MAX_SECONDS, SECONDS_PER_WEIGHT * self._weights):
            started = perf_counter()
            work()
            wait(self.device)
            times.append(_elapsed(started))
        self.taken.append((sum(times), min(times) * len(times)))
        return min(times)


def _writing(folder: Path) -> float:
    """Seconds for a byte in a file that has no name. Of a disk that takes none, nothing is known: the run will say what
    is wrong with it."""
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    piece = bytes(WRITTEN_BYTES)
    started = perf_counter()
    try:
        with TemporaryFile(dir=there) as file:
            file.write(piece)
    except OSError:
        return 0.0
    return _elapsed(started) / WRITTEN_BYTES


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """With so many threads of torch and of compiled kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _elapsed(started: float) -> float:
    return max(perf_counter() - started, 1e-9)
