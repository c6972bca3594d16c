"""scripts/set_address.py, on a copy of the files that it changes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import set_address as program

ROOT = Path(__file__).parent.parent
OTHERS = """
[another repository](https://github.com/YOUR_ACCOUNT/cifar-lib-notes), in plain words
YOUR_ACCOUNT/cifar-lib, https://example.org/YOUR_ACCOUNT/cifar-lib and cifar_lib/cli.py
"""
OWN = """
git clone https://github.com/YOUR_ACCOUNT/cifar-lib.git
[workflow](https://github.com/YOUR_ACCOUNT/cifar-lib/actions), https://github.com/YOUR_ACCOUNT/cifar-lib.
"""


@pytest.fixture
def copy(tmp_path) -> Path:
    for folder, pattern in (("notebooks", "*.ipynb"), ("scripts", "*.py"), ("docs", "*.md")):
        (tmp_path / folder).mkdir()
        for path in (ROOT / folder).glob(pattern):
            shutil.copy(path, tmp_path / folder)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    with open(tmp_path / "README.md", "a", encoding="utf-8", newline="") as readme:
        readme.write(OTHERS + OWN)
    return tmp_path


def set_address(copy: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, copy / "scripts" / "set_address.py", *words]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


def contents(copy: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "given",
    [
        "jane/resnet.2",
        "https://github.com/jane/resnet.2",
        "https://github.com/jane/resnet.2.git/",
        "git@github.com:jane/resnet.2.git",
    ],
)
def test_whole_addresses_change_and_nothing_else(copy, given):
    before = contents(copy)
    assert set_address(copy, given).returncode == 0
    for path, old in before.items():
        kept = old.replace(OTHERS.encode(), b"")
        for host in (b"https://github.com/", b"https://colab.research.google.com/github/"):
            kept = kept.replace(host + b"YOUR_ACCOUNT/cifar-lib", host + b"jane/resnet.2")
        assert path.read_bytes().replace(OTHERS.encode(), b"") == kept, path.name
    assert OTHERS in (copy / "README.md").read_text(encoding="utf-8")
    (notebook, *_) = (copy / "notebooks").glob("01*.ipynb")
    text = notebook.read_text(encoding="utf-8")
    assert 'ADDRESS = \\"https://github.com/jane/resnet.2\\"' in text
    assert 'Path(\\"cifar-lib/cifar_lib\\")' in text  # the clone's folder, whatever its address


def test_twice_and_back_is_what_it_was(copy):
    before = contents(copy)
    for address in ("jane/cifar", "jane/cifar", "jane/cifar-lib-2", "YOUR_ACCOUNT/cifar-lib"):
        assert set_address(copy, address).returncode == 0
    assert contents(copy) == before


def test_an_address_that_was_written_wrongly_is_repaired(copy):
    for path in (copy / "pyproject.toml", *(copy / "notebooks").glob("*.ipynb")):
        path.write_bytes(path.read_bytes().replace(b"YOUR_ACCOUNT/cifar-lib", b"cifar"))
    assert set_address(copy, "jane/cifar-lib").returncode == 0
    for path in (copy / "notebooks").glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        badge = f"/github/jane/cifar-lib/blob/main/notebooks/{path.name}"
        assert badge in text and 'ADDRESS = \\"https://github.com/jane/cifar-lib\\"' in text
        assert "cifar_lib" in text


@pytest.mark.parametrize(
    "given",
    ["", "cifar", "jane/", "a/b/c", "jane/cifar lib", "https://gitlab.com/a/b", "a/..", "x/y#z"],
)
def test_anything_else_is_one_line_and_changes_nothing(copy, given):
    before = contents(copy)
    done = set_address(copy, given)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "expected owner/name" in done.stderr and contents(copy) == before


def test_line_ends_of_windows_stay(copy):
    for path in (copy / "README.md", copy / "pyproject.toml", *(copy / "notebooks").iterdir()):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    lines = (copy / "README.md").read_bytes().count(b"\r\n")
    assert set_address(copy, "jane/cifar").returncode == 0
    readme = (copy / "README.md").read_bytes()
    assert readme.count(b"\r\n") == readme.count(b"\n") == lines and b"jane/cifar/blob" in readme


def test_one_file_that_can_not_be_written_leaves_all_as_they_were(copy, monkeypatch):
    before, replace = contents(copy), os.replace
    calls = iter(range(100))

    def fail_at_the_third(source, target):
        if next(calls) == 2:
            raise PermissionError("another program has it open")
        replace(source, target)

    monkeypatch.setattr(program.os, "replace", fail_at_the_third)
    monkeypatch.setattr(program, "ROOT", copy)
    assert program.main(["jane/cifar"]) == 2
    monkeypatch.undo()
    assert contents(copy) == before
