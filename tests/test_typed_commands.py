"""Every command in the texts can be typed: the parser of its own program takes it.

The commands are those on indented lines and between backticks in the README, the pages under docs/,
the weights' card and the notebooks. Programs that aren't this repository's (pip, git, jupyter) are
not asked.
"""

import argparse
import contextlib
import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from cifar_lib import cli, environment
from cifar_lib.errors import InputError
from scripts.set_address import parse_address

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TEXTS = [
    *(ROOT / "README.md", ROOT / "cifar_lib" / "weights" / "README.md"),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]
OF_OTHERS = {"pip", "venv", "ruff"}  # modules that `python -m` starts
# What each command of cifar_lib requires, for texts that quote a part of it: `train --seed 0`.
REQUIRED = {
    "train": ["--recipe", "report", "--run", "runs/report"],
    "submit": ["--test", "test.pkl", "--out", "submission.csv"],
    "predict": ["cat.jpg"],
}
COMMANDS = ("info", "train", "evaluate", "predict", "submit")


class Wrong(Exception):
    """Why a command can't be typed, in one line."""


class Parsed(Exception):
    """A program has read its arguments, and goes no further."""


# Which commands there are.


def prose_of(path: Path) -> str:
    """A Markdown file, or a notebook's Markdown."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def typed_lines(text: str) -> list[str]:
    """The indented lines of a Markdown text, and the lines between fences."""
    lines, is_fenced, is_before_blank = [], False, True
    for line in text.splitlines():
        if line.startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or (line.startswith("    ") and is_before_blank):
            lines.append(line.strip())
            continue  # the next indented line belongs to the same block
        is_before_blank = not line.strip()
    return [line for line in lines if line]


def quoted(text: str) -> list[str]:
    """What is between backticks in a Markdown text, without its indented lines."""
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    return [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", prose)]


# Whether one can be typed.


def check_line(line: str) -> None:
    """Raise Wrong if a line of a block is a command that can't be typed."""
    check_variable(line)
    if is_command(words_of(line)):
        check_command(line)


def check_quoted(words: str) -> None:
    """Raise Wrong if words between backticks are a command, or a part, that can't be typed."""
    check_variable(words)
    split = words_of(words)
    if is_command(split):
        # A program that is named without arguments may need some: `python -m scripts.search`.
        length = 4 if "cifar_lib" in split else 3
        is_named = split[1] == "-m" and len(split) <= length
        check_command(f"{words} --help" if is_named else words)
    elif split and split[0] in COMMANDS and "--" in words:
        needs_more = not any(word in split for word in REQUIRED.get(split[0], []))
        parse_command(split + (REQUIRED.get(split[0], []) if needs_more else []))
    elif split and re.match(r"--[a-z]", split[0]):
        check_option(split)


def is_command(words: list[str]) -> bool:
    """Whether it begins with a program that is checked. `make` alone is the program's name."""
    return len(words) > 1 and program(words[0]) in ("python", "make", "pytest", "bash")


def program(word: str) -> str:
    return Path(word).name


def words_of(line: str) -> list[str]:
    """The words of a command, without variables before it and a comment after it."""
    line = re.sub(r"\s{2,}#.*", "", line).replace("\\", "/")
    try:
        words = shlex.split(line)
    except ValueError:  # an apostrophe: no command
        return []
    while words and re.match(r"[A-Z0-9_]+=", words[0]):
        words = words[1:]
    return words


def check_command(line: str) -> None:
    check_variable(line)
    name, *words = words_of(line)
    if program(name) == "make":
        check_make(words)
    elif program(name) == "pytest":
        check_pytest(words)
    elif program(name) == "bash":
        require_file(words[0])
    elif program(name) == "python" and words[:1] == ["-m"]:
        check_module(*words[1:])
    elif program(name) == "python":
        check_program(require_file(words[0]), words[1:])


def check_module(module: str, *words: str) -> None:
    """Check `python -m MODULE WORDS`."""
    if module == "cifar_lib":
        parse_command(list(words))
    elif module == "pytest":
        check_pytest(list(words))
    elif module.isupper() or module.split(".")[-1].isupper():
        return  # stands for any module
    elif module not in OF_OTHERS:
        check_program(require_file(f"{module.replace('.', '/')}.py"), list(words))


