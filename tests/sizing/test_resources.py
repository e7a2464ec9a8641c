"""What a run takes is said before it, measured in it, and refused where it is not there."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import halfbyte
import tiny
from halfbyte import demo, devices
from halfbyte.errors import BadRequest
from halfbyte.models.memory import reading_group
from halfbyte.plan import resolve
from halfbyte.progress import Stage
from halfbyte.recipe import PARTS, Recipe
from halfbyte.refinements import learning
from halfbyte.report.summary import beside_planned, size
from halfbyte.sizing import run
from halfbyte.sizing.duration import LEARNING_STEPS, SECONDS_OF, MatrixPace, Pace, Work
from halfbyte.solvers import SOLVERS
from halfbyte.terminal import duration

CPU = torch.device("cpu")
WIDE = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("source") / "model", **WIDE)


def taken(source: Path, samples: int = 128, **words) -> int:
    plan = resolve(Recipe.of(model=str(source), calibration={"samples": samples, "length": 512}, **words))
    return run._taken(plan, run.Placement.on(CPU, source))


def with_free(monkeypatch, size_bytes: int) -> None:
    monkeypatch.setattr(run, "HOST", replace(run.HOST, free_bytes=lambda _: size_bytes))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nearest", "gptq", "awq"])
def test_what_is_planned_is_what_a_process_takes(tmp_path, method):
    words = ["-m", "halfbyte", "quantize", str(demo.MODEL), "-o", str(tmp_path / "out"), "--method", method, "--json"]
    done = subprocess.run([sys.executable, *words, "--samples", "8"], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    planned, measured = report["planned"], report["measured"]
    assert measured["memory_bytes"] > 300e6
    for name in ("memory_bytes", "disk_bytes"):
        assert planned[name] == pytest.approx(measured[name], rel=0.15)
    assert measured["seconds"] / 3 < planned["seconds"] < 3 * measured["seconds"]  # others use this machine too


def test_disk_is_that_of_the_files(source, tmp_path):
    report = halfbyte.quantize(source, tmp_path / "out", method="nearest", grid="int4-g128")
    files = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert report.measured.disk_bytes == pytest.approx(files, rel=0.05)
    assert report.planned.disk_bytes == pytest.approx(files, rel=0.05)
    assert report.planned.device_bytes is None


def test_hidden_states_hessians_and_a_second_stream_count(source):
    few, many = taken(source, 128, method="gptq"), taken(source, 1024, method="gptq")
    assert many - few == (1024 - 128) * 512 * 256 * 2  # bfloat16
    assert taken(source, 128, method="gptaq") > few
    assert taken(source, 128, method="nearest") == taken(source, 1024, method="nearest") < few


def test_weights_that_read_one_tensor_share_a_hessian(source):
    weights = list(resolve(Recipe.of(model=str(source), method="nearest")).schemes)
    groups = {reading_group(weight) for weight in weights}
    assert len(weights) == 14
    assert len(groups) == 8  # q k v, o, gate up, down


def test_too_little_memory_is_refused_with_what_would_fit(source, tmp_path, monkeypatch):
    needed = taken(source, 2048, method="gptq", grid="int4-g128") + run.KERNELS
    with_free(monkeypatch, needed // 2)  # the try for the estimate of time leaves some of it with the process already
    calibration = {"samples": 2048, "length": 512}
    with pytest.raises(BadRequest, match=r"takes [\d.]+ MB more of memory, .* are free; --samples \d+ would take"):
        halfbyte.quantize(source, tmp_path / "out", method="gptq", calibration=calibration)
    with_free(monkeypatch, 1_000_000)
    with pytest.raises(BadRequest, match="close other programs"):
        halfbyte.quantize(source, tmp_path / "out", method="nearest")
    assert list(tmp_path.iterdir()) == []


def test_nearest_is_offered_where_no_number_of_samples_fits(source, tmp_path, monkeypatch):
    with_free(monkeypatch, taken(source, method="nearest") + run.KERNELS + 1_000_000)
    with pytest.raises(BadRequest, match="--method nearest would take"):
        halfbyte.quantize(source, tmp_path / "out", method="gptq")


def test_a_full_disk_is_refused_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(BadRequest, match=r"of disk in .*, of which 0\.00 MB are free; name an output on another disk"):
        halfbyte.quantize(source, tmp_path / "out", method="nearest")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_it_and_writes_nothing(source, tmp_path):
    plan = halfbyte.quantize(source, tmp_path / "out", method="nearest", dry_run=True)
    assert plan.planned.memory_bytes > 100e6
    assert plan.planned.disk_bytes > plan.output.size_bytes
    assert list(tmp_path.iterdir()) == []


def test_a_peak_of_before_is_not_taken_for_that_of_the_run(source, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "HOST", replace(run.HOST, peak_bytes=lambda _: 10**12))
    report = halfbyte.quantize(source, tmp_path / "out", method="nearest")
    assert report.measured.memory_bytes is None
    said = beside_planned(report.measured, report.planned)
    assert said.startswith(f"memory not measured (planned {size(report.planned.memory_bytes)}), disk ")
    assert report.planned.memory_bytes < 10**12


@pytest.mark.parametrize(
    ("method", "grid", "parts"),
    [
        ("nearest", "int4-g128", {"streaming"}),
        ("gptq", "q4_k", {"blocks", "statistics", "solving", "committing"}),
        ("awq", "int4-g128", {"blocks", "statistics", "solving", "committing", "awq"}),
        ("smoothquant", "w8a8", {"blocks", "statistics", "solving", "committing", "smoothquant"}),
    ],
)
def test_time_is_that_of_what_is_computed(source, method, grid, parts):
    """At a pace of one for each thing, more text takes more of what runs it, and of nothing else."""

    def planned(samples: int) -> dict[str, float]:
        plan = resolve(Recipe.of(model=str(source), method=method, grid=grid, calibration={"samples": samples}))
        paces = dict.fromkeys(plan.schemes.values(), MatrixPace(*[1e-9] * 6))
        return Work(plan, Pace(*[1e-12] * 6), paces).parts(10**6)

    few, many = planned(10), planned(30)
    assert {name for name, seconds in few.items() if seconds} >= parts
    for name in few:
        grows = name in ("blocks", "statistics")
        assert many[name] == pytest.approx(few[name] * (3 if grows else 1), rel=0.2 if name == "statistics" else 1e-9)


def test_every_part_of_a_method_has_its_time():
    """What is done to a block or to a model beside a solver of matrices takes time that is planned."""
    parts = {part for method in PARTS.values() for part in (*method.transforms, method.solver, *method.refinements)}
    assert parts - SOLVERS.keys() == SECONDS_OF.keys()


def test_what_lies_outside_of_blocks_is_only_rounded(source):
    """A head takes none of a solver's products, however wide it is."""

    def solving(head: bool) -> dict[str, float]:
        plan = resolve(Recipe.of(model=str(source), method="gptq", grid="int4-g128", engine="none", head=head))
        paces = dict.fromkeys(plan.schemes.values(), MatrixPace(*[1e-9] * 6))
        return Work(plan, Pace(*[1e-12] * 6), paces).parts(10**6)

    without, with_head = solving(False), solving(True)
    assert with_head["streaming"] > without["streaming"] == 0
    assert all(with_head[name] == without[name] for name in ("solving", "statistics", "committing"))


