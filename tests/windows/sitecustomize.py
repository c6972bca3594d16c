"""Python as it is on Windows, as far as Linux can play it: put this folder on PYTHONPATH.

What Windows lacks is taken away from this repository's code only. Libraries choose between the
systems by `os.name`, which can't be changed here, so they keep what they need. In the same way only
this repository's code is refused when it replaces or deletes a file that is open in this process.
"""

import builtins
import os
import signal
import sys
import sysconfig
import types
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
FOLDERS = "cifar_lib notebooks scripts tests extras benchmarks"
OURS = tuple(os.path.join(ROOT, folder) for folder in FOLDERS.split())
STANDARD = sysconfig.get_path("stdlib")
PACKAGES = sysconfig.get_path("purelib")

MODULES = {"fcntl", "grp", "pwd", "resource", "termios"}
MISSING = {
    os: ["O_NOFOLLOW", "fork", "getuid", "geteuid", "mkfifo", "sched_getaffinity", "sysconf"],
    signal: ["SIGALRM", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGUSR1", "alarm", "pause", "setitimer"],
}


def _is_ours(frame: types.FrameType) -> bool:
    """Return whether this repository's code asks: a file of ours, or a notebook's cell."""
    name = frame.f_code.co_filename
    return name.startswith(OURS) or "ipykernel_" in name


def _hide(module: types.ModuleType, names: list[str]) -> None:
    hidden = {name: module.__dict__.pop(name) for name in names if hasattr(module, name)}

    class Windows(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            if name in hidden and not _is_ours(sys._getframe(1)):
                return hidden[name]
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

    module.__class__ = Windows


def _refuse_open_files(name: str) -> None:
    real = getattr(os, name)

    def checked(*paths: object, **options: object) -> None:
        # The standard library acts for whoever calls it.
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename.startswith((STANDARD, "<")):
            if frame.f_code.co_filename.startswith(PACKAGES):
                break
            frame = frame.f_back
        if frame and _is_ours(frame):
            for path in paths:
                if os.path.realpath(os.fsdecode(path)) in _open_files():
                    # 13 is what WinError 32, a sharing violation, becomes as errno.
                    raise PermissionError(13, "[WinError 32] another process uses the file", path)
        real(*paths, **options)

    setattr(os, name, checked)


def _open_files() -> set[str]:
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # the listing's own
            continue
    return found


_import = builtins.__import__


def _import_as_on_windows(name: str, *rest: object, **options: object) -> types.ModuleType:
    if name in MODULES and _is_ours(sys._getframe(1)):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return _import(name, *rest, **options)


builtins.__import__ = _import_as_on_windows
for _module, _names in MISSING.items():
    _hide(_module, _names)
for _name in ("replace", "rename", "unlink", "remove"):
    _refuse_open_files(_name)
