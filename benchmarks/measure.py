"""Run a command as a whole process: wall seconds, processor seconds, peak memory."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

# A process begins with the peak memory of the one that started it, so a small one stands between: this one has imported
# torch.
STARTER = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(f"\\n{usage.ru_utime + usage.ru_stime} {usage.ru_maxrss}")
sys.exit(status != 0)
"""


@dataclass(frozen=True)
class Cost:
    wall: float
    cpu: float
    peak_mb: float


def run(command: list[str], **environment: str) -> Cost:
    """Raises CalledProcessError with the command's own words if it fails."""
    started = time.perf_counter()
    starter = [sys.executable, "-S", "-c", STARTER, *command]
    done = subprocess.run(
        starter, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **environment}, check=False
    )
    wall = time.perf_counter() - started
    if done.returncode:
        sys.stderr.write(done.stdout.decode(errors="replace")[-2000:])
        raise subprocess.CalledProcessError(done.returncode, command)
    cpu, peak_kb = map(float, done.stdout.splitlines()[-1].split())
    return Cost(wall, cpu, peak_kb / 1024)


def machine() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next(
            (line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown processor"
        )
    return (
        f"{os.cpu_count()} cores of {model}, "
        f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
        f"{'' if torch.cuda.is_available() else ', no GPU'}"
    )
