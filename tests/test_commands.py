"""The README, the Makefile and the code host's workflow give the same commands."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WORKFLOW = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
INSTALL = "install -r requirements.txt -c constraints.txt"


def make_target(name: str) -> list[str]:
    """The commands of a target, as they are typed where `.venv` is activated."""
    (recipe,) = re.findall(rf"^{name}:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)
    return [line.strip().replace("$(PY)", "python") for line in recipe.splitlines()]


def readme_commands() -> list[list[str]]:
    """The commands that the README indents, in the blocks that blank lines make."""
    blocks = [re.findall(r"^ {4}(\S.*)$", block, re.M) for block in README.split("\n\n")]
    return [block for block in blocks if block]


@pytest.mark.parametrize("target", ["run", "test"])
def test_without_make_the_same_commands_run(target):
    assert make_target(target) in readme_commands()


def test_the_workflow_installs_and_tests_as_the_readme_says():
    steps = re.findall(r"^ +- run: (.*)$", WORKFLOW, re.M)
    assert steps == [f"python -m pip {INSTALL}", *make_target("test")]
    for pip in (".venv/bin/pip", r".venv\Scripts\pip"):
        assert f"    {pip} {INSTALL}\n" in README


def test_nothing_but_the_campaigns_needs_a_module_that_windows_lacks():
    posix = {"fcntl", "grp", "pwd", "resource", "termios"}
    campaigns = {"faults.py", "fuzz.py"}  # they say that they need Linux
    folders = ("cifar_lib", "benchmarks", "scripts", "notebooks", "tests", "extras")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    for path in files:
        # What is imported while the module is, that is outside its functions.
        statements = ast.parse(path.read_text(encoding="utf-8")).body
        imported = {
            alias.name
            for statement in statements
            if isinstance(statement, (ast.Import, ast.ImportFrom))
            for alias in statement.names
        }
        assert path.name in campaigns or not imported & posix, path
