"""What is set outside of the program."""

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from cifar_lib import environment
from cifar_lib.errors import InputError
from scripts import build_pages

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def unset(monkeypatch, tmp_path):
    """No variable is set, and the working directory is empty."""
    for name in environment.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_the_documentation_lists_every_variable_and_nothing_else_reads_them():
    section = (ROOT / "docs" / "setup.md").read_text(encoding="utf-8")
    section = section.split("## Environment variables")[1].split("\n## ")[0]
    first_columns = "".join(re.findall(r"^\|(.*?)\|", section, re.M))
    assert set(re.findall(r"`(\w+)`", first_columns)) == set(environment.VARIABLES)
    read = re.compile(r"environ(?:\.get\(|\[)[\"']CIFAR\w+|getenv\([\"']CIFAR\w+")
    folders = ("cifar_lib", "notebooks", "scripts", "benchmarks")
    modules = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in modules if read.search(path.read_text(encoding="utf-8"))]


def test_kernels_inherit_absolute_paths_words_as_they_are_and_nothing_empty(monkeypatch, tmp_path):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))  # Windows
    (tmp_path / "own.pkl").touch()
    words = {"CIFAR_WEIGHTS": "trained", "CIFAR_RECIPE": "small", "CIFAR_EPOCHS": "2"}
    words |= {"CIFAR_DEVICE": "cuda:1", "CIFAR10_MIRROR": "https://example.org/cifar"}
    paths = {"CIFAR10_ROOT": "~/data", "CIFAR_TEST_FILE": "own.pkl", "CIFAR_RUNS": "../my runs "}
    for name, value in (words | paths).items():
        monkeypatch.setenv(name, value)
    environment.make_absolute(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    absolute = [home / "data", tmp_path / "own.pkl", tmp_path.parent / "my runs"]
    expected = words | dict(zip(paths, map(str, absolute), strict=True))
    assert {name: environment.read(name) for name in expected} == expected

    monkeypatch.setenv("CIFAR_RUNS", "runs")
    assert environment.read("CIFAR_RUNS") == str(tmp_path.parent / "runs")
    monkeypatch.setenv("CIFAR_RUNS", "  ")
    assert environment.read("CIFAR_RUNS") is None
    environment.make_absolute(Path.cwd())
    assert "CIFAR_RUNS" not in os.environ


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("CIFAR_RUNS", '"runs"', 'a value without quotes .*got "runs": leave'),
        ("CIFAR_RUNS", 'my runs"', "a value without quotes"),
        ("CIFAR10_ROOT", "'my data'", "a value without quotes"),
        ("CIFAR10_MIRROR", '"http://user:secret@host/x"', "a value without quotes"),
        ("CIFAR_RECIPE", "fast", "one of auto, small, .*, best, got fast: unset it for auto"),
        ("CIFAR_EPOCHS", "0", "a whole number from 1 to 9999, got 0: correct it"),
        ("CIFAR_EPOCHS", "1.5", "a whole number"),
        ("CIFAR_EPOCHS", "²", "a whole number"),
        ("CIFAR_WEIGHTS", "absent.safetensors", "a file that exists, or pretrained, or trained"),
        ("CIFAR_TEST_FILE", ".", "a file that exists, got .*: correct the path"),
        ("CIFAR_RUNS", "~nobody-has-this-name/x", "a path on this machine"),
        ("CIFAR_RUNS", "/content/drive/MyDrive/cifar", "a mounted Drive, got /content/drive"),
        ("CIFAR_RUNS", "/content/x/../drive", "a mounted Drive"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_variable(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"^{name}: expected {message}") as error:
        environment.read(name)
    assert "secret" not in str(error.value)


def test_a_mounted_drive_is_taken(monkeypatch):
    monkeypatch.setenv("CIFAR_RUNS", "/content/drive/MyDrive/cifar")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == environment.DRIVE)
    assert environment.read("CIFAR_RUNS") == os.path.abspath("/content/drive/MyDrive/cifar")


def test_a_missing_package_is_one_line_with_what_to_install(monkeypatch):
    environment.require("cleanlab", "Suspect labels")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    message = "^Suspect labels: .*cleanlab.*pip install --no-deps cleanlab termcolor$"
    with pytest.raises(InputError, match=message):
        environment.require("cleanlab", "Suspect labels")


def test_notebooks_are_not_started_with_a_wrong_variable(monkeypatch, capsys):
    wrong = "CIFAR_WEIGHTS: expected a file"
    monkeypatch.setenv("CIFAR_WEIGHTS", "absent.safetensors")
    monkeypatch.setattr(sys, "argv", ["build_pages"])
    assert build_pages.main() == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {wrong}") and said.err.count("\n") == 1 and not said.out

    command = [sys.executable, "-m", "pytest", "--nbmake", "notebooks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    (line,) = filter(None, done.stderr.splitlines())
    assert done.returncode == 4 and wrong in line


def test_torch_finds_a_users_name_and_asks_for_huge_pages(monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    # What Linux and Windows say of a user without a name.
    for error in (KeyError("no such uid"), ModuleNotFoundError("No module named 'pwd'")):
        monkeypatch.setattr("getpass.getuser", Mock(side_effect=error))
        environment.prepare_for_torch()
        assert os.environ.pop("USER") == (str(os.getuid()) if hasattr(os, "getuid") else "user")
    assert os.environ.pop("THP_MEM_ALLOC_ENABLE") == "1"
