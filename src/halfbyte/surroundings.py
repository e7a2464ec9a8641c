"""What libraries are told through the environment where halfbyte is the program. They read it as they are loaded, so it
is said before."""

import ctypes
import hashlib
import os
import sys
import tempfile
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Names that malloc.h has for numbers."""
LARGE_BYTES, END_BYTES = 8 << 20, 64 << 20
_OURS: set[str] = set()
"""What `arrange` said."""


def arrange() -> None:
    """What the user says goes first."""
    _say("TRANSFORMERS_VERBOSITY", "error")  # its warnings are about uses of a model that are not ours
    _say("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin where they wait for others take a neighbour's time
    if place := kernels():
        _say("NUMBA_CACHE_DIR", str(place))
    share_one_heap()


def _say(name: str, value: str) -> None:
    if name not in os.environ:
        os.environ[name] = value
        _OURS.add(name)


def of_the_user() -> dict[str, str]:
    """The environment without that, for programs of others."""
    return {name: value for name, value in os.environ.items() if name not in _OURS}


def share_one_heap() -> None:
    """Have glibc return every large block as it is freed: else it keeps those of up to 32 MB in a heap with holes (of
    gptq on a block of 60 million weights, a peak of 1.80 GB for 1.63 GB).

    To set that ends glibc's own adaptation of both thresholds: the heap's end would go back at every 128 KB, to be
    asked for again at once, and gptq take a tenth longer. All threads share one heap, since what is free in one of
    their own is of no use to another; they ask for few and large pieces.
    """
    if sys.platform == "linux" and (set_option := getattr(ctypes.CDLL(None), "mallopt", None)):
        set_option(M_MMAP_THRESHOLD, LARGE_BYTES)
        set_option(M_TRIM_THRESHOLD, END_BYTES)
        set_option(M_ARENA_MAX, 1)


def kernels() -> Path | None:
    """Where compiled kernels are kept, in the user's cache: they outlive an installation, and it need not be one that
    can be written to.

    None where the user has no cache: it is left to Numba to find another place, or to do without.

    It is named after all of their sources: Numba compares the one file that a kernel is in, and kernels contain what
    they call in others.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "halfbyte"
    here = Path(__file__).parent
    sources = sorted([*here.glob("kernels/**/*.py"), *here.glob("*/**/*_numba.py")])
    name = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    try:
        home.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=home).close()
    except OSError:
        return None
    return home / name
