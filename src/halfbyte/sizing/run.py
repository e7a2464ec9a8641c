"""What a run itself takes, known before it starts: memory of the process and of a GPU, disk, and about how long; and
whether that is there.

What is counted is what is there at the worst moment; how much libraries and workspaces take was measured
(benchmarks/run_resources.py), and the planned peak is within 15% of the measured one.
"""

import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from itertools import chain
from math import prod
from pathlib import Path

import psutil
import torch

from halfbyte.containers.folder import Shard
from halfbyte.containers.place import OutputPath
from halfbyte.devices import KINDS, forget_peak, kind_of
from halfbyte.errors import BadRequest
from halfbyte.models import roles
from halfbyte.models.memory import (
    LOGITS_BYTES,
    DeviceMemory,
    device_memory,
    guiding_tokens,
    hidden_bytes,
    hidden_size,
    reading_group,
)
from halfbyte.models.placement import CPU, Placement, chunk_size, tasks_together
from halfbyte.models.weight import Weight
from halfbyte.recipe import method_named
from halfbyte.report.summary import size
from halfbyte.report.types import Resources
from halfbyte.sizing import duration
from halfbyte.sizing.duration import FACTORING
from halfbyte.solvers import outputs
from halfbyte.solvers.statistics import Statistics
from halfbyte.targets.plan import Plan

HOST = KINDS["cpu"]
FEWER = (64, 32, 16, 8)
"""Samples that are offered in place of more."""
KERNELS = 150_000_000
"""Compiled kernels, what loads them, and what draws the picture, beside what the process has when a plan is made."""
TEXT, ENTRY = 100_000_000, 500
"""What reads text; and a token of the tokenizer's vocabulary."""
CODE = 1
"""Bytes of a rounded weight before it is packed."""
DECODED = 8
"""Bytes of a weight while it is decoded: codes as float32, and what they stand for."""
TOGETHER = 10
"""Bytes of a weight while a grid is fitted whose rows share a parameter: all of a matrix at once, in float32."""
JOINED = 6
"""... of what calibration adds to that: what an error in each counts, and weights that are put together."""
PIECES = 30_000_000
"""... and of what is computed of it in small pieces, of all threads."""
SOLVING = 10
"""Bytes of a weight while GPTQ rounds it: the weight in float32, what an error in it counts, errors."""
TURNED = 12
"""Bytes of a weight while it is rotated: in float32, as it was, as it becomes, and between the two."""
LEARNING, STEPPING = 14, 20
"""Bytes of a weight of a block while its rounding is learned: its lean with two means of gradients, its code and rank;
and of a matrix as it goes a step, beside that."""
BACKWARD = 3
"""Times what a block computes of a batch, that is kept for gradients."""
RECORD = 900
"""Bytes of the report by weight."""
TUNED_TOGETHER, PREDICTED, LOGITS = 4, 8 * 256, 256_000_000
"""Windows that `polish` runs at a time; bytes that it keeps of a prediction of the original; of logits in memory."""
SURE = 0.85
"""A run is refused where even so much less than is planned would not fit: plans are right within 15%."""


def resources(
    plan: Plan,
    shards: Mapping[str, Shard],
    device: torch.device,
    scratch: Path,
    peak: int = 0,
    started: float | None = None,
) -> Resources:
    """What a run of this plan will take, if it begins now: `scratch` is where hidden states go that memory does not
    hold, `peak` what planning has taken at most, and `started` when that began (`time.perf_counter`)."""
    started = time.perf_counter() if started is None else started
    if plan.calibrated:
        import_module("halfbyte.models.walk")  # Transformers' models, so that the process has them when it is asked
    placement = Placement.on(device, scratch)
    tensors, beside = sum(shard.size_bytes for shard in shards.values()), plan.checkpoint.other_files
    needed = Resources(
        memory_bytes=max(peak, psutil.Process().memory_info().rss + KERNELS + _taken(plan, placement)),
        device_bytes=None if placement.is_host else _on_device(plan, placement),
        disk_bytes=tensors
        + sum(path.stat().st_size for path in beside)
        + RECORD * len(plan.weights)
        + _spilled(plan, placement),
    )
    together = tasks_together(max(_pieces(plan, device), default=1), device, fitting_bytes(plan))
    left = duration.seconds(
        plan, tensors, device, scratch, together
    )  # after memory, of which it takes some that a run takes too
    whole = None if left is None else round(time.perf_counter() - started + left, 2)
    return needed.model_copy(update={"seconds": whole})


