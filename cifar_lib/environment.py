"""What is set outside of the program: its environment variables, and packages that may be missing.

All variables are read here. docs/setup.md lists them for users; a test compares the two.
"""

import getpass
import importlib.util
import os
from pathlib import Path

from cifar_lib.errors import InputError

# What each variable names; and the words that it may be as well, or that a "word" has to be.
VARIABLES = {
    "CIFAR_PROFILE": "word",
    "CIFAR_DEVICE": "device",
    "CIFAR10_ROOT": "folder",
    "CIFAR10_MIRROR": "address",
    "CIFAR_TEST_FILE": "file",
    "CIFAR_WEIGHTS": "file",
    "CIFAR_RUNS": "folder",
}
WORDS = {"CIFAR_PROFILE": ("quick", "full"), "CIFAR_WEIGHTS": ("pretrained", "trained")}
DRIVE = Path("/content/drive")  # where Colab mounts Google Drive

# Packages that only some sections need, and what pip installs for each. Their dependencies are
# named, and no others are installed: those would replace the numpy or torch of Colab and Kaggle.
OPTIONAL = {
    "cleanlab": "cleanlab termcolor",
    "optuna": "optuna colorlog alembic mako sqlalchemy",
}


def prepare_for_torch() -> None:
    """Set the variables that PyTorch reads, where they aren't set."""
    # Large tensors in huge pages, where Linux gives them on request: a CPU then looks up fewer
    # addresses, and trains about a tenth faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

    # Importing torch asks for the user's name, and fails in a container whose user has only a
    # number. Windows has neither the number nor the module pwd.
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["USER"] = str(os.getuid()) if hasattr(os, "getuid") else "user"


def read(name: str, base: Path | None = None) -> str | None:
    """The value of the variable `name`, checked; None where it isn't set, or is empty.

    A path begins with no `~` any more and is absolute; a relative one is relative to `base`, the
    working directory by default.

    Raises InputError if it isn't what the variable names: see VARIABLES.
    """
    value = os.environ.get(name, "").strip()  # cmd's `set X=a && ...` leaves a space at the end
    if not value:
        return None
    kind, words = VARIABLES[name], WORDS.get(name, ())
    if value[0] in "\"'" or value[-1] == '"':
        got = "some" if kind == "address" else value  # an address may hold a password
        raise _wrong(name, got, "a value without quotes around it", "leave the quotes out")
    if value in words or kind in ("address", "device"):
        return value
    if kind == "word":
        raise _wrong(name, value, " or ".join(words), f"unset it for {words[0]}")
    path = _absolute(name, value, base or Path.cwd())
    if kind == "file" and not path.is_file():
        expected = "a file that exists" + "".join(f", or {word}" for word in words)
        raise _wrong(name, str(path), expected, "correct the path, or unset the variable")
    return str(path)


def make_absolute(base: Path) -> None:
    """Put absolute paths into the variables, for kernels, which start in another folder.

    Relative ones are taken as relative to `base`.

    Raises InputError if a variable is wrong.
    """
    for name in VARIABLES:
        value = read(name, base)
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def require(package: str, purpose: str) -> None:
    """Check for one of the OPTIONAL packages, right before it is imported for `purpose`.

    Raises InputError if it isn't installed; the message says what to type.
    """
    if importlib.util.find_spec(package) is None:
        remedy = f"pip install --no-deps {OPTIONAL[package]}"
        raise InputError(f"{purpose}: expected the package {package}, it isn't installed: {remedy}")


def _absolute(name: str, value: str, base: Path) -> Path:
    home = os.path.expanduser(value)
    if home.startswith("~"):  # a user without a home folder, or one who doesn't exist
        raise _wrong(name, value, "a path on this machine", "write the whole path instead of ~")
    # `..` is taken out of the text first: "notebooks/../runs" needs no folder "notebooks".
    path = Path(os.path.abspath(base / home))
    below_drive = DRIVE in (path, *path.parents)
    if below_drive and not os.path.ismount(DRIVE):
        # As root such a folder would be created on the local disk, and lost with the machine.
        mount = f'from google.colab import drive; drive.mount("{DRIVE}")'
        raise _wrong(name, value, "a mounted Drive", f"run {mount} first, or name another folder")
    return path


def _wrong(name: str, value: str, expected: str, remedy: str) -> InputError:
    return InputError(f"{name}: expected {expected}, got {value}: {remedy}")
