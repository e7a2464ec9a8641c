"""What reads the residual stream of a model, and what writes into it, found in its data flow and proved on it.

Nothing is known of architectures. What reads a norm is found as every fold is (fold.py); matrices of as many rows as
the stream has channels are taken to write into it, and then the block is run: rotated hidden states must make rotated
hidden states. Where they do not, fewer of the matrices are taken to write; where none of the choices holds, the model
is refused. At last the whole rotated model runs beside the original, block by block.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.errors import Unsupported
from halfbyte.models import roles
from halfbyte.models.block import PROBE, Block
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.linears import predicts_ahead
from halfbyte.models.walk import Walk
from halfbyte.transforms.fold import EXACT, Finder, Fold, pattern
from halfbyte.transforms.orthogonal import Rotation, hadamard
from halfbyte.transforms.turned import (
    IN,
    OUT,
    Found,
    GivesGain,
    Norm,
    Step,
    TakesGain,
    TensorSteps,
    Turn,
    Turned,
    Without,
    apply,
)

SAMPLES, LENGTH = 2, 32
"""Random tokens on which all is proved."""
MOST_WRITERS = 6
"""Kinds of matrices in a block that may write into the stream: any of their subsets are tried."""


Steps = dict[str, list[Step]]
"""What is done to each tensor of a block."""


class BlockRoles(NamedTuple):
    """Of blocks of one structure, by the patterns of tensors' names."""

    norms: Mapping[str, tuple[bool, frozenset[str]]]
    """Norms of the stream: whether they multiply by 1 + their weight, and what reads them."""
    writers: frozenset[str]


class Heads(NamedTuple):
    """Values of attention heads: what makes them and what reads them, by pattern."""

    producer: str
    readers: frozenset[str]
    made: Tensor
    """[heads, channels] of the rows that make them."""
    read: Tensor
    """Of the columns that read them."""
    rotation: Rotation


def find(checkpoint: Checkpoint, seed: int) -> Found:
    """What becomes of each tensor under a Hadamard rotation of the residual stream, and of the values of heads where
    that holds. Raises Unsupported for a model that does not bear it."""
    search = Search(checkpoint, seed)
    search.run()
    return Found(search.steps, search.rotation, search.prove())