def _on_device(plan: Plan, placement: Placement) -> int:
    """Bytes of a GPU's memory."""
    if plan.calibrated:
        on_device = _pass(plan, placement)
        going_back = _going_back(plan, on_device) if plan.method.guided else 0
        return max(on_device.total, going_back, on_device.block + on_device.hidden + max(_beside(plan, on_device)))
    pieces, each = sorted(_pieces(plan, placement.device)), fitting_bytes(plan)
    return each * sum(pieces[-tasks_together(max(pieces, default=1), placement.device, each) :])


def fitting_bytes(plan: Plan) -> int:
    """For each weight, of a GPU's memory while it is rounded without calibration."""
    return max((scheme.weight.fitting_bytes for scheme in plan.schemes.values()), default=0)


def _taken(plan: Plan, placement: Placement) -> int:
    """Bytes of the host's memory beside libraries and kernels."""
    if not plan.calibrated:
        return max(_streaming(plan), _checking(plan), _rotating(plan))
    vocabulary = plan.checkpoint.text_config.get("vocab_size")
    text = TEXT + ENTRY * (vocabulary if isinstance(vocabulary, int) else 0)
    return text + max(_with_calibration(plan, placement, _pass(plan, placement)), _checking(plan), _rotating(plan))


def _rotating(plan: Plan) -> int:
    """Bytes of the passes that find and prove a rotation, and of the largest tensor as it is turned."""
    if not plan.method.rotated:
        return 0
    sizes = {tensor: prod(shape) for tensor, shape in plan.checkpoint.tensors().items()}
    blocks: dict[str | None, int] = defaultdict(int)
    for tensor, count in sizes.items():
        blocks[roles.block_of(tensor)] += count
    outside = blocks.pop(None, 0)
    return TURNED * max(max(blocks.values(), default=0), *sizes.values()) + 4 * outside


def _pass(plan: Plan, placement: Placement) -> DeviceMemory:
    asked = plan.recipe.calibration
    return device_memory(plan.checkpoint, asked.samples, asked.length, placement, plan.method.full_precision)


def _spilled(plan: Plan, placement: Placement) -> int:
    """Bytes of hidden states in files."""
    if not plan.calibrated:
        return 0
    asked = plan.recipe.calibration
    hidden = hidden_bytes(plan.checkpoint, asked.samples, asked.length, plan.method.full_precision)
    beside, before = (_hessians(plan), _read_going_back(plan)) if plan.method.guided else (0, 0)
    hidden, beside, before = (size if placement.of_hidden(size) == "files" else 0 for size in (hidden, beside, before))
    return beside + max(hidden, before)


def _hessians(plan: Plan) -> int:
    """Bytes of what is known of the outputs of all weights."""
    return sum(outputs.size_bytes(weight.shape[0]) for weight in plan.schemes if weight.block)


def _read_going_back(plan: Plan) -> int:
    """Bytes of what all blocks read, which a pass back needs."""
    layers = len({weight.block for weight in plan.checkpoint.weights() if weight.block})
    asked = plan.recipe.calibration
    return guiding_tokens(asked.samples, asked.length) * hidden_size(plan.checkpoint) * 4 * (layers + 2)


def _going_back(plan: Plan, on_device: DeviceMemory) -> int:
    """Bytes of what a pass back computes with: a block or a head, and what these make of a window, in float32."""
    wide = 4 // plan.checkpoint.dtype.itemsize
    return wide * max(on_device.block + on_device.running, on_device.outside) + int(LOGITS_BYTES)