def check_program(file: Path, words: list[str]) -> None:
    """Run a program of this repository until it has read its arguments."""
    if file.name == "set_address.py":  # reads them by itself
        if parse_address(" ".join(words)) is None:
            raise Wrong(f"{file.name}: no address of a repository: {' '.join(words)}")
        return
    real = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        real(self, args, namespace)
        raise Parsed

    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [str(file), *words])
        try:
            runpy.run_path(str(file), run_name="__main__")
        except (Parsed, ImportError):  # some programs need Linux
            return
        except SystemExit as end:
            if end.code == 0:  # --help
                return
            raise Wrong(f"{file.name}: {said.getvalue().strip().splitlines()[-1]}") from None
    raise Wrong(f"{file.name}: it doesn't read its arguments with argparse")


def parse_command(words: list[str]) -> None:
    """Check a command of cifar_lib, and the settings of a training."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            options = cli._parser().parse_args(words)
        if words[0] == "train":
            cli._config(options)
    except SystemExit as end:
        if end.code:
            raise Wrong(said.getvalue().strip()) from None
    except InputError as error:
        raise Wrong(str(error)) from None


def check_option(words: list[str]) -> None:
    """Check an option of cifar_lib that is quoted without its command, maybe without its value."""
    if any(word.isupper() or word == "FIELD=VALUE" for word in words[1:]):
        words = words[:1]  # these stand for a value
    for command in COMMANDS:
        try:
            return parse_command([command, *REQUIRED.get(command, []), *words])
        except Wrong as wrong:
            if re.search("expected .*argument", str(wrong)) and len(words) == 1:
                return None
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "scripts").glob("*.py")]
    if not any(f'"{words[0]}"' in source for source in sources):
        raise Wrong(f"{' '.join(words)}: no program takes this option")
    return None


def check_make(words: list[str]) -> None:
    targets = [word for word in words if "=" not in word]
    known = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split()
    for target in targets:
        if target not in known:
            raise Wrong(f"make {target}: no such target: {', '.join(known)}")
    for variable in (word.partition("=")[0] for word in words if "=" in word):
        if not re.search(rf"\$\({variable}\)", MAKEFILE):
            raise Wrong(f"make {variable}=: the Makefile has no such variable")


def check_pytest(words: list[str]) -> None:
    for word in words:
        if not word.startswith("-") and word not in ("logical", "loadgroup"):
            require_file(word.partition("::")[0])


def check_variable(words: str) -> None:
    """Raise Wrong for a variable like ours that the package doesn't read."""
    for name in re.findall(r"\bCIFAR(?:10)?_[A-Z0-9_]+\b", words):
        if name not in environment.VARIABLES:
            raise Wrong(f"{name}: no such variable: {', '.join(environment.VARIABLES)}")


def require_file(name: str) -> Path:
    if not (ROOT / name).exists():
        raise Wrong(f"{name}: no such file")
    return ROOT / name


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_in_a_text_can_be_typed(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    wrong = []
    text = prose_of(path)
    checks = [(check_line, typed_lines(text)), (check_quoted, quoted(text))]
    for check, commands in checks:
        for command in commands:
            try:
                check(command)
            except Wrong as reason:
                wrong.append(f"{path.relative_to(ROOT)}: {command}: {reason}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("python -m cifar_lib train --recipe report", "required: --run"),
        ("python -m cifar_lib train --recipe repot --run runs/x", "repot"),
        ("python -m cifar_lib train --recipe report --run runs/x --set magnitude=5", "magnitude"),
        ("python -m cifar_lib tune --trials 4", "invalid choice: 'tune'"),
        ("python -m scripts.search --trials 40", "required: --study"),
        ("python -m scripts.ablation --image 2000.5", "invalid int value"),
        ("python -m scripts.publish runs/x", "scripts/publish.py: no such file"),
        ("python -m scripts.build_pages --quick", "unrecognized arguments: --quick"),
        ("python scripts/set_address.py you", "no address of a repository"),
        ("python -m pytest --nbmake notebook", "notebook: no such file"),
        ("make notebook", "no such target"),
        ("make address WHERE=you/yours", "no such variable"),
        ("CIFAR_PROFILE=quick make run", "CIFAR_PROFILE: no such variable"),
        ("evaluate --tta flop", "invalid choice: 'flop'"),
        ("--tte flip", "no program takes this option"),
    ],
)
def test_a_command_that_cannot_be_typed_is_noticed(command, reason, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(Wrong, match=re.escape(reason)):
        check_quoted(command)


def test_the_files_that_the_readme_lists_exist():
    listing = prose_of(ROOT / "README.md").partition("## Files")[2]
    names = [re.split(r"\s{2,}", line)[0] for line in typed_lines(listing)]
    assert len(names) == 8
    for name in ", ".join(names).split(", "):
        assert (ROOT / name).exists(), name