class Search:
    """Of one model, in two passes: the original's, which finds, and the rotated one's, which proves."""

    def __init__(self, checkpoint: Checkpoint, seed: int):
        self.checkpoint, self.seed = checkpoint, seed
        vocabulary = checkpoint.settings().get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, vocabulary, (SAMPLES, LENGTH), generator=generator)
        self.walk = Walk(checkpoint, self.tokens, torch.float32)
        self.finder = Finder()
        self.known: dict[frozenset[str], tuple[BlockRoles, list[Heads]]] = {}
        self.steps: dict[str, TensorSteps] = {}
        self.states: list[Tensor] = []
        """What each block of the original reads."""
        self.offset = False
        """Whether the norms of the stream multiply by 1 + their weights."""
        self.rotation: Rotation
        self.width: int

    def run(self) -> None:
        """Find what becomes of each tensor. Raises Unsupported."""
        self._require_text_alone()
        for number, block in enumerate(self.walk):
            self.states.append(self.walk.inputs[PROBE + 1])
            if number == 0:
                self.width = self.states[0].shape[-1]
                self._choose(block)
            found, heads = self._roles(block, self.rotation)
            self._note(block, of_stream(block, found, self.rotation), of_heads(block, heads))
        self.logits = torch.cat([logits for _, logits in self.walk.logits()])
        self._outside()

    def _refused(self, why: str) -> Unsupported:
        return Unsupported(f"rotate: '{self.checkpoint.model_type}' {why}; use a method without it, such as gptq")

    def _require_text_alone(self) -> None:
        """Raise where something reads or writes hidden states that text does not run through."""
        walk, shapes = self.walk, self.checkpoint.tensors()
        if not walk.ends.predicts:
            raise self._refused("predicts no tokens, and whoever takes its hidden states would find them rotated")
        if walk.shared:
            raise self._refused("shares weights between blocks, each of which has norms of its own")
        if ahead := next((t for t in shapes if predicts_ahead(self.checkpoint, t)), None):
            raise self._refused(f"predicts further tokens ahead from hidden states ('{ahead}'), which is not followed")
        blind = (t for t, view in walk.weight_map.items() if roles.FOREIGN.search(view.parameter))
        unread = (t for t in shapes if t not in walk.weight_map and len(shapes[t]) == 2 and "rotary" not in t)
        if other := next(blind, None) or next(unread, None):
            raise self._refused(f"has parts that text does not run through, such as '{other}'")

    def _choose(self, block: Block) -> None:
        """The rotation: that which keeps means where norms subtract them."""
        for keeps_mean in (False, True):
            self.rotation = hadamard(self.width, self.seed, keeps_mean)
            with suppress(Unsupported):
                self._roles(block, self.rotation)
                return
        raise self._unbearable(block)

    def _unbearable(self, block: Block) -> Unsupported:
        return self._refused(
            f"does something to hidden states in {block.name} that no rotation passes through (norms after attention "
            "or the MLP, weights by channel)"
        )

    def _roles(self, block: Block, rotation: Rotation) -> tuple[BlockRoles, list[Heads]]:
        structure = frozenset(pattern(t, block) + str(tuple(block.view(t).shape)) for t in block.tensors)
        if structure not in self.known:
            folds = self.finder.find(block)
            self.known[structure] = self._stream(block, folds, rotation), self._heads(block, folds)
        return self.known[structure]

    def _stream(self, block: Block, folds: list[Fold], rotation: Rotation) -> BlockRoles:
        """Norms and writers of the stream."""
        norms = {}
        for fold in folds:
            if fold.producer.rows is None and self.checkpoint.tensors()[fold.producer.tensor] == (self.width,):
                readers = frozenset(pattern(m.tensor, block) for m in fold.readers)
                norms[pattern(fold.producer.tensor, block)] = fold.producer.offset, readers
        reading = frozenset().union(*(readers for _, readers in norms.values()))
        made = {pattern(m.tensor, block): block.matrix(m).shape[0] for m, _ in block.matrices()}
        writing = [p for p, out in made.items() if out == self.width and p not in reading]
        if norms and len(writing) <= MOST_WRITERS:
            for count in range(len(writing), 0, -1):
                for chosen in combinations(writing, count):
                    found = BlockRoles(norms, frozenset(chosen))
                    if holds(block, of_stream(block, found, rotation), rotation):
                        self.offset = next(iter(norms.values()))[0]
                        return found
        raise self._unbearable(block)

    def _heads(self, block: Block, folds: list[Fold]) -> list[Heads]:
        """What makes and reads values that may be turned head by head."""
        found = []
        for fold in folds:
            for width in sorted(block.head_dims, reverse=True):
                if fold.producer.rows is not None and width > 1 and len(fold.producer.rows) % width == 0:
                    heads = heads_of(block, fold, hadamard(width, self.seed))
                    if holds(block, of_heads(block, [heads]), None):
                        found.append(heads)
                        break
        return found

    def _note(self, block: Block, of_stream: Steps, of_heads: Steps) -> None:
        transposed = {w.tensor for w in block.weights if w.transposed}
        for tensor in of_stream.keys() | of_heads.keys():
            steps = (*of_stream.get(tensor, ()), *of_heads.get(tensor, ()))
            self.steps[tensor] = TensorSteps(steps, tensor in transposed)

    def _outside(self) -> None:
        """Embeddings write into the stream, and the head reads the last norm of it."""
        walk, shapes, rotation = self.walk, self.checkpoint.tensors(), self.rotation
        outside = [t for t, view in walk.weight_map.items() if view.parameter in set(walk.outside)]
        weights = [t for t in outside if shapes[t] == (self.width,) and not t.endswith("bias")]
        if len(weights) != 1:
            raise self._refused(
                f"has {len(weights)} norms outside of its blocks, where one before the head is expected"
            )
        norm = Norm(weights[0], self.offset)
        self.steps[norm.weight] = TensorSteps((Without(norm.offset),))
        bias = norm.weight.removesuffix(".weight") + ".bias"
        if bias in shapes:
            self.steps[bias] = TensorSteps((GivesGain(norm), Turn(rotation)))
        for tensor in outside:
            if roles.is_head(tensor):
                self.steps[tensor] = TensorSteps((TakesGain(norm), Turn(rotation)))
            elif len(shapes[tensor]) == 2 and shapes[tensor][-1] == self.width:
                self.steps[tensor] = TensorSteps((Turn(rotation),))

    def prove(self) -> float:
        """Run the rotated model beside the original. Returns how far its logits are off; raises Unsupported."""
        found = Found(self.steps, self.rotation, 0.0)
        source = self.checkpoint
        other = source.replaced(rotation=Turned(source, source, lambda: found, self.seed))
        walk = Walk(other, self.tokens, torch.float32)
        for block, was in zip(walk, self.states, strict=True):
            if difference(walk.inputs[PROBE + 1], self.rotation.apply(was)) > EXACT:
                raise self._refused(f"computes something else before {block.name} when its hidden states are rotated")
        error = difference(torch.cat([logits for _, logits in walk.logits()]), self.logits)
        if not error <= EXACT:
            raise self._refused(
                f"predicts something else when its hidden states are rotated (logits off by {error:.2g})"
            )
        return error


