"""What models are run on: devices.yaml, and which of them is here."""

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from halfbyte.errors import BadRequest, UnknownName

GIB = 1 << 30
ECC_SHARE = 15 / 16
"""Of GDDR6 that error correction leaves (nvidia-smi of an L40S of 48 GiB: 46068 MiB)."""
UNITS = {
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "tb": 1e12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": GIB,
    "tib": 1 << 40,
    "b": 1,
}
FOUND_BY = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Device:
    """A card, a chip or a processor. What its maker does not publish is None."""

    name: str
    title: str
    vendor: str
    kind: Literal["consumer", "workstation", "datacentre", "cpu"]
    source: str
    bandwidth: float | None = None
    """GB/s."""
    memory: float | None = None
    """GiB, as it is sold; of a CPU it is the machine's."""
    ecc: bool = False
    unified: bool = False
    """Whether its memory is the system's."""
    fp16: float | None = None
    """10^12 dense operations per second, in this and the next three."""
    int8: float | None = None
    fp8: float | None = None
    fp4: float | None = None
    capability: float | None = None
    """NVIDIA's compute capability."""
    checked: bool = True
    """Whether its figures were read in public text, which source then names."""

    @property
    def memory_bytes(self) -> int | None:
        """What programs see."""
        return int(self.memory * GIB * (ECC_SHARE if self.ecc else 1)) if self.memory else None

    def arithmetic(self, dtype: str) -> float | None:
        """Operations per second in a dtype, or None where that is unknown or it has none."""
        rate = {"fp16": self.fp16, "int8": self.int8, "fp8": self.fp8, "fp4": self.fp4}[dtype]
        return rate * 1e12 if rate else None


@cache
def devices() -> dict[str, Device]:
    """Every row of devices.yaml."""
    text = files("halfbyte.sizing").joinpath("devices.yaml").read_text(encoding="utf-8")
    table: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(text)
    return {
        name: Device(name=name, vendor=vendor, **row) for vendor, rows in table.items() for name, row in rows.items()
    }


def device_called(name: str) -> Device:
    """The row of a device under any spelling of its name or title. Raises UnknownName."""
    plain = _plain(name)
    listed = devices()
    device = next((d for d in listed.values() if plain in (_plain(d.name), _plain(d.title), _short(d.title))), None)
    if device is None:
        raise UnknownName("device", name, listed)
    return device


def unlisted(memory: str | int) -> Device:
    """A device of which nothing but its memory is known: 24GiB, 16GB, or bytes."""
    size = parse_size(memory) if isinstance(memory, str) else memory
    return Device(f"{size / GIB:.4g}GiB", "a device", "unknown", "consumer", "as asked for", memory=size / GIB)


def parse_size(text: str) -> int:
    """Bytes of a size in any unit. Raises BadRequest."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get((match[2] or "b").lower()) if match else None
    if match is None or unit is None or match[1].count(".") > 1 or not match[1].strip("."):
        raise BadRequest(f"'{text}' is no size; write one such as 24GiB, 16GB or 8000000000 (bytes)")
    size = int(float(match[1]) * unit)
    if size <= 0:
        raise BadRequest(f"'{text}' is no size; write one above 0, such as 24GiB")
    return size


def here() -> list[Device]:
    """What is on this machine: its GPUs, as the driver or the system names them, and its memory. No library that
    computes is loaded."""
    return [*_nvidia(), *_apple(), this_cpu()]


def this_cpu() -> Device:
    """This machine without a GPU. How fast its memory is, is not known without asking for rights."""
    import psutil  # which `halfbyte --help` need not wait for

    memory = psutil.virtual_memory().total / GIB
    return Device("cpu", "this machine's CPU", "cpu", "cpu", "psutil", memory=memory, unified=True)


def _nvidia() -> list[Device]:
    gpus = []
    for line in _lines(FOUND_BY):
        title, _, mib = line.rpartition(",")
        if mib.strip().isdigit():
            gpus.append(as_driver_says(title.strip(), int(mib) / 1024))
    return gpus


def as_driver_says(title: str, gib: float) -> Device:
    """The row of an NVIDIA card under its driver's name; of cards that share one, that with the nearest memory."""
    alike = [d for d in devices().values() if d.vendor == "nvidia" and _model(d.title) == _model(title)]
    unknown = Device("gpu", title, "nvidia", "consumer", "nvidia-smi", memory=gib)
    return min(alike, key=lambda d: abs((d.memory_bytes or 0) / GIB - gib), default=unknown)


def _apple() -> list[Device]:
    titles = {_plain(line) for line in _lines(("sysctl", "-n", "machdep.cpu.brand_string"))}
    return [d for d in devices().values() if d.vendor == "apple" and _plain(d.title) in titles]


def _lines(command: tuple[str, ...]) -> list[str]:
    """What a program of the system says, or nothing where there is none such."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _model(title: str) -> str:
    """Without maker, memory and form."""
    name = re.sub(r"-SXM\d?|-PCIE|\bSXM\d?\b|\b\d+GB\b|\bHBM\w*|(Workstation|Server) Edition", " ", title)
    return _short(name)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", name.lower())


def _short(title: str) -> str:
    """Without the words that people leave out."""
    return re.sub(r"^(nvidia|amd|intel|apple|geforce|radeon|instinct|tesla)+", "", _plain(title)) or _plain(title)
