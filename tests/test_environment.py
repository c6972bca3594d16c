"""What is set outside of the program."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_lib import environment
from cifar_lib.errors import InputError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def unset(monkeypatch, tmp_path):
    """No variable is set, and the working directory is empty."""
    for name in environment.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_the_documentation_lists_every_variable():
    section = (ROOT / "docs" / "setup.md").read_text(encoding="utf-8")
    section = section.split("## Environment variables")[1].split("\n## ")[0]
    first_columns = "".join(re.findall(r"^\|(.*?)\|", section, re.M))
    assert set(re.findall(r"`(\w+)`", first_columns)) == set(environment.VARIABLES)


def test_nothing_else_reads_them():
    read = re.compile(r"environ(?:\.get\(|\[)[\"'](CIFAR\w+)|getenv\([\"'](CIFAR\w+)")
    modules = [*(ROOT / "cifar_lib").glob("*.py"), *(ROOT / "notebooks").glob("*.py")]
    assert not [path for path in modules if read.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_one_is_as_good_as_none(monkeypatch, value):
    monkeypatch.setenv("CIFAR_RUNS", value)
    assert environment.read("CIFAR_RUNS") is None
    environment.make_absolute(Path.cwd())
    assert "CIFAR_RUNS" not in os.environ


def test_paths_are_made_absolute(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))  # Windows
    monkeypatch.setenv("CIFAR_RUNS", "~/runs")
    assert environment.read("CIFAR_RUNS") == str(tmp_path / "home" / "runs")
    monkeypatch.setenv("CIFAR_RUNS", "../my runs ")
    assert environment.read("CIFAR_RUNS") == str(tmp_path.parent / "my runs")
    assert environment.read("CIFAR_RUNS", tmp_path / "a") == str(tmp_path / "my runs")


def test_kernels_inherit_absolute_paths_and_words_as_they_are(monkeypatch, tmp_path):
    (tmp_path / "own.pkl").touch()
    values = {
        "CIFAR10_ROOT": "mydata",
        "CIFAR_TEST_FILE": "own.pkl",
        "CIFAR_WEIGHTS": "trained",
        "CIFAR_PROFILE": "full",
        "CIFAR_DEVICE": "cuda:1",
        "CIFAR10_MIRROR": "https://example.org/cifar",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    environment.make_absolute(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    paths = {name: str(tmp_path / values[name]) for name in ("CIFAR10_ROOT", "CIFAR_TEST_FILE")}
    assert {name: environment.read(name) for name in values} == values | paths


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("CIFAR_RUNS", '"runs"', 'a value without quotes .*got "runs": leave'),
        ("CIFAR10_ROOT", "'my data'", "a value without quotes"),
        ("CIFAR10_MIRROR", '"http://user:secret@host/x"', "a value without quotes"),
        ("CIFAR_PROFILE", "fast", "quick or full, got fast: unset it for quick"),
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
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


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


@pytest.mark.parametrize(
    "command", [["-m", "scripts.build_pages"], ["-m", "pytest", "--nbmake", "notebooks"]]
)
def test_notebooks_are_not_started_with_a_wrong_variable(command):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "CIFAR_WEIGHTS": "absent.safetensors"},
        capture_output=True,
        encoding="utf-8",
    )
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode in (2, 4) and len(lines) == 1
    assert "CIFAR_WEIGHTS: expected a file" in lines[0] and "running" not in done.stdout
