"""Makes `pytest --nbmake notebooks` use this environment's kernel and check the outputs."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbmake.nb_run import NotebookRun

from cifar_lib import environment
from cifar_lib.errors import InputError
from notebooks.course import WITHOUT_CIFAR10

# Kernels inherit these. Jupyter looks for kernels in JUPYTER_PATH first. Without it, a kernel named
# "python3" in the user's folder would run the notebooks in another interpreter (jupyter_client#35).
os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")
os.environ.setdefault("TQDM_DISABLE", "1")
# Variables that make notebooks print other numbers than those that are stored.
OTHER_OUTPUTS = ("CIFAR_RECIPE", "CIFAR_EPOCHS", "CIFAR_WEIGHTS", "CIFAR_TEST_FILE")


def pytest_configure(config: pytest.Config) -> None:
    """Make the paths in the variables absolute, because kernels start in notebooks/.

    Relative paths are taken from the folder where pytest was started.
    """
    try:
        environment.make_absolute(config.invocation_params.dir)
    except InputError as error:
        raise pytest.UsageError(str(error)) from error


_execute = NotebookRun.execute


def _execute_and_look(self):
    """Run the notebook, then check that its pictures came out and that its numbers still hold."""
    result = _execute(self)
    if result.error is None:
        _check_pictures(result.nb, self.filename.name)
        _check_numbers(result.nb, self.filename)
    return result


def _check_pictures(notebook: NotebookNode, name: str) -> None:
    """Check that each call of session.show gave a picture. A notebook can pass without any."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    asked = sum(cell.source.count("session.show(") for cell in code)
    shown = sum(_is_picture(output) for cell in code for output in cell.outputs)
    assert shown >= asked > 0, f"{name} calls session.show {asked} times, {shown} pictures came out"


def _is_picture(output: NotebookNode) -> bool:
    return any(kind.startswith("image/") for kind in output.get("data", {}))


def _check_numbers(executed: NotebookNode, path: Path) -> None:
    """Check that the cells print the stored numbers, because the notebook's text describes these.

    Cells with the tag `varies` are left out. They print times, or depend on the training on this
    machine. Nothing is compared on stand-in data, or if a variable in OTHER_OUTPUTS is set.
    """
    printed = [
        output.get("text", "") for cell in executed.cells for output in cell.get("outputs", [])
    ]
    on_stand_in_data = any(WITHOUT_CIFAR10 in text for text in printed)
    if on_stand_in_data or any(os.environ.get(name) for name in OTHER_OUTPUTS):
        return
    stored = nbformat.read(path, as_version=4)
    for now, then in zip(executed.cells, stored.cells, strict=True):
        if now.cell_type == "code" and "varies" not in now.metadata.get("tags", []):
            assert _numbers(now) == _numbers(then), (
                f"{path.name}, cell {now.id}: it prints {_numbers(now)}, stored is {_numbers(then)}"
            )


def _numbers(cell: NotebookNode) -> list[str]:
    """Return the numbers that a cell has printed or shown as a table."""
    texts = [output.text for output in cell.outputs if output.output_type == "stream"]
    pages = [output.data.get("text/html", "") for output in cell.outputs if "data" in output]
    for page in pages:
        texts += re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", page)
    return re.findall(r"-?\d[\d,.]*(?:e[+-]?\d+)?%?", " ".join(texts))


NotebookRun.execute = _execute_and_look