def _with_calibration(plan: Plan, placement: Placement, on_device: DeviceMemory) -> int:
    """Bytes of the host: all of a pass where it computes, else what is kept and written there."""
    asked = plan.recipe.calibration
    hidden = hidden_bytes(plan.checkpoint, asked.samples, asked.length, plan.method.full_precision)
    on_host = hidden if placement.of_hidden(hidden) != "device" else 0
    if not kind_of(placement.device).is_host:
        beside = _hessians(plan) + _read_going_back(plan) if plan.method.guided else 0
        return on_host + beside + 2 * on_device.block + CODE * _largest(plan)
    begins = on_device.outside + on_device.hidden
    blocks: dict[str | None, list[Sequence[Weight]]] = defaultdict(list)
    for group in plan.fused_groups:
        blocks[group[0].block].append(group)
    solving = max(
        (_solving(plan, groups, on_device.statistics) for block, groups in blocks.items() if block), default=0
    )
    collecting = on_device.statistics + on_device.running
    beside = max(_beside(plan, on_device))
    most = on_device.block + on_host + max(begins, on_device.hidden + max(collecting, solving, beside))
    if not plan.method.guided:
        return most
    return _hessians(plan) + max(most, _going_back(plan, on_device) + _read_going_back(plan))


def _polishing(plan: Plan, on_device: DeviceMemory) -> int:
    """Codes; a block, what is around blocks and what all blocks read of a batch in float32; and what the original
    predicts."""
    asked, wide = plan.recipe.calibration, 4 / plan.checkpoint.dtype.itemsize
    codes = CODE * sum(prod(weight.shape) for weight in plan.schemes)
    blocks = len({weight.block for weight in plan.schemes})
    read = blocks * hidden_bytes(plan.checkpoint, min(asked.samples, TUNED_TOGETHER), asked.length) * wide
    around = wide * (2 * on_device.block + 2 * on_device.outside + on_device.running)
    return int(codes + read + around + PREDICTED * asked.samples * asked.length + LOGITS)


def _beside(plan: Plan, on_device: DeviceMemory) -> list[int]:
    """What each part of the method has in memory at most."""
    parts = (*plan.method.transforms, plan.method.solver, *plan.method.refinements)
    return [0, *(BYTES_OF[name](plan, on_device) for name in parts if name in BYTES_OF)]


def _learned(plan: Plan, on_device: DeviceMemory) -> int:
    """What is learned of a block, the block as it was, and gradients."""
    weights = on_device.block // plan.checkpoint.dtype.itemsize
    return LEARNING * weights + STEPPING * _largest(plan) + 2 * on_device.block + BACKWARD * on_device.running


BYTES_OF: dict[str, Callable[[Plan, DeviceMemory], int]] = {
    "smoothquant": lambda plan, on_device: on_device.block + on_device.statistics,
    "polish": _polishing,
    "learned": _learned,
}
"""By the name of a transform, a solver of blocks or a refinement: what it has in memory at most, beside a block and the
hidden states."""


def _solving(plan: Plan, groups: Sequence[Sequence[Weight]], budget: int) -> int:
    """Bytes of a block's matrices as they are solved one after the other: statistics of those that are left (no more
    than a budget at a time), codes of those that are done, and the one at hand, which several weights may be."""
    drift = plan.method.full_precision
    left: dict[object, list[Weight]] = defaultdict(list)
    for weight in chain(*groups):
        left[reading_group(weight)].append(weight)
    most = codes = 0
    waiting = sum(Statistics.size_bytes(weights[0].shape[1], drift) for weights in left.values())
    factored = plan.method.solver in FACTORING
    for group in groups:
        matrix, width = sum(prod(weight.shape) for weight in group), group[0].shape[1]
        codes += CODE * matrix
        factor = Statistics.size_bytes(width) if factored else 0
        shared = plan.schemes[group[0]].weight.shares_params_across_rows
        solver = TOGETHER + JOINED if shared else max(SOLVING, DECODED + 2)
        most = max(most, min(waiting, budget) + factor + codes + solver * matrix)
        for weight in group:
            same = left[reading_group(weight)]
            same.pop()
            waiting -= 0 if same else Statistics.size_bytes(width, drift)
    return most


def _largest(plan: Plan) -> int:
    return max((prod(weight.shape) for weight in plan.schemes), default=0)


def _streaming(plan: Plan) -> int:
    """Bytes of matrices that are rounded side by side, without calibration."""
    shared = any(scheme.weight.shares_params_across_rows for scheme in plan.schemes.values())
    read = TURNED if plan.method.rotated else plan.checkpoint.dtype.itemsize
    each = read + CODE + 1 + (TOGETHER if shared else 0)
    return _most(plan, _pieces(plan), each) + (PIECES if shared else 0)


