import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent


def test_the_build_records_the_torch_that_it_compiles_against(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source, installed = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "cifar_winograd.py"):
        shutil.copy(FOLDER / name, source)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(installed)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    record = runpy.run_path(str(installed / "cifar_winograd_build.py"))
    assert record["TORCH"] == torch.__version__
