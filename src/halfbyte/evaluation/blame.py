"""Which part broke it: parts of a quantized model are put back as they were, one at a time, and what each gives back in
KL divergence is measured.

All trials run in one pass. A block is loaded once, and the hidden states of every trial before it go on through it; a
trial of the block itself begins there, where until then everything is as in the quantized model. So L blocks take L / 2
times the work of one evaluation, and not L times.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Int64
from torch import Tensor

from halfbyte.errors import BadRequest, Unsupported
from halfbyte.evaluation.divergence import Tokens, joined, mean_and_error, scores, windows_at_once
from halfbyte.models import experts, roles
from halfbyte.models.block import Block
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.ends import Ends
from halfbyte.models.placement import Placement
from halfbyte.models.precision import COARSEST
from halfbyte.models.streams import Stream
from halfbyte.models.walk import Walk
from halfbyte.models.weight import Weight
from halfbyte.names import Expert
from halfbyte.progress import Progress, silent

BLOCK, WEIGHT, EMBEDDING, HEAD, CACHE = "block", "weight", "embedding", "head", "KV cache"


@dataclass(frozen=True)
class Trial:
    """What is put back together."""

    name: str
    kind: str
    weights: tuple[str, ...] = ()
    """Of a block: names of the weights; none: all of it."""


@dataclass(frozen=True)
class GivenBack:
    """What a trial was good for, in nats per token: the mean and its standard error over windows."""

    trial: Trial
    kl: tuple[float, float | None]


@dataclass(frozen=True)
class Attribution:
    """The divergence of the model as it is, and what each trial takes off it, most first."""

    kl: tuple[float, float | None]
    parts: list[GivenBack]


@torch.no_grad()
def blame(
    model: Checkpoint,
    original: Checkpoint,
    windows: Int64[Tensor, "windows length"],
    first_scored: int = 0,
    blocks: int = 3,
    folded: Sequence[Iterable[str]] = (),
    progress: Progress = silent,
    placement: Placement | None = None,
) -> Attribution:
    """Every block, the embedding, the head and the KV cache put back in turn, then the weights of those `blocks` that
    gave back most.

    `first_scored`: the first position of each window whose prediction is scored. `folded`: modules that share a scale,
    which are put back together. Raises Unsupported for models whose blocks hand on more than hidden states, and
    BadRequest where nothing differs.
    """
    search = _Search(model, original, windows, first_scored, folded, progress, placement or Placement())
    by_block = search.measure({name: [Trial(name, BLOCK)] for name in search.differing}, outside=True)
    if not by_block.parts:
        raise BadRequest(f"{model.path} computes what {original.path} does: there is nothing to blame")
    worst = [part.trial.name for part in by_block.parts if part.trial.kind == BLOCK][:blocks]
    trials = {name: search.weight_trials(name) for name in worst}
    if not any(trials.values()):
        return by_block
    by_weight = search.measure(
        {name: block_trials for name, block_trials in trials.items() if block_trials}, outside=False
    )
    return Attribution(by_block.kl, [*by_block.parts, *by_weight.parts])


class _Search:
    """Two checkpoints and a text, and what differs between them."""

    def __init__(
        self,
        model: Checkpoint,
        original: Checkpoint,
        windows: Tensor,
        first_scored: int,
        folded: Sequence[Iterable[str]],
        progress: Progress,
        placement: Placement,
    ):
        self.model, self.original, self.windows, self.first_scored = model, original, windows, first_scored
        self.folded, self.progress, self.placement = [set(group) for group in folded], progress, placement
        self.apart = experts.unstacked(original)
        self.homes: dict[str, tuple[Checkpoint, Weight]] = {
            w.name: (checkpoint, w) for checkpoint in (self.apart, original) for w in checkpoint.weights()
        }
        """Every weight of the original, with experts spelled apart and together."""
        self.weights: dict[str, list[Weight]] = {}
        for weight in model.weights():
            if weight.block and not self._is_same(weight):
                self.weights.setdefault(weight.block, []).append(weight)
        self.differing = list(self.weights)
        """Blocks with a weight that is not as it was, in their order."""

    def _is_same(self, weight: Weight) -> bool:
        return self.model.read_inputs(weight.name) is None and self.model.same(weight.tensor, self.original)

    def weight_trials(self, block: str) -> list[Trial]:
        """One for each weight of a block, for all experts of a kind, and for what shares a scale; none where one alone
        cannot be put back."""
        if not self._knows_folds(block):
            return []
        groups: dict[str, dict[str, list[str]]] = {}
        for weight in self.weights[block]:
            expert = Expert.of(weight.name)
            name = f"{expert.home}.*.{expert.part}" if expert else weight.name
            shared = next((f for f in self.fold_groups(block) if f & self._modules(weight)), None)
            groups.setdefault(min(shared) if shared else name, {}).setdefault(name, []).append(weight.name)
        trials = [Trial(", ".join(kinds), WEIGHT, tuple(chain(*kinds.values()))) for kinds in groups.values()]
        return trials if len(trials) > 1 else []

    def _modules(self, weight: Weight) -> set[str]:
        """All that a weight is called by: in the model, in the original, and there as a part of a stack."""
        names = {weight.name, weight.tensor}
        if home := self.homes.get(weight.name):
            part = self.apart.expert_slices.get(home[1].tensor)
            names |= {home[1].tensor, *([part.stack] if part else ())}
        return {name.removesuffix(".weight") for name in names}

    def fold_groups(self, block: str) -> list[set[str]]:
        """Modules of a block that share scales with one another."""
        groups: list[set[str]] = []
        for fold in (f for f in self.folded if any(name.startswith(f"{block}.") for name in f)):
            touching = [group for group in groups if group & fold]
            groups = [group for group in groups if group not in touching] + [fold.union(*touching)]
        return groups

    def _knows_folds(self, block: str) -> bool:
        """Whether nothing in the block was rescaled but what is known: a norm that took up a scale has other values."""
        weights = {w.tensor for w in self.weights[block]}
        folded = {name for group in self.fold_groups(block) for name in group}
        others = [
            tensor
            for tensor in self.model.tensors()
            if roles.block_of(tensor) == block and tensor not in weights and tensor.rpartition(".")[0] not in folded
        ]
        return all(_near(self.model.read(tensor), self.original.read(tensor)) for tensor in others)

    def measure(self, trials: Mapping[str, Sequence[Trial]], outside: bool) -> Attribution:
        """What trials within blocks give back, and with `outside` the parts that are in no block."""
        count = 3 + sum(map(len, trials.values()))
        at_once = windows_at_once(self.original, self.windows.shape[1], count * torch.float32.itemsize)
        baselines: list[Tokens] = []
        tried: dict[Trial, list[Tokens]] = {}
        slices = self.windows.split(at_once)
        for number, part in enumerate(slices):
            one = _Pass(self, part, trials, outside)
            baseline, by_trial = one.run(
                lambda done, number=number: self.progress("trying", number + done, len(slices))
            )
            baselines.append(baseline)
            for trial, tokens in by_trial.items():
                tried.setdefault(trial, []).append(tokens)
        kl = joined(baselines).kl
        given = [GivenBack(trial, mean_and_error(kl - joined(tokens).kl)) for trial, tokens in tried.items()]
        return Attribution(mean_and_error(kl), sorted(given, key=lambda g: -g.kl[0]))


class _Pass:
    """Some windows through the original, the model, and all trials."""

    def __init__(self, search: _Search, windows: Tensor, trials: Mapping[str, Sequence[Trial]], outside: bool):
        self.search, self.trials, self.outside = search, trials, outside
        self.windows = windows
        self.original = self._walk(search.original)
        self.model = self._walk(search.model)
        self.streams: dict[Trial, Stream] = {}

    def _walk(self, checkpoint: Checkpoint) -> Walk:
        return Walk(checkpoint, self.windows, torch.float32, self.search.placement, fake_quantize_activations=True)

    def run(self, progress: Callable[[float], None]) -> tuple[Tokens, dict[Trial, Tokens]]:
        """Scores of the model as it is, and of every trial."""
        walks = [self.original, self.model]
        embedded = self._run_original()
        for number, block in enumerate(self.model):
            if number == 0:
                if self.model.calls.carries:
                    raise Unsupported(
                        f"'{self.search.model.model_type}' hands on more than hidden states from block to block, which "
                        "blame does not follow; halfbyte eval measures the model as a whole"
                    )
                if self.outside and not _equal(embedded, self.model.inputs):
                    self.streams[Trial("embedding", EMBEDDING)] = embedded.fork()
            self._go_on(block)
            progress(number / len(self.model.blocks))
        for walk in walks:
            walk.ends.finish()
        trial_ends = {trial: self.model.ends.given(hidden) for trial, hidden in self.streams.items()}
        for ends in trial_ends.values():
            ends.finish()
        if self.outside:
            trial_ends |= self._outside()
        measured = scores([*(walk.ends for walk in walks), *trial_ends.values()], self.search.first_scored)
        return measured[1], dict(zip(trial_ends, measured[2:], strict=True))

    def _run_original(self) -> Stream:
        """Returns what its first block reads."""
        embedded = None
        for _ in self.original:
            embedded = embedded or self.original.inputs.fork()
        if embedded is None:
            raise BadRequest(f"{self.search.original.path} has no blocks")
        return embedded

    def _go_on(self, block: Block) -> None:
        for hidden in self.streams.values():
            self._advance(block, hidden)
        for trial in self.trials.get(block.name, ()):
            hidden = self.model.inputs.fork()
            with self._put_back(block, trial):
                self._advance(block, hidden)
            self.streams[trial] = hidden

    def _advance(self, block: Block, hidden: Stream) -> None:
        for batch in range(len(hidden)):
            hidden[batch] = self.model.fitting(lambda batch=batch: block.run(hidden[batch], batch))

    @contextmanager
    def _put_back(self, block: Block, trial: Trial) -> Iterator[None]:
        """While this lasts, the block computes with what the original has in these weights, or in all its tensors."""
        search = self.search
        weights = [w for w in block.weights if not trial.weights or w.name in trial.weights]
        lost = next((w.name for w in weights if w.name not in search.homes), None)
        if lost:
            raise BadRequest(f"{search.original.path} has no weight '{lost}'; name the model that this one was made of")
        owned = {w.tensor for w in block.weights}
        folded = {name for group in search.fold_groups(block.name) if group & set(trial.weights) for name in group}
        others = [t for t in block.tensors if t not in owned and (not trial.weights or t.rpartition(".")[0] in folded)]
        with block.trial(*{w.tensor for w in weights}, *others):
            for weight in weights:
                home, original_weight = search.homes[weight.name]
                block.weight(weight).copy_(home.read_weight(original_weight))
                block.activations.pop(weight, None)
            for tensor in others:
                block.view(tensor).copy_(search.original.read(tensor))
            yield

    def _outside(self) -> dict[Trial, Ends]:
        """The head and the cache in place of the model's own."""
        trial_ends = {}
        if not self.model.ends.same_head(self.original.ends):
            trial_ends[Trial("head", HEAD)] = self.original.ends.given(self.model.inputs)
        if self.search.model.kv:
            walk = self._walk(self.search.model.replaced(kv=None))
            for _ in walk:
                pass
            walk.ends.finish()
            trial_ends[Trial("KV cache", CACHE)] = walk.ends
        return trial_ends


def _equal(one: Stream, other: Stream) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _near(values: Tensor, reference: Tensor) -> bool:
    """Whether these are the same numbers, but for the rounding of 16 bits."""
    return bool((values.double() - reference.double()).norm() <= COARSEST * reference.double().norm())