def _pieces(plan: Plan, device: torch.device = CPU) -> list[int]:
    """Weights of what is rounded and written by itself."""
    writer = plan.target.writer(plan)
    return [
        sum(prod(weight.shape) for weight in group) if len(group) > 1 else prod(piece.shape)
        for group in plan.fused_groups
        for piece in writer.row_chunks(group[0], chunk_size(device))
    ]


def _checking(plan: Plan) -> int:
    """Bytes of what is written and read again side by side: tensors that are not quantized are the largest."""
    sizes = [plan.spec(tensor).size_bytes for tensor in plan.unquantized]
    sizes += [(CODE + 1) * piece for piece in _pieces(plan)]
    return _most(plan, sizes, 1)


def _most(plan: Plan, sizes: Sequence[int], each: int) -> int:
    """Of what is worked on at a time, where one task waits for the disk."""
    largest = max((sum(prod(weight.shape) for weight in group) for group in plan.fused_groups), default=1)
    return sum(sorted(sizes)[-tasks_together(largest) - 1 :]) * each


class Meter:
    """What this process takes from now on."""

    def __init__(self, device: torch.device):
        self.device, self._before, self.started = device, HOST.peak_bytes(device), time.perf_counter()
        self.on_host = kind_of(device).is_host
        if not self.on_host:
            forget_peak(device)

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self.started

    @property
    def peak_bytes(self) -> int | None:
        """Of the process's memory; None where it had more before, or the system does not say."""
        peak = HOST.peak_bytes(self.device)
        return peak if peak is not None and peak > (self._before or 0) else None

    def read(self, output: Path, spilled: int) -> Resources:
        """At the end of a run whose files lie in `output`; `spilled` is what hidden states took of the disk."""
        return Resources(
            memory_bytes=self.peak_bytes,
            device_bytes=None if self.on_host else kind_of(self.device).peak_bytes(self.device),
            disk_bytes=_files(output) + spilled,
            seconds=round(self.seconds, 2),
        )


def require(planned: Resources, plan: Plan, device: torch.device, place: OutputPath) -> None:
    """Raise BadRequest where memory, disk or the device has less than is planned, saying what would fit."""
    needed = (planned.memory_bytes or 0) - psutil.Process().memory_info().rss
    if SURE * needed > (free := HOST.free_bytes(device)):
        raise BadRequest(f"{_lacking('memory', needed, free)}; {_instead(plan, device, free)}")
    if not kind_of(device).is_host and plan.calibrated:
        needed, free = _pass(plan, Placement.on(device)).least, kind_of(device).free_bytes(device)
        if needed > free:
            raise BadRequest(f"{_lacking(f'memory of {device}', needed, free)}; --device cpu, or --method nearest")
    needed = planned.disk_bytes - (_files(place.partial) if place.partial.exists() else 0)
    there = next(path for path in place.final.parents if path.exists())
    if needed > (free := shutil.disk_usage(there).free):
        raise BadRequest(f"{_lacking(f'disk in {there}', needed, free)}; name an output on another disk")


def _lacking(what: str, needed: int, free: int) -> str:
    return f"this takes {size(needed)} more of {what}, of which {size(free)} are free"


def _instead(plan: Plan, device: torch.device, free: int) -> str:
    """What would fit into so much memory."""
    asked = plan.recipe.calibration
    fewer = [n for n in FEWER if n < asked.samples] if plan.calibrated else []
    less = {
        f"--samples {n}": plan.recipe.model_copy(update={"calibration": asked.model_copy(update={"samples": n})})
        for n in fewer
    }
    tried = {option: replace(plan, recipe=recipe) for option, recipe in less.items()}
    if plan.method.calibrated:
        tried["--method nearest"] = replace(plan, method=method_named("nearest"))
    placement = Placement.on(device, plan.checkpoint.path)
    fits = {option: of for option, other in tried.items() if (of := KERNELS + _taken(other, placement)) <= free}
    if not fits:
        return "close other programs, or take a machine with more"
    option = next(iter(fits))
    return f"{option} would take {size(fits[option])}"


def _files(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
