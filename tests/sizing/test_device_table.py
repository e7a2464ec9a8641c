"""The tables of devices and of what runs on them."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

import tiny
from halfbyte import display
from halfbyte.engines.engines import ENGINES
from halfbyte.errors import BadRequest, UnknownName
from halfbyte.grids import schemes
from halfbyte.recipe import method_named
from halfbyte.sizing.choices import PLAIN, choices
from halfbyte.sizing.devices import GIB, Device, as_driver_says, device_called, devices, here, parse_size, unlisted
from halfbyte.targets.gguf import presets


def test_every_row_has_a_source_and_sound_numbers():
    assert len(devices()) > 60
    assert {d.vendor for d in devices().values()} == {"nvidia", "amd", "apple", "intel", "cpu"}
    for d in devices().values():
        assert len(d.source) > 5
        assert 30 < (d.bandwidth or 0) < 10_000
        assert (d.memory is None) == (d.kind == "cpu")
        assert (d.capability is not None) == (d.vendor == "nvidia")
        assert d.fp8 is None or d.capability is None or d.capability >= 8.9
        assert d.fp4 is None or d.capability is None or d.capability >= 10


@pytest.mark.parametrize(
    ("said", "gib", "name"),
    [
        ("NVIDIA GeForce RTX 4090", 23.99, "rtx-4090"),
        ("NVIDIA GeForce RTX 4060 Ti", 16, "rtx-4060-ti-16gb"),
        ("Tesla T4", 15, "t4"),
        ("NVIDIA A100-SXM4-80GB", 80, "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", 40, "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", 79.6, "h100"),
        ("NVIDIA H100 PCIe", 79.6, "h100-pcie"),
        ("NVIDIA L40S", 45, "l40s"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 95.6, "rtx-pro-6000"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16, "gpu"),
    ],
)
def test_names_of_the_driver(said, gib, name):
    assert as_driver_says(said, gib).name == name


def test_names_of_people():
    assert device_called("RTX 4090") is device_called("rtx4090") is device_called("NVIDIA GeForce RTX 4090")
    assert device_called("M4 Max").name == "m4-max"
    with pytest.raises(UnknownName, match="did you mean rtx-4090"):
        device_called("rtx-4099")


def test_error_correction_takes_a_sixteenth():
    """nvidia-smi of an L40S: 46068 MiB, of an A10: 23028 MiB, of a T4: 15360 MiB."""
    for name, mib in (("l40s", 46068), ("a10", 23028), ("t4", 15360)):
        assert device_called(name).memory_bytes == pytest.approx(mib << 20, rel=0.001)


def test_error_correction_is_off_by_default_on_a_workstation():
    """nvidia-smi of an RTX 6000 Ada: 49140 MiB."""
    assert device_called("rtx-6000-ada").memory_bytes == pytest.approx(49140 << 20, rel=0.001)


def test_sizes():
    assert parse_size("24GiB") == 24 * GIB == unlisted("24 gib").memory_bytes
    assert parse_size("16GB") == 16e9
    assert parse_size("1000") == 1000
    for words in ("24 gigs", "", "-3GB", "0GB", "1.2.3GB", "GB"):
        with pytest.raises(BadRequest, match="is no size"):
            parse_size(words)


def test_what_is_here_ends_with_the_cpu():
    assert here()[-1].kind == "cpu"
    assert here()[-1].memory_bytes


def test_choices_are_of_known_engines_and_words():
    assert set(choices()) <= set(ENGINES)
    for rows in choices().values():
        for name, choice in rows.items():
            assert all(kernel.source for kernel in choice.kernels)
            if name == PLAIN:
                assert not choice.recipe
                continue
            method = choice.recipe.get("method")
            assert method is None or method_named(method)
            grid = choice.recipe["grid"]
            assert grid in presets.PRESETS or schemes.parse(grid)


@pytest.mark.parametrize(
    ("engine", "choice", "device", "kernel"),
    [
        ("vllm", "fp8", "h100", "CUTLASS FP8"),
        ("vllm", "fp8", "a100-80gb", "Marlin"),
        ("vllm", "fp8", "t4", None),
        ("vllm", "nvfp4", "b200", "CUTLASS FP4"),
        ("vllm", "nvfp4", "h100", "Marlin"),
        ("vllm", "w8a8", "h100", "CUTLASS INT8"),
        ("vllm", "w8a8", "b200", None),
        ("vllm", "fp8", "mi300x", "CUTLASS FP8"),
        ("vllm", "fp8", "rx-7900-xtx", None),
        ("vllm", "fp8", "m4", None),
        ("transformers", "nf4", "t4", "bitsandbytes 4-bit"),
        ("ollama", "Q4_K_M", "m4", "ggml's own"),
        ("mlx", "int4-g64", "rtx-4090", None),
    ],
)
def test_kernels(engine, choice, device, kernel):
    found = choices()[engine][choice].kernel_on(device_called(device))
    assert (found and found.name) == kernel


def test_what_is_not_known_of_a_device_excludes_nothing():
    assert choices()["vllm"]["fp8"].kernel_on(unlisted("24GiB"))
    assert choices()["vllm"]["fp8"].kernel_on(Device("gpu", "a new card", "nvidia", "consumer", "nvidia-smi"))


def test_the_command_lists_in_80_columns_without_torch():
    code = "import sys; from halfbyte.cli import main\nmain(['devices'])\nprint('torch' in sys.modules)"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[-1] == "False"
    assert any(line.startswith("rtx-4090 ") and "1008" in line for line in lines)
    assert any(line.startswith("here: ") for line in lines)
    assert all(len(line) <= 80 for line in lines if not line.startswith("here: "))


def test_the_command_shows_one():
    done = tiny.halfbyte("devices", "l40s")
    assert "864 GB/s" in done.out
    assert "CUTLASS FP8" in done.out
    shown = display.device(device_called("l40s"), {engine: list(row.values()) for engine, row in choices().items()})
    console = Console(width=80, record=True, file=io.StringIO())
    for part in shown:
        console.print(part)
    assert all(len(line) <= 80 for line in console.export_text().splitlines())
    rows = json.loads(tiny.halfbyte("devices", "l40s", "--json").out)["devices"]
    assert rows[0]["source"] == device_called("l40s").source
    assert rows[0]["checked"] is True


def test_figures_that_were_read_nowhere_are_said_to_be_so():
    unread = [d for d in devices().values() if not d.checked]
    assert unread
    shown = [part for d in unread for part in display.device(d, {})]
    assert shown.count(display.UNCHECKED) == len(unread)
    assert f"*: {display.UNCHECKED}" in display.devices(unread, [])
    assert display.UNCHECKED not in display.device(device_called("l40s"), {})