def of_stream(block: Block, found: BlockRoles, rotation: Rotation) -> Steps:
    """Where hidden states are rotated."""
    named, steps = by_pattern(block), defaultdict(list)
    for name, (offset, readers) in found.norms.items():
        norm = Norm(named[name][0], offset)
        steps[norm.weight].append(Without(offset))
        for bias in biases(norm.weight, block):
            steps[bias] += [GivesGain(norm), Turn(rotation)]
        for tensor in (t for reader in readers for t in named[reader]):
            steps[tensor] += [TakesGain(norm), Turn(rotation)]
    for tensor in (t for writer in found.writers for t in named[writer]):
        steps[tensor].append(Turn(rotation, OUT))
        for bias in biases(tensor, block):
            steps[bias].append(Turn(rotation))
    return dict(steps)


def of_heads(block: Block, heads: list[Heads]) -> Steps:
    """Where values of attention heads are."""
    named, steps = by_pattern(block), defaultdict(list)
    for of in heads:
        for tensor in named[of.producer]:
            steps[tensor].append(Turn(of.rotation, OUT, of.made))
            for bias in biases(tensor, block):
                steps[bias].append(Turn(of.rotation, IN, of.made))
        for tensor in (t for reader in of.readers for t in named[reader]):
            steps[tensor].append(Turn(of.rotation, IN, of.read))
    return dict(steps)


def by_pattern(block: Block) -> dict[str, list[str]]:
    """Tensors of a block whose names are alike."""
    named: dict[str, list[str]] = defaultdict(list)
    for tensor in block.tensors:
        named[pattern(tensor, block)].append(tensor)
    return named


def biases(tensor: str, block: Block) -> Iterator[str]:
    """What is added to what a tensor makes; a stack of experts calls it otherwise."""
    yield from {tensor.removesuffix(".weight") + end for end in (".bias", "_bias")} & set(block.tensors)


def heads_of(block: Block, fold: Fold, rotation: Rotation) -> Heads:
    """The channels of each head, as what makes them and what reads them have them."""
    rows = torch.tensor(fold.producer.rows).view(-1, rotation.size)
    made = torch.tensor(list(dict.fromkeys(map(tuple, rows.tolist()))))
    read = torch.arange(rows.numel()).view(-1, rotation.size)
    readers = frozenset(pattern(m.tensor, block) for m in fold.readers)
    return Heads(pattern(fold.producer.tensor, block), readers, made, read, rotation)


@torch.no_grad()
def holds(block: Block, steps: Steps, rotation: Rotation | None) -> bool:
    """Whether the block, its tensors turned so, makes of rotated hidden states what it made, rotated."""
    hidden = block.walk.inputs[PROBE]
    expected = block.run(hidden, PROBE)
    transposed = {w.tensor for w in block.weights if w.transposed}
    originals = {tensor: block.view(tensor).clone() for tensor in steps}
    with block.trial(*steps):
        for tensor, done in steps.items():
            view = block.view(tensor)
            view.copy_(apply(view, done, tensor in transposed, originals.__getitem__))
        made = block.run(rotation.apply(hidden) if rotation else hidden, PROBE)
    if rotation:
        hidden, expected = rotation.apply(hidden), rotation.apply(expected)
    return bool((made - expected).norm() <= EXACT * (expected - hidden).norm())


def difference(a: Tensor, b: Tensor) -> float:
    """Relative to the second."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()
