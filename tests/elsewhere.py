"""A process in which what only Unix has is not there, and files that are open or mapped are neither moved nor deleted,
as on Windows.

Words: how many records of a run's journal to write before the process ends at once (0: it runs on), then the commands
as JSON.
"""

import builtins
import json
import os
import shutil
import signal
import sys
import warnings
from types import ModuleType

MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "pty", "posix_ipc", "syslog")
FUNCTIONS = (
    "pwrite",
    "pread",
    "posix_fallocate",
    "posix_fadvise",
    "fork",
    "forkpty",
    "geteuid",
    "getuid",
    "getegid",
    "getgid",
    "chown",
    "mkfifo",
    "sysconf",
    "sched_getaffinity",
    "getloadavg",
    "uname",
    "O_NOFOLLOW",
    "O_DIRECTORY",
    "O_CLOEXEC",
    "O_NONBLOCK",
)
SIGNALS = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGKILL", "SIGPIPE")


def hide() -> None:
    """From halfbyte; other packages know the system that they are on."""
    for name in ("rename", "replace", "unlink", "remove", "rmdir"):
        setattr(os, name, guarded(getattr(os, name)))
    shutil._use_fd_functions = False
    instead: dict[str, ModuleType | None] = dict.fromkeys(MODULES)
    for module, names in ((os, FUNCTIONS), (signal, SIGNALS)):
        instead[module.__name__] = without = ModuleType(module.__name__)
        without.__dict__.update({name: value for name, value in vars(module).items() if name not in names})
    load = builtins.__import__

    def found(name, globals=None, locals=None, fromlist=(), level=0):
        if name in instead and (globals or {}).get("__name__", "").startswith("halfbyte"):
            if instead[name] is None:
                raise ImportError(f"{name} is not on this system")
            return instead[name]
        return load(name, globals, locals, fromlist, level)

    builtins.__import__ = found
    warnings.filterwarnings("error", category=EncodingWarning, module=r"halfbyte")


def guarded(function):
    def guard(path, *rest, **options):
        real = os.path.realpath(path)
        held = [p for p in in_use() if p == real or p.startswith(real + os.sep)]
        if held and not real.endswith(".lock"):  # filelock does otherwise there
            raise PermissionError(13, "in use: " + held[0], str(path))
        return function(path, *rest, **options)

    return guard


def in_use() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    with open("/proc/self/maps", encoding="utf-8") as file:
        return found | {line.split(maxsplit=5)[5].strip() for line in file if len(line.split(maxsplit=5)) == 6}


def main() -> None:
    hide()
    from halfbyte import cli
    from halfbyte.containers.folder import OutputFolder

    after, record, seen = int(sys.argv[1]), OutputFolder.record, 0

    def cut(self, value):
        nonlocal seen
        record(self, value)
        seen += 1
        if seen == after:
            os._exit(9)

    OutputFolder.record = cut
    for words in json.loads(sys.argv[2]):
        cli.main(words)


if __name__ == "__main__":
    main()
