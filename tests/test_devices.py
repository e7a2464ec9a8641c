"""Devices are named, found or refused; on each that is here, the same comes out, and the report says where."""

import re
from pathlib import Path

import pytest
import torch

import halfbyte
import tiny
from halfbyte import demo, devices
from halfbyte.errors import BadRequest

ROOT = Path(halfbyte.__file__).parent

GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")],
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("devices") / "model")


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> dict:
    return {"source": str(tiny.text(tmp_path_factory.mktemp("text") / "text.txt")), "samples": 8, "length": 32}


@pytest.mark.parametrize("words", ["gpu", "cuda:x", "CPU", "cuda:-1", "", "cpu:0", "meta", "mps:1"])
def test_what_is_no_device_is_refused_by_name(words):
    with pytest.raises(BadRequest, match=r"is no device; name one of auto, cpu, cuda, xpu, mps"):
        devices.device_named(words)


@pytest.mark.parametrize("here", [{}, {"cuda": 2}, {"xpu": 1}, {"mps": 1}, {"cuda": 1, "xpu": 1}])
def test_auto_takes_a_gpu_where_there_is_one_and_others_are_refused(monkeypatch, here):
    monkeypatch.setattr(devices, "_count", lambda kind: here.get(kind, 0))
    monkeypatch.setattr(devices, "_current", lambda kind: here[kind] - 1)
    found = devices.device_named()
    assert found.type == next(iter(here), "cpu")
    assert str(devices.device_named("cpu")) == "cpu"
    for kind in devices.GPUS:
        if kind not in here:
            with pytest.raises(
                BadRequest, match=rf"there is no device {kind} here, .*there is {'.*'.join(here) or 'the CPU alone'}"
            ):
                devices.device_named(kind)
        elif kind != "mps":
            assert str(devices.device_named(f"{kind}:0")) == f"{kind}:0"
            with pytest.raises(
                BadRequest, match=rf"there is no device {kind}:9; there are {kind}:0 to {kind}:{here[kind] - 1}"
            ):
                devices.device_named(f"{kind}:9")


@pytest.mark.parametrize("command", ["quantize", "kv", "imatrix", "eval", "needle"])
def test_every_command_refuses_an_absent_device_before_anything_is_read(command, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_count", lambda kind: 0)
    words = ["--against", demo.MODEL] if command in ("eval", "needle") else ["-o", tmp_path / "out"]
    for device, said in (("cuda:1", "there is no device cuda:1 here"), ("gpu", "'gpu' is no device")):
        tiny.refused(tiny.halfbyte(command, demo.MODEL, *words, "--device", device), said, "auto")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(
    "words",
    [
        {"method": "gptq"},
        {"method": "gptaq"},
        {"method": "descent", "grid": "nvfp4/nvfp4"},
        {"method": "awq+gptq"},
        {"method": "smoothquant+gptq", "grid": "w8a8"},
        {"method": "gptq", "grid": "Q4_K_M", "to": "gguf"},
        {"method": "nearest", "grid": "nf4"},
        {"method": "nearest", "grid": "IQ4_XS", "to": "gguf"},
    ],
    ids=lambda words: "-".join(words.values()),
)
def test_a_run_says_where_it_was_and_loses_as_little_there(model, calibration, tmp_path, device, words):
    report = halfbyte.quantize(model, tmp_path / "out", calibration=calibration, engine="none", device=device, **words)
    assert report.device is not None
    assert report.device.solve.startswith(device)
    assert report.device.calibration == (report.device.solve if words["method"] != "nearest" else None)
    on_cpu = halfbyte.quantize(model, tmp_path / "cpu", calibration=calibration, engine="none", device="cpu", **words)
    for row, other in zip(report.weights, on_cpu.weights, strict=True):
        assert row.error == pytest.approx(other.error, rel=0 if device == "cpu" else 0.2)
    loss = halfbyte.evaluate(
        [tmp_path / "out", tmp_path / "cpu"], model, calibration["source"], length=32, device=device
    )
    assert loss.device is not None
    assert loss.device.startswith(device)
    assert loss.models[0].kl == pytest.approx(loss.models[1].kl, rel=0 if device == "cpu" else 0.2)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_caches_importance_and_needles_say_where_they_were_found(model, calibration, tmp_path, device):
    assert halfbyte.kv(model, tmp_path / "kv", calibration=calibration, device=device).device.startswith(device)
    assert halfbyte.imatrix(model, tmp_path / "i.gguf", calibration=calibration, device=device).device.startswith(
        device
    )
    found = halfbyte.needle([tmp_path / "kv"], model, lengths=(300,), depths=2, facts=1, device=device)
    assert found.device.startswith(device)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_budget_and_blame_are_found_on_a_device(model, calibration, tmp_path, device):
    words = {"calibration": calibration, "engine": "none", "method": "gptq"}
    report = halfbyte.quantize(model, tmp_path / "out.gguf", bits=6, to="gguf", device=device, **words)
    on_cpu = halfbyte.quantize(model, tmp_path / "cpu.gguf", bits=6, to="gguf", device="cpu", **words)
    assert report.budget.predicted_kl == pytest.approx(on_cpu.budget.predicted_kl, rel=0 if device == "cpu" else 0.2)
    blamed = halfbyte.blame(tmp_path / "out.gguf", model, calibration["source"], length=32, windows=2, device=device)
    assert any(part.kind == "block" for part in blamed.parts)


KNOWN_ALONE_BY_DEVICES = re.compile(
    r"device\b[^=\n]{0,20}\.type\b|\.is_(cuda|cpu|mps|xpu)\b|get_device_module|torch\.(cuda|xpu|mps)\b"
)


def test_nobody_else_asks_what_kind_a_device_is():
    sources = [path for path in ROOT.rglob("*.py") if KNOWN_ALONE_BY_DEVICES.search(path.read_text(encoding="utf-8"))]
    assert sources == [ROOT / "devices.py"]


def test_a_kind_of_device_is_one_row(monkeypatch):
    row = devices.Kind("npu", pins=True, free_bytes=lambda device: 1 << 30)
    monkeypatch.setitem(devices.KINDS, "npu", row)
    assert devices.kind_of("npu:1") is row
    assert not devices.kind_of("meta").is_host
