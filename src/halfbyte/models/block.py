"""One decoder layer: its weights as views of its parameters, what they read, and what it returns."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.grids.activations import ActivationQuant
from halfbyte.models import filling, roles
from halfbyte.models.ahead import ReadAhead
from halfbyte.models.matmuls import MatmulCapture, Matrix, Report, straight_through
from halfbyte.models.streams import Hidden, Stream
from halfbyte.models.weight import Weight

if TYPE_CHECKING:
    from halfbyte.models.walk import Walk

PROBE = 0
"""The number of a batch so small that it can be run again and again."""
Scale = Float32[Tensor, " channels"]


class PendingScales:
    """Scales of rows and columns that folds have moved, not yet in memory: there they would be rounded to 16 bits."""

    def __init__(self) -> None:
        self.rows: dict[Weight, Scale] = {}
        self.columns: dict[Weight, Scale] = {}

    def divide_rows(self, weight: Weight, scale: Scale) -> None:
        """Divide the weight's rows (out-features) by a scale, beside those that it has."""
        self.rows[weight] = self.rows.get(weight, 1.0) / scale

    def multiply_columns(self, weight: Weight, scale: Scale) -> None:
        """Multiply the weight's columns (in-features) by a scale, beside those that it has."""
        self.columns[weight] = self.columns.get(weight, 1.0) * scale

    @property
    def weights(self) -> set[Weight]:
        """Those that have some."""
        return {*self.rows, *self.columns}

    def apply(self, weight: Weight, w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The weight with its scales."""
        if weight not in self.rows and weight not in self.columns:
            return w
        w = w.float()
        w = w * self.rows[weight][:, None] if weight in self.rows else w
        return w * self.columns[weight] if weight in self.columns else w

    def settle(self, weight: Weight) -> None:
        """They are in memory now."""
        self.rows.pop(weight, None)
        self.columns.pop(weight, None)

    def copy(self) -> "PendingScales":
        """One that goes its own way from here."""
        other = PendingScales()
        other.rows, other.columns = dict(self.rows), dict(self.columns)
        return other


class Snapshot:
    """What a block was before it was tried out with changes."""

    def __init__(self, block: "Block"):
        self.block = block
        self.tensors: dict[str, Tensor] = {}
        self.scales, self.activations = block.scales.copy(), dict(block.activations)

    def save(self, *tensors: str) -> None:
        """Call before these tensors are changed."""
        for tensor in tensors:
            if tensor not in self.tensors and tensor in self.block.tensors:
                self.tensors[tensor] = self.block.view(tensor).clone()

    def undo(self) -> None:
        """Put back all that was saved."""
        for tensor, value in self.tensors.items():
            self.block.view(tensor).copy_(value)
        self.block.scales, self.block.activations = self.scales, self.activations


class Block:
    """One decoder layer. Its parameters hold values between `load` and `free`."""

    def __init__(self, walk: "Walk", module: nn.Module, prefix: str, parameters: list[str]):
        self.walk, self.module, self.prefix, self.parameters = walk, module, prefix, parameters
        self.tensors = [t for t, view in walk.weight_map.items() if view.parameter.startswith(f"{prefix}.")]
        if not self.tensors:
            raise BadCheckpoint(f"the checkpoint has no tensor of {prefix}")
        self.name = roles.block_of(self.tensors[0]) or prefix
        tensors = set(self.tensors)
        self.weights = [w for w in walk.weights if w.tensor in tensors]
        self.scales = PendingScales()
        self.activations: dict[Weight, ActivationQuant] = {}
        """How what these read is rounded whenever the block runs."""

    @property
    def head_dims(self) -> list[int]:
        """Widths of one head of values, as the family's own modules state them; several where attention is of several
        kinds."""
        stated = {
            getattr(m, name)
            for m in self.module.modules()
            for name in ("v_head_dim", "head_dim", "head_size")
            if hasattr(m, name)
        }
        return sorted(stated) or [1]

    @property
    def homes(self) -> set[str]:
        """Parameters whose memory the block computes with; where blocks share some, they lie in the first of them."""
        return {self.walk.ties.get(name, name) for name in self.parameters}

    def load(self, source: ReadAhead) -> None:
        """Read its parameters, and, as served, how its weights' activations are rounded."""
        walk = self.walk
        filling.load(walk.model, source, walk.weight_map, walk.ties, self.parameters, walk.device)
        if walk.fake_quantize_activations:
            read = walk.checkpoint.read_inputs
            for weight in self.weights:
                if inputs := read(weight.name):
                    self.round_activations(weight, inputs)
            if self.activations and walk.shared:
                raise Unsupported(
                    f"'{walk.checkpoint.model_type}' shares weights between blocks, whose rounded inputs are "
                    "not followed; "
                    "round weights alone"
                )

    def round_activations(self, weight: Weight, inputs: ActivationQuant) -> None:
        """From now on, what this weight reads is rounded so whenever the block runs."""
        params = {name: p.to(self.walk.device) for name, p in inputs.params.items()}
        self.activations[weight] = ActivationQuant(inputs.grid, params)

    def free(self) -> None:
        """Take the memory back, but for what later blocks share."""
        later = self.walk.blocks[self.walk.blocks.index(self) + 1 :]
        shared = set().union(*(block.homes for block in later)) & self.walk.shared if self.walk.shared else set()
        filling.release(self.walk.model, {*self.parameters, *self.homes} - shared)

    # Its weights -----------------------------------------------------------------------------------------------------

    def view(self, tensor: str, parameter: Tensor | None = None) -> Tensor:
        """A tensor of the checkpoint, as a view of the parameter in which it lies; or of another tensor like that, such
        as a gradient."""
        param_view = self.walk.weight_map[tensor]
        if parameter is None:
            parameter = filling.tensor(self.walk.model, param_view.parameter)
        return param_view.view(parameter, self.walk.shapes[tensor])

    def weight(self, weight: Weight, parameter: Tensor | None = None) -> Float[Tensor, "out in"]:
        """A view of the parameter, or of another tensor like that."""
        return _oriented(self.view(weight.tensor, parameter), Matrix(weight.tensor, weight.expert, weight))

    def target(self, weight: Weight) -> Float[Tensor, "out in"]:
        """What a solver is to round: the weight with the scales of all folds."""
        return self.scales.apply(weight, self.weight(weight)).contiguous()

    def put(self, weight: Weight, value: Float[Tensor, "out in"]) -> None:
        """From now on the block computes with `value`, which has the scales of all folds in it."""
        self.weight(weight).copy_(value)
        self.scales.settle(weight)

    def matrix(self, matrix: Matrix) -> Float[Tensor, "out in"]:
        """A view of the parameter, whether it is to be quantized or not."""
        return _oriented(self.view(matrix.tensor), matrix)

    def matrices(self) -> Iterator[tuple[Matrix, Tensor]]:
        """Every matrix of the block, with its view as it lies in the checkpoint. A table of integers is none, such as
        which experts a token is sent to (DeepSeek-V4)."""
        by_tensor: dict[str, list[Weight]] = {}
        for weight in self.weights:
            by_tensor.setdefault(weight.tensor, []).append(weight)
        for tensor in self.tensors:
            view = self.view(tensor)
            if not view.is_floating_point():
                continue
            if view.dim() == 2:
                yield Matrix(tensor, None, by_tensor.get(tensor, [None])[0]), view
            elif view.dim() == 3:
                owned = {w.expert: w for w in by_tensor.get(tensor, [])}
                for expert in range(view.shape[0]):
                    yield Matrix(tensor, expert, owned.get(expert)), view[expert]

    @contextmanager
    def trial(self, *tensors: str) -> Iterator[Snapshot]:
        """What happens to these tensors (and to others that are saved in time), to pending scales and to activations is
        undone."""
        with ExitStack() as undone:
            yield self._snapshot(undone, *tensors)

    @contextmanager
    def whole_or_not(self, *tensors: str) -> Iterator[None]:
        """The same where it fails."""
        with ExitStack() as undone:
            self._snapshot(undone, *tensors)
            yield
            undone.pop_all()

    def _snapshot(self, undone: ExitStack, *tensors: str) -> Snapshot:
        snapshot = Snapshot(self)
        snapshot.save(*tensors)
        undone.callback(snapshot.undo)
        return snapshot

    # What it computes ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, hidden: Hidden, batch: int) -> Hidden:
        """The block's outputs for one batch of hidden states."""
        return self.returned(hidden, batch)[0]

    def returned(self, hidden: Hidden, batch: int) -> tuple[Hidden, list[Sequence[Any]]]:
        """Hidden states, and whatever else the block returns of each part of the batch."""
        outputs, others = [], []
        with MatmulCapture(self.matrices(), self._rounded) if self.activations else nullcontext():
            for samples, args, kwargs in self.walk.calls.of(self.module, batch):
                out = self.module(hidden[samples].to(self.walk.device), *args, **kwargs)
                first, *more = out if isinstance(out, (tuple, list)) else (out,)
                self.walk.require_finite(first, f"{self.name} computes")
                outputs.append(first)
                others.append(more)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs), others

    def run_with(self, values: Mapping[Weight, Tensor], hidden: Hidden, batch: int) -> Hidden:
        """What the block would return with other weights; differentiable with respect to `values` and `hidden`."""
        replaced: dict[str, Tensor] = {}
        for weight, value in values.items():
            param_view = self.walk.weight_map[weight.tensor]
            name = param_view.parameter
            if name not in replaced:
                replaced[name] = filling.tensor(self.walk.model, name).clone()
            target = param_view.view(replaced[name], self.walk.shapes[weight.tensor])
            _oriented(target, Matrix(weight.tensor, weight.expert, weight)).copy_(value)
        inside = {name.removeprefix(f"{self.prefix}."): value for name, value in replaced.items()}
        with torch.enable_grad():
            parts = [
                torch.func.functional_call(self.module, inside, (hidden[samples].to(self.walk.device), *args), kwargs)
                for samples, args, kwargs in self.walk.calls.of(self.module, batch)
            ]
            return torch.cat([part[0] if isinstance(part, (tuple, list)) else part for part in parts])

    def error(
        self, weights: Sequence[Weight], hidden: Hidden, target: Hidden, batch: int
    ) -> tuple[float, list[Float[Tensor, "out in"]]]:
        """The mean square by which what the block returns for a batch misses a target, and gradients with respect to
        some of its weights."""
        walk = self.walk
        names = dict.fromkeys(walk.weight_map[weight.tensor].parameter for weight in weights)
        leaves = {name: filling.tensor(walk.model, name).detach().requires_grad_() for name in names}
        inside = {name.removeprefix(f"{self.prefix}."): leaf for name, leaf in leaves.items()}
        total, sums = 0.0, {}
        for samples, args, kwargs in walk.calls.of(self.module, batch):
            with torch.set_grad_enabled(bool(leaves)):
                out = torch.func.functional_call(self.module, inside, (hidden[samples].to(walk.device), *args), kwargs)
                out = out[0] if isinstance(out, (tuple, list)) else out
                error = (out.float() - target[samples].to(out.device).float()).square().sum() / target.numel()
            if leaves:
                gradients = torch.autograd.grad(error, list(leaves.values()), allow_unused=True)
                for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
                    gradient = torch.zeros_like(leaf) if gradient is None else gradient
                    sums[name] = sums[name] + gradient if name in sums else gradient
            total += error.item()
        return total, [self._inside(sums[walk.weight_map[w.tensor].parameter], w) for w in weights]

    def _inside(self, parameter: Tensor, weight: Weight) -> Float[Tensor, "out in"]:
        """A weight as a view of its parameter, or of what is shaped like it."""
        view = self.walk.weight_map[weight.tensor].view(parameter, self.walk.shapes[weight.tensor])
        return _oriented(view, Matrix(weight.tensor, weight.expert, weight))

    def _rounded(self, matrices: list[Matrix], x: Tensor) -> Tensor | None:
        """Matrices of one product are rounded alike: a scheme's inputs are known by what is read, not by who reads."""
        inputs = next((i for m in matrices if m.weight and (i := self.activations.get(m.weight))), None)
        return straight_through(x, inputs.round(x)) if inputs else None

    def observe(self, report: Report, batches: Iterable[int], hidden: Stream) -> list[Hidden]:
        """Run the batches and report every product with a matrix of the block; returns the block's outputs."""
        with MatmulCapture(self.matrices(), report):
            return [self.run(hidden[batch], batch) for batch in batches]

    def groups(self) -> list[list[Matrix]]:
        """Matrices that read the same tensor, found by its identity while the probe runs."""
        groups: list[tuple[Tensor, list[Matrix]]] = []

        def note(matrices: list[Matrix], x: Tensor) -> None:
            for other, group in groups:  # `groups` keeps every input alive, so no address is used twice
                if other.data_ptr() == x.data_ptr() and other.numel() == x.numel() and other.shape[-1] == x.shape[-1]:
                    group.extend(m for m in matrices if m not in group)
                    return
            groups.append((x, list(matrices)))

        self.observe(note, [PROBE], self.walk.inputs)
        return [group for _, group in groups]


def _oriented(view: Tensor, matrix: Matrix) -> Float[Tensor, "out in"]:
    """A matrix in the tensor in which it lies."""
    view = view if matrix.expert is None else view[matrix.expert]
    return view.T if matrix.weight and matrix.weight.transposed else view