def test_what_is_tried_is_what_a_container_packs(tmp_path):
    """Half a million weights of 1536 in-features are 341 rows, which AWQ's words of eight do not divide."""
    wide = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_hidden_layers": 8}
    model = tiny.make(tmp_path / "model", **wide)
    words = {"method": "nearest", "grid": "int4-g64-asym", "to": "awq"}
    assert halfbyte.quantize(model, tmp_path / "out", dry_run=True, **words).planned.seconds > 0


def test_a_stage_tells_what_is_left_once_some_is_done():
    now = 0.0
    stage = Stage(lambda: now)
    assert stage.left(0, 30) is None
    now = 10.0
    assert stage.left(1, 30) == 290
    now = 40.0
    assert stage.left(2, 30) == 560
    assert stage.left(0, 7) is None  # another
    now = 41.0
    assert stage.left(1, 7) == 6
    assert [duration(n) for n in (0.04, 12.3, 200, 7500)] == ["0.0 s", "12 s", "3 min 20 s", "2 h 5 min"]


def test_convert_and_dequantize_say_it_too(source, tmp_path):
    said = []
    halfbyte.quantize(source, tmp_path / "one", method="nearest", progress=lambda what, *_: said.append(what))
    moved = halfbyte.convert(tmp_path / "one", tmp_path / "two", "gptq", progress=lambda what, *_: said.append(what))
    plain = halfbyte.dequantize(tmp_path / "one", tmp_path / "three", progress=lambda what, *_: said.append(what))
    assert sum(what.startswith("this takes") for what in said) == 3
    for report in (moved, plain):
        assert report.planned.disk_bytes == pytest.approx(report.measured.disk_bytes, rel=0.1)


def test_a_container_s_limit_is_the_memory_that_is_free(tmp_path):
    (tmp_path / "memory.max").write_text("2000000000\n")
    (tmp_path / "memory.current").write_text("900000000\n")
    (tmp_path / "memory.stat").write_text("anon 500000000\ninactive_file 300000000\n")
    names = (str(tmp_path), "memory.max", "memory.current")
    assert devices._of_group(names) == (2_000_000_000, 600_000_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert devices._of_group(names)[0] is None
    assert devices._of_group((str(tmp_path / "none"), "memory.max", "memory.current")) == (None, 0)
    assert devices.KINDS["cpu"].free_bytes(CPU) > 0


def test_as_many_steps_are_planned_as_are_learned():
    assert LEARNING_STEPS == learning.STEPS
