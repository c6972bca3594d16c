"""The program's environment variables, and optional packages, which may be missing.

All variables are read in this module. docs/setup.md lists them for users; a test compares the two.
"""

import getpass
import importlib.util
import os
from pathlib import Path

from cifar_lib.errors import InputError

# What kind of value each variable has.
VARIABLES = {
    "CIFAR_RECIPE": "word",
    "CIFAR_EPOCHS": "count",
    "CIFAR_DEVICE": "device",
    "CIFAR10_ROOT": "folder",
    "CIFAR10_MIRROR": "address",
    "CIFAR_TEST_FILE": "file",
    "CIFAR_WEIGHTS": "file",
    "CIFAR_RUNS": "folder",
    "CIFAR_FIGURES": "folder",
}

# The words that a variable may be set to. The first word is the default. A variable of the kind
# "word" takes nothing else, a variable of another kind also takes a path.
WORDS = {
    "CIFAR_RECIPE": ("auto", "small", "short", "report", "best"),
    "CIFAR_WEIGHTS": ("pretrained", "trained"),
}
# Variables of older versions, and what to do instead. Setting one is an error, because otherwise it
# would silently have no effect.
RETIRED = {
    "CIFAR_PROFILE": "notebooks look at all images now; CIFAR_RECIPE says what notebook 3 trains"
}
DRIVE = Path("/content/drive")  # where Colab mounts Google Drive

# Packages that only some sections of the notebooks need, and what pip has to install for each: the
# package itself and those of its dependencies that may be missing. pip must not add dependencies on
# its own, because it would replace the numpy or torch that Colab and Kaggle come with.
OPTIONAL = {
    "cleanlab": "cleanlab termcolor",
    "optuna": "optuna colorlog alembic mako sqlalchemy",
}


def prepare_for_torch() -> None:
    """Set the variables that PyTorch reads, unless the user has set them."""
    # Put large tensors in huge pages, if Linux grants them on request. The CPU then has fewer
    # pages to look up.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

    # Importing torch asks for the user's name. The request fails in a container whose user has a
    # number but no name. It also fails on Windows, where users have no such number, if USERNAME
    # isn't set.
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["USER"] = str(os.getuid()) if hasattr(os, "getuid") else "user"


def read(name: str, base: Path | None = None) -> str | None:
    """Return the checked value of the variable `name`, or None if it isn't set or is empty.

    A path is returned as an absolute one, with `~` replaced. A relative path is taken from `base`,
    which is the working directory by default.

    Raises InputError if the value isn't of the variable's kind in VARIABLES.
    """
    # On Windows, `set X=a && ...` leaves a space at the end of the value.
    value = os.environ.get(name, "").strip()
    if not value:
        return None
    kind, words = VARIABLES[name], WORDS.get(name, ())
    if value[0] in "\"'" or value[-1] == '"':
        # An address isn't shown, because it may contain a password.
        got = "an address with quotes" if kind == "address" else value
        raise _wrong(name, got, "a value without quotes around it", "leave the quotes out")
    if value in words or kind in ("address", "device"):
        return value
    if kind == "word":
        raise _wrong(name, value, "one of " + ", ".join(words), f"unset it for {words[0]}")

    if kind == "count":
        if not (value.isascii() and value.isdigit() and 1 <= len(value) <= 4 and int(value) > 0):
            raise _wrong(name, value, "a whole number from 1 to 9999", "correct it, or unset it")
        return value

    # The remaining kinds are paths of files and folders. Only a file must exist already.
    path = _absolute(name, value, base or Path.cwd())
    if kind == "file" and not path.is_file():
        expected = "a file that exists" + "".join(f", or {word}" for word in words)
        raise _wrong(name, str(path), expected, "correct the path, or unset the variable")
    return str(path)


def make_absolute(base: Path) -> None:
    """Make the paths in the variables absolute, because notebook kernels start in another folder.

    Relative paths are taken from `base`. Empty variables are unset.

    Raises InputError if a variable has a wrong value, or if one of the RETIRED variables is set.
    """
    for name, instead in RETIRED.items():
        if os.environ.get(name, "").strip():
            raise InputError(f"{name}: this variable no longer exists: unset it ({instead})")
    for name in VARIABLES:
        value = read(name, base)
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def require(package: str, purpose: str) -> None:
    """Check that `package`, one of OPTIONAL, is installed. `purpose` says in the message what for.

    Raises InputError if it isn't; the message says which command installs it.
    """
    if importlib.util.find_spec(package) is None:
        remedy = f"run pip install --no-deps {OPTIONAL[package]}"
        raise InputError(f"{purpose}: the package {package} isn't installed: {remedy}")


def _absolute(name: str, value: str, base: Path) -> Path:
    """Return the value of the variable `name` as an absolute path.

    Raises InputError if `~` can't be replaced, or if the path is on a Drive that isn't mounted.
    """
    expanded = os.path.expanduser(value)
    if expanded.startswith("~"):  # the user doesn't exist, or has no home folder
        raise _wrong(name, value, "a path on this machine", "write the whole path instead of ~")

    # abspath resolves `..` in the text alone, so "notebooks/../runs" works without "notebooks".
    path = Path(os.path.abspath(base / expanded))

    # If Drive isn't mounted, its folder can still be created, because the user is root on Colab.
    # But the folder would be on the local disk, and would be lost with the machine.
    below_drive = DRIVE in (path, *path.parents)
    if below_drive and not os.path.ismount(DRIVE):
        mount = f'from google.colab import drive; drive.mount("{DRIVE}")'
        raise _wrong(name, value, "a mounted Drive", f"run `{mount}` first, or name another folder")
    return path


def _wrong(name: str, value: str, expected: str, remedy: str) -> InputError:
    """Return the error for a variable with a wrong value."""
    return InputError(f"{name}: expected {expected}, got {value}: {remedy}")
