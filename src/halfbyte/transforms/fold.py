"""Folds: a scale per channel that moves from a norm or a linear into the weights that read its output.

Which tensors can give the scale up, and which weights must take it, is found by trying: divide the channels of a
candidate by powers of two, run the probe, and see whose input came out divided. Multiply those weights' columns back,
and the block's output must be what it was. Powers of two pass through 16-bit arithmetic unrounded, so a true fold is
exact to the last bit wherever the family's own code is, and a false one is off by tens of percent.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from halfbyte.models.block import PROBE, Block, Snapshot
from halfbyte.models.matmuls import Matrix
from halfbyte.models.weight import Weight

EXACT, ROUNDED = 1e-3, 0.02
"""Of what a matrix reads, or of the block's own contribution to the hidden states. A norm that multiplies by 1 + weight
is rounded anew in 16 bits whatever the scale; everything else takes powers of two without rounding, but for what
denormals lose."""


@dataclass(frozen=True)
class Producer:
    """What a scale can be divided out of, with its bias."""

    tensor: str
    expert: int | None = None
    rows: tuple[int, ...] | None = None
    """For a linear: the row that makes each channel. None: a norm, whose elements are the channels."""
    offset: bool = False
    """A norm that multiplies by 1 + its weight (Gemma)."""

    @property
    def bias(self) -> str:
        """The name that its bias has, if it has one."""
        return self.tensor.removesuffix(".weight") + ".bias"


@dataclass(frozen=True)
class Fold:
    """Dividing `producer` by s and multiplying the columns of `readers` by s leaves the block's function as it is."""

    producer: Producer
    readers: tuple[Matrix, ...]

    def channels(self, scale: Float32[Tensor, " rows"]) -> Float32[Tensor, " channels"]:
        """A scale per row of the producer, as the readers see it."""
        return scale if self.producer.rows is None else scale[list(self.producer.rows)]


class Finder:
    """Finds the folds of one block after another; what held in one is tried first, and proved again, in the next."""

    def __init__(self) -> None:
        self.cached: dict[frozenset[str], list[tuple[str, tuple[int, ...] | None, bool]]] = {}

    def find(self, block: Block) -> list[Fold]:
        """The folds of a block, each proved on the probe."""
        structure = frozenset(pattern(t, block) + str(tuple(block.view(t).shape)) for t in block.tensors)
        proof = Proof(block)
        hypotheses = self.cached[structure] if structure in self.cached else list(self._hypotheses(proof))
        folds, held, settled = [], [], set()
        for name, rows, offset in hypotheses:
            if name in settled:
                continue
            producers = [Producer(t, e, rows, offset) for t, e in proof.members(name)]
            if proved := proof.prove(producers, {m for fold in folds for m in fold.readers}):
                folds += proved
                held.append((name, rows, offset))
                settled.add(name)
        self.cached[structure] = held
        return folds

    def _hypotheses(self, proof: "Proof") -> Iterator[tuple[str, tuple[int, ...] | None, bool]]:
        widths = sorted({view.shape[1] for view in proof.matrices.values()})
        for name in proof.vectors:
            yield name, None, False
            yield name, None, True
        for name in dict.fromkeys(_pattern_of(m, proof.block) for m in proof.matrices):
            out = next(view.shape[0] for m, view in proof.matrices.items() if _pattern_of(m, proof.block) == name)
            for width in widths:
                for rows in dict.fromkeys(r for head in proof.block.head_dims for r in row_maps(out, width, head)):
                    yield name, rows, False


