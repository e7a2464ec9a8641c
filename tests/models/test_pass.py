"""A pass over a model: streams, statistics in parts, reading ahead and too little memory change
nothing of what is computed."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import halfbyte
import tiny
from halfbyte import blockwise, recipe
from halfbyte.errors import OutOfMemory
from halfbyte.models import collect as collecting
from halfbyte.models.block import Block
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.collect import collect, in_parts, reading_groups
from halfbyte.models.placement import Placement
from halfbyte.models.streams import Stream
from halfbyte.models.walk import Walk
from halfbyte.sizing import duration
from halfbyte.solvers import SOLVERS
from halfbyte.solvers.statistics import Statistics
from halfbyte.transforms import TRANSFORMS
from halfbyte.transforms.fold import Finder
from halfbyte.transforms.scale import FoldSite, scaled
from models.families import FAMILIES

TOKENS = torch.randint(0, 256, (6, 32), generator=torch.Generator().manual_seed(0))


def outputs(checkpoint: Checkpoint, placement: Placement | None = None) -> torch.Tensor:
    walk = Walk(checkpoint, TOKENS, torch.float32, placement)
    for _ in walk:
        pass
    return torch.cat([logits for _, logits in walk.logits()])


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Checkpoint:
    return Checkpoint.open(FAMILIES["mixtral"].save(tmp_path_factory.mktemp("pass") / "mixtral"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("pass") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return str(tiny.text(tmp_path_factory.mktemp("pass") / "text.txt"))


def test_hidden_states_are_kept_where_there_is_room(tmp_path):
    placement = Placement(scratch=tmp_path, hidden_device_bytes=100, hidden_memory_bytes=1000)
    assert [placement.of_hidden(size) for size in (100, 101, 1000, 1001)] == ["device", "memory", "memory", "files"]
    assert Placement(hidden_memory_bytes=1000).of_hidden(1001) == "memory"  # there is no folder for files
    gpu = Placement.on(torch.device("cuda:0"), free_bytes=12_000_000_000)
    assert gpu.of_hidden(128 * 2048 * 4096 * 2) == "device"
    assert gpu.of_hidden(512 * 2048 * 4096 * 2) == "memory"


@pytest.mark.parametrize("budget", [0, 10**9], ids=["files", "memory"])
def test_a_fork_goes_its_own_way(tmp_path, budget):
    stream = Stream(Placement(scratch=tmp_path, hidden_memory_bytes=budget), tokens=8)
    values = torch.randn(2, 2, 4), torch.randn(2, 2, 4)
    for value in values:
        stream.append(value)
    fork = stream.fork()
    fork[1] = values[1] + 1
    assert all(torch.equal(one, other) for one, other in zip(stream, values, strict=True))
    assert torch.equal(fork[0], values[0])
    assert torch.equal(fork[1], values[1] + 1)


def test_reading_ahead_changes_nothing(mixtral):
    assert torch.equal(outputs(mixtral, Placement(reads_ahead=True)), outputs(mixtral))


def test_statistics_leave_no_trace_and_are_the_same_in_parts(mixtral):
    walk = Walk(mixtral, TOKENS, torch.float32, full_precision=True)
    block = next(iter(walk))
    hidden = [h.clone() for h in walk.inputs]
    whole = collect(block, block.weights, walk.inputs, walk.full_inputs)
    groups = reading_groups(block, [[weight] for weight in block.weights])
    parts = list(in_parts(groups, budget_bytes=1, drift=True))
    assert len(parts) == len(groups) > 6
    assert list(in_parts(groups, 10**12)) == [set(block.weights)]
    for wanted in parts:
        for weight, one in collect(block, wanted, walk.inputs, walk.full_inputs).items():
            assert one.tokens == whole[weight].tokens
            assert torch.equal(one.hessian, whole[weight].hessian)
            assert torch.equal(one.drift, whole[weight].drift)
            assert all(map(torch.equal, one.activation_stats, whole[weight].activation_stats))
    assert all(map(torch.equal, hidden, walk.inputs))
    assert all(map(torch.equal, hidden, walk.full_inputs))


@pytest.mark.parametrize(
    "words",
    [{"method": "gptq"}, {"method": "gptaq"}, {"method": "gptq", "grid": "w8a8-static"}],
    ids=["gptq", "gptaq", "static"],
)
def test_a_small_budget_for_statistics_and_a_writer_beside_give_the_same_bytes(
    llama, text, tmp_path, monkeypatch, words
):
    def quantize(name: str) -> dict[str, bytes]:
        calibration = {"source": text, "samples": 6, "length": 32}
        halfbyte.quantize(llama, tmp_path / name, calibration=calibration, engine="none", device="cpu", **words)
        return tiny.weights(tmp_path / name)

    runs, threads = [], []
    monkeypatch.setattr("halfbyte.block_solvers.collect", lambda *args: runs.append(1) or collecting.collect(*args))
    expected, at_once = quantize("whole"), len(runs)
    monkeypatch.setattr(Placement, "on", lambda device, scratch=None: Placement(statistics_bytes=1, reads_ahead=True))
    monkeypatch.setattr("halfbyte.run.ThreadPoolExecutor", lambda n: threads.append(n) or ThreadPoolExecutor(n))
    assert quantize("parts") == expected
    assert len(runs) - at_once > 2 * at_once
    assert threads == [1]


class Full:
    """A block that has memory for so many samples at once."""

    def __init__(self, block: Block, samples: int):
        self.forward, self.samples, self.refused = block.module.forward, samples, 0

    def __call__(self, hidden: torch.Tensor, *args, **kwargs):
        if len(hidden) > self.samples:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.forward(hidden, *args, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "llama", "gemma2"])
def test_too_little_memory_halves_batches_and_goes_on(family, tmp_path):
    checkpoint = Checkpoint.open(FAMILIES[family].save(tmp_path / "model"))
    walk = Walk(checkpoint, TOKENS, torch.float32)
    for number, block in enumerate(walk):
        if number == 1:
            before = collect(block, block.weights, walk.inputs)
            walk.blocks[1].module.forward = full = Full(block, samples=2)
            after = walk.fitting(lambda block=block: collect(block, block.weights, walk.inputs))
            assert full.refused == 2  # six samples at once, then three
            for weight, statistics in after.items():
                assert (
                    statistics.tokens == before[weight].tokens == collect(block, [weight], walk.inputs)[weight].tokens
                )
                torch.testing.assert_close(statistics.hessian, before[weight].hessian, rtol=1e-4, atol=1e-4)
    logits = torch.cat([logits for _, logits in walk.logits()])
    torch.testing.assert_close(logits, outputs(checkpoint), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_too_little_memory_for_one_sample_is_said_in_a_line(mixtral):
    walk = Walk(mixtral, TOKENS, torch.float32)
    block = next(iter(walk))
    block.module.forward = Full(block, samples=0)
    with pytest.raises(OutOfMemory, match=r"cpu has too little memory for one sample of 32 tokens .*--length"):
        walk.advance(block)


def test_a_stage_after_the_last_block_sees_the_whole_model_and_may_write_anew(llama, text, tmp_path, monkeypatch):
    seen = []

    def stage(run, walk):
        weight = next(iter(run.plan.schemes))
        seen.extend(run.rows)
        assert len(walk.inputs[1]) == 6  # what the last block returned
        w = run.plan.checkpoint.read_weight(weight)
        q = blockwise.SOLVERS["minmax"](w, run.plan.schemes[weight].weight, None)
        run.digests[weight.name] = [
            blockwise.commit(run, [weight], q, [w], run.plan.schemes[weight])[0].digest.result()
        ]

    monkeypatch.setitem(blockwise.MODEL_STAGES, "anew", stage)
    monkeypatch.setitem(recipe.PARTS, "anew", recipe.Method((), "gptq", calibrated=True, refinements=("anew",)))
    calibration = {"source": text, "samples": 6, "length": 32}
    report = halfbyte.quantize(llama, tmp_path / "out", method="gptq+anew", calibration=calibration, engine="none")
    assert seen == [row.name for row in report.weights]
    written = Checkpoint.open(tmp_path / "out").read_quantized(seen[0])
    expected = blockwise.SOLVERS["minmax"](Checkpoint.open(llama).read(f"{seen[0]}.weight"), written.grid, None)
    assert written.equal(expected)


class Scarce(TorchDispatchMode):
    """A device whose memory is too small for one of the tensors that are made, and then has room."""

    def __init__(self, made: int):
        super().__init__()
        self.made = made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made -= 1
        if not self.made:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return func(*args, **(kwargs or {}))


def scarce(work, made: int, calls: list):
    """Some work that runs out of memory once."""

    def first(*args):
        calls.append(1)
        with Scarce(made if len(calls) == 1 else 0):
            return work(*args)

    return first


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """A model of one block, and what transforms make of it where there is room."""
    home = tmp_path_factory.mktemp("folded")
    model, text = tiny.make(home / "model", num_hidden_layers=1), str(tiny.text(home / "text.txt"))

    def quantize(name: str, out: Path) -> dict[str, bytes]:
        words = {"method": f"{name}+gptq", "grid": "int4-g32/int8-token", "engine": "none", "device": "cpu"}
        halfbyte.quantize(model, out, calibration={"source": text, "samples": 4, "length": 32}, **words)
        return tiny.weights(out)

    return quantize, {name: quantize(name, home / name) for name in ("awq", "smoothquant")}


@pytest.mark.parametrize(
    ("name", "stage", "made"),
    [
        ("awq", "find", 3),
        ("smoothquant", "choose", 40),
        *(("awq", "apply", made) for made in (2, 20)),
        *(pytest.param("awq", stage, 40, marks=pytest.mark.slow) for stage in ("choose", "solve")),
        *(pytest.param("smoothquant", stage, 400, marks=pytest.mark.slow) for stage in ("find", "choose")),
    ],
)
def test_a_search_for_folds_that_runs_out_of_memory_goes_on(folded, tmp_path, monkeypatch, name, stage, made):
    (quantize, expected), calls = folded, []
    monkeypatch.setattr(Placement, "on", lambda device, scratch=None: Placement(hidden_device_bytes=10**9))
    monkeypatch.setattr(duration, "seconds", lambda *_: None)  # which tries the solver too
    if stage == "find":
        monkeypatch.setattr(Finder, "find", scarce(Finder.find, made, calls))
    elif stage == "apply":
        monkeypatch.setattr(FoldSite, "apply", scarce(FoldSite.apply, made, calls))
    elif stage == "choose":
        choose = scarce(TRANSFORMS[name].keywords["choose"], made, calls)
        monkeypatch.setitem(TRANSFORMS, name, partial(scaled, choose=choose))
    else:
        monkeypatch.setitem(SOLVERS, "gptq", scarce(SOLVERS["gptq"], made, calls))
    assert quantize(name, tmp_path / "out") == expected[name]
    assert len(calls) > 1


def test_statistics_of_a_block_wait_in_memory_where_a_device_has_no_room(folded, tmp_path, monkeypatch):
    """The meta device is no host: what is asked of statistics that have left it comes there again."""
    statistics = Statistics(8)
    statistics.add(torch.randn(64, 8))
    statistics.device = torch.device("meta")
    statistics.leave_device()
    asked = (statistics.hessian, statistics.importance, *statistics.activation_stats, *statistics.sample(16))
    assert all(tensor.is_meta for tensor in asked)
    (quantize, expected), left = folded, []
    monkeypatch.setattr(Placement, "is_host", False)
    monkeypatch.setattr(Placement, "on", lambda device, scratch=None: Placement(statistics_bytes=1))
    monkeypatch.setattr(Statistics, "leave_device", lambda self: left.append(self))
    assert quantize("awq", tmp_path / "out") == expected["awq"]
    assert left
