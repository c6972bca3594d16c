"""`pytest --nbmake notebooks`, as typed: this environment's kernel, figures really there."""

import os
import sys
from pathlib import Path

import pytest
from nbmake.nb_run import NotebookRun

from cifar_lib import environment
from cifar_lib.errors import InputError

# Kernels inherit these. JUPYTER_PATH comes before every other place for kernels: without it the
# "python3" of another interpreter in the user's folder would run the notebooks (jupyter_client#35).
os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")
os.environ.setdefault("TQDM_DISABLE", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Kernels start in notebooks/, but a relative path means relative to where this was typed."""
    try:
        environment.make_absolute(config.invocation_params.dir)
    except InputError as error:
        raise pytest.UsageError(str(error)) from error


_execute = NotebookRun.execute


def _execute_and_look(self):
    """A notebook can be green and show nothing: each call of session.show must give a picture."""
    result = _execute(self)
    if result.error is None:
        code = [cell for cell in result.nb.cells if cell.cell_type == "code"]
        asked = sum(cell.source.count("session.show(") for cell in code)
        shown = sum(
            "image/png" in output.get("data", {}) for cell in code for output in cell.outputs
        )
        assert shown >= asked > 0, (
            f"{self.filename.name} calls session.show {asked} times, {shown} pictures came out"
        )
    return result


NotebookRun.execute = _execute_and_look