def row_maps(out: int, width: int, head: int) -> Iterator[tuple[int, ...]]:
    """Ways in which `out` rows can make `width` channels, by how families lay out values, gates and heads."""
    if out == width:
        yield tuple(range(width))
    elif out < width and width % out == 0:  # values shared by groups of query heads
        yield from _heads(out, width, head, chunk=head)
    elif out > width:
        values = (out - width) // 2
        if (out - width) % 2 == 0 and width % values == 0:  # q, k and v in one matrix
            yield from _heads(values, width, head, chunk=head, first=out - values)
            yield from _heads(
                values, width, head, chunk=(width // values + 2) * head
            )  # group by group: GPT-NeoX, Falcon
        if width % head == 0 and out % (width // head) == 0:  # k and v head by head, of different widths: DeepSeek
            yield from _heads(width, width, head, chunk=out // (width // head))
        if out == 2 * width:  # gate and up in one matrix: one after the other, or by turns
            yield from (tuple(range(width, out)), tuple(range(width)), tuple(range(1, out, 2)))


def _heads(values: int, width: int, head: int, chunk: int, first: int = 0) -> Iterator[tuple[int, ...]]:
    """`values` rows of v lie at the end of chunks, one chunk for each head of v; `width` channels read them, query head
    by query head."""
    if values % head == 0:
        queries = width // values
        yield tuple(first + j // head // queries * chunk + chunk - head + j % head for j in range(width))


class Proof:
    """The block on the probe: what its matrices read and what it returns, before and after a change."""

    def __init__(self, block: Block):
        self.block = block
        self.matrices = {m: block.matrix(m) for m, _ in block.matrices()}
        self.vectors = [t for t in dict.fromkeys(pattern(t, block) for t in block.tensors) if self._is_vector(t)]
        self.inputs, self.output = self._run()
        self.contribution = (self.output - block.walk.inputs[PROBE].to(self.output)).norm()
        self.generator = torch.Generator().manual_seed(0)

    def _is_vector(self, name: str) -> bool:
        views = [self.block.view(t) for t, _ in self.members(name)]
        return not name.endswith("bias") and all(v.dim() == 1 and v.is_floating_point() for v in views)

    def members(self, name: str) -> list[tuple[str, int | None]]:
        """Tensors (and experts) whose pattern is `name`: one, or as many as there are experts."""
        of_matrices = [(m.tensor, m.expert) for m in self.matrices if _pattern_of(m, self.block) == name]
        return of_matrices or [(t, None) for t in self.block.tensors if pattern(t, self.block) == name]

    def _run(self) -> tuple[dict[Matrix, Tensor], Tensor]:
        inputs: dict[Matrix, Tensor] = {}

        def note(matrices: list[Matrix], x: Tensor) -> None:
            for m in matrices:
                inputs.setdefault(m, x.float().reshape(-1, x.shape[-1]))

        return inputs, self.block.observe(note, [PROBE], self.block.walk.inputs)[0].float()

    def prove(self, producers: list[Producer], taken: set[Matrix]) -> list[Fold]:
        """Folds of one pattern of producers, all at once: each expert has its own scale and its own readers."""
        first = producer_view(self.block, producers[0])
        width = len(producers[0].rows or first)
        if width not in {view.shape[1] for view in self.matrices.values()}:
            return []
        scales = {p: 2.0 ** torch.randint(-2, 3, (first.shape[0],), generator=self.generator) for p in producers}
        tolerance = ROUNDED if producers[0].offset and first.element_size() < 4 else EXACT
        with self.block.trial(*(t for p in producers for t in (p.tensor, p.bias))) as snapshot:
            for producer in producers:
                divide(self.block, producer, scales[producer])
            folds, output = self._mended(snapshot, scales, taken, width, tolerance)
            unchanged = (output - self.output).norm() <= tolerance * self.contribution
            return [fold for fold in folds if fold.readers] if unchanged else []

    def _mended(
        self, snapshot: Snapshot, scales: dict[Producer, Tensor], taken: set[Matrix], width: int, tolerance: float
    ) -> tuple[list[Fold], Tensor]:
        """Multiply the columns of all that reads divided channels. The folds, none where a reader is taken; and the
        block's output."""
        producers = list(scales)
        folds = {p: Fold(p, ()) for p in producers}
        readers: set[str] = set()
        output = self.output
        for _ in range(4):  # a router that reads the scaled norm must be mended before its experts show what they read
            inputs, output = self._run()
            divided = self._divided(inputs, folds, scales, width, tolerance)
            more = {_pattern_of(m, self.block) for m in divided} - readers
            if not more:
                break
            readers |= more
            for m, view in self.matrices.items():
                if _pattern_of(m, self.block) in more:
                    if m in taken:
                        return [], output
                    fold = folds[self._partner(m, producers)]
                    snapshot.save(m.tensor)
                    view.mul_(fold.channels(scales[fold.producer]).to(view))
                    folds[fold.producer] = Fold(fold.producer, (*fold.readers, m))
        return list(folds.values()), output

    def _divided(
        self,
        inputs: dict[Matrix, Tensor],
        folds: dict[Producer, Fold],
        scales: dict[Producer, Tensor],
        width: int,
        tolerance: float,
    ) -> Iterator[Matrix]:
        for m, x in inputs.items():
            was = self.inputs.get(m)
            if x.shape[-1] == width and was is not None and x.shape == was.shape:
                producer = self._partner(m, list(folds))
                scale = folds[producer].channels(scales[producer]).to(x)
                if was.any() and (x * scale - was).norm() <= tolerance * was.norm() and not torch.equal(x, was):
                    yield m

    def _partner(self, m: Matrix, producers: list[Producer]) -> Producer:
        same = [p for p in producers if self._number(p) == self._number(m)]
        return same[0] if same else producers[0]

    def _number(self, of: Producer | Matrix) -> tuple[int | str | None, ...]:
        """Which expert: whole parts of the name only, since Mixtral's w2 reads what its w3 makes."""
        return (of.expert, *re.findall(r"\.(\d+)(?=\.)", of.tensor.removeprefix(self.block.name)))


def producer_view(block: Block, producer: Producer) -> Tensor:
    """The norm's weight, or the linear's [out, in]."""
    view = block.view(producer.tensor)
    return (
        view
        if producer.rows is None
        else block.matrix(Matrix(producer.tensor, producer.expert, weight_of(block, producer)))
    )


def weight_of(block: Block, producer: Producer) -> Weight | None:
    """The weight that the producer is, if it is one."""
    return next((w for w in block.weights if w.tensor == producer.tensor and w.expert == producer.expert), None)


def divide(block: Block, producer: Producer, scale: Float32[Tensor, " rows"]) -> Float32[Tensor, " rows"]:
    """Divide the producer and its bias in memory. Returns the scale that a norm's rounded weight really stands for."""
    view = producer_view(block, producer)
    scale = scale.to(view.device)
    if producer.rows is not None:
        scale = only_used(producer, scale)
        view.div_(scale[:, None].to(view.dtype) if _powers_of_two(scale) else scale[:, None])
    else:
        one = float(producer.offset)
        plain = view.float() + one
        view.copy_(plain / scale - one)
        stored = view.float() + one
        scale = torch.where((plain == 0) | (stored == 0), torch.ones_like(scale), plain / stored)
    if producer.bias in block.tensors:
        bias = block.view(producer.bias)
        bias.copy_(bias.float() / scale)
    return scale


def only_used(producer: Producer, scale: Float32[Tensor, " rows"]) -> Float32[Tensor, " rows"]:
    """The scale with 1 for rows that make no channel, such as those of q and k beside v."""
    if producer.rows is None:
        return scale
    used = torch.zeros_like(scale, dtype=torch.bool)
    used[list(producer.rows)] = True
    return torch.where(used, scale, 1.0)


def _powers_of_two(scale: Tensor) -> bool:
    return bool((scale.log2() == scale.log2().round()).all())


def pattern(tensor: str, block: Block) -> str:
    """A tensor's name within its block, numbers of experts struck out."""
    return re.sub(r"\.\d+\.", ".*.", tensor.removeprefix(block.name))


def _pattern_of(m: Matrix, block: Block) -> str:
    """`pattern` of the tensor that a matrix lies in."""
    return pattern(m.tensor, block)
