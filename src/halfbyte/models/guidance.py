"""How much errors at the outputs of each linear cost what the model predicts: one pass back over calibration text."""

from collections.abc import Collection

from torch import Tensor

from halfbyte.models.backward import Backward
from halfbyte.models.batches import Tokens
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.memory import guiding_stride
from halfbyte.models.placement import CPU, Placement
from halfbyte.models.streams import kept
from halfbyte.models.weight import Weight
from halfbyte.progress import Progress
from halfbyte.solvers import outputs
from halfbyte.solvers.outputs import OutputHessian


def output_hessians(
    checkpoint: Checkpoint, windows: Tokens, wanted: Collection[Weight], placement: Placement, progress: Progress
) -> dict[Weight, OutputHessian]:
    """Of each weight that enough tokens reach, in memory or in files: of experts that few reach, too little is known.

    Blocks before all that are wanted are not gone back through. Raises Unsupported for models through which no
    gradients are followed.
    """
    wanted = set(wanted)
    left, where = set(wanted), placement.of_hidden(sum(outputs.size_bytes(weight.shape[0]) for weight in wanted))
    where = "memory" if where == "device" else where
    found: dict[Weight, OutputHessian] = {}
    if not left:
        return found
    back = Backward(checkpoint, windows[:: guiding_stride(*windows.shape)], placement, progress=progress)
    for _ in back.predictions():
        pass
    for block in back:
        collected: dict[Weight, OutputHessian] = {}

        def add(weight: Weight, gradient: Tensor, collected: dict[Weight, OutputHessian] = collected) -> None:
            if weight in wanted:
                if weight not in collected:
                    collected[weight] = OutputHessian.empty(weight.shape[0], gradient.device)
                collected[weight].add(gradient)

        for batch in back.samples:
            back.observe(block, batch, add)
        for weight, hessian in collected.items():
            if hessian.tokens >= max(map(len, hessian.blocks)):
                found[weight] = OutputHessian(
                    [kept(b.to(CPU), where, placement) for b in hessian.blocks], hessian.tokens
                )
        left.difference_update(block.weights)
        if not left:
            break
    return found
