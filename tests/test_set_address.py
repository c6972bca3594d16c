"""scripts/set_address.py, on a copy of the files that it changes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import set_address as program
from tests.conftest import contents

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
def copy(tmp_path, monkeypatch) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "notebooks").mkdir()
    for name in ("pyproject.toml", "README.md", "docs/setup.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy(path, tmp_path / "notebooks")
    with open(tmp_path / "README.md", "a", encoding="utf-8", newline="") as readme:
        readme.write(OTHERS + OWN)
    monkeypatch.setattr(program, "ROOT", tmp_path)
    return tmp_path


def test_an_address_is_taken_as_a_browser_or_git_has_it():
    for given in (
        "jane/resnet.2",
        "https://github.com/jane/resnet.2",
        "https://www.github.com/jane/resnet.2.git/",
        "git@github.com:jane/resnet.2.git",
    ):
        assert program.parse_address(given) == "jane/resnet.2"


def test_whole_addresses_change_and_nothing_else_and_change_back(copy):
    for path in (copy / "README.md", *(copy / "notebooks").iterdir()):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # as on Windows
    before, others = contents(copy), OTHERS.replace("\n", "\r\n").encode()
    for _ in range(2):
        assert program.main(["jane/resnet.2"]) == 0
    for path, old in before.items():
        kept = old.replace(others, b"")
        for host in (b"https://github.com/", b"https://colab.research.google.com/github/"):
            kept = kept.replace(host + b"YOUR_ACCOUNT/cifar-lib", host + b"jane/resnet.2")
        assert path.read_bytes().replace(others, b"") == kept, path.name
    assert others in (copy / "README.md").read_bytes()
    for address in ("jane/cifar-lib-2", "YOUR_ACCOUNT/cifar-lib"):
        assert program.main([address]) == 0
    assert contents(copy) == before


def test_an_address_that_was_written_wrongly_is_repaired_by_the_program_alone(copy):
    for path in (copy / "pyproject.toml", *(copy / "notebooks").iterdir()):
        path.write_bytes(path.read_bytes().replace(b"YOUR_ACCOUNT/cifar-lib", b"cifar"))
    (copy / "scripts").mkdir()
    script = shutil.copy(ROOT / "scripts" / "set_address.py", copy / "scripts")
    subprocess.run([sys.executable, script, "jane/cifar-lib"], check=True, capture_output=True)
    assert b'= "https://github.com/jane/cifar-lib"' in (copy / "pyproject.toml").read_bytes()
    for path in (copy / "notebooks").iterdir():
        text = path.read_text(encoding="utf-8")
        assert f"/github/jane/cifar-lib/blob/main/notebooks/{path.name}" in text
        assert 'ADDRESS = \\"https://github.com/jane/cifar-lib\\"' in text
        assert 'Path(\\"cifar-lib/cifar_lib\\")' in text  # the clone's folder, whatever its address


def test_anything_else_is_one_line_and_changes_nothing(copy, capsys):
    before = contents(copy)
    others = ["", "cifar", "jane/", "a/b/c", "jane/cifar lib", "a/..", "x/y#z"]
    for given in [*others, "https://gitlab.com/a/b"]:
        assert program.main(given.split()) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "expected owner/name" in said
    assert contents(copy) == before


def test_one_file_that_can_not_be_written_leaves_all_as_they_were(copy, monkeypatch):
    before, replace = contents(copy), os.replace
    calls = iter(range(100))

    def fail_at_the_third(source, target):
        if next(calls) == 2:
            raise PermissionError("another program has it open")
        replace(source, target)

    monkeypatch.setattr(program.os, "replace", fail_at_the_third)
    assert program.main(["jane/cifar"]) == 2
    assert contents(copy) == before
