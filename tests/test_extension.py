"""extras/winograd is used with the torch that it was compiled against, and with no other one."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from cifar_lib import hardware

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAMES = ("cifar_winograd", "cifar_winograd_build", "_cifar_winograd")
SOURCE = Path(__file__).parent.parent / "extras" / "winograd" / "cifar_winograd.py"
OURS, OTHER = torch.__version__, "1.13.1"
CRASH = "raise SystemExit('a segmentation fault')"


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Puts stubs in the place of the extension and of its record of a torch, or takes the record
    away; gives what `hardware` makes of them."""
    kept = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    monkeypatch.syspath_prepend(str(tmp_path))

    def written(code: str, built_with: str | None) -> tuple:
        (tmp_path / "cifar_winograd.py").write_text(code, encoding="utf-8")
        record = tmp_path / "cifar_winograd_build.py"
        record.write_text(f"TORCH = {built_with!r}", encoding="utf-8")
        if built_with is None:
            sys.modules["cifar_winograd_build"] = None  # which makes its import an ImportError
        return hardware._load_winograd()

    yield written
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(kept)


@pytest.mark.parametrize(
    ("code", "built_with", "why"),
    [
        # The first two aren't even imported.
        (CRASH, OTHER, f"it was built with torch {OTHER}, but this is torch {OURS}"),
        (CRASH, None, "it doesn't say which torch it was built with"),
        ("raise ImportError('no symbol\\nmore')", OURS, "it can't be loaded: no symbol"),
        ("raise OSError('no symbol\\nmore')", OURS, "it can't be loaded: no symbol"),
        ("raise AttributeError('no symbol\\nmore')", OURS, "it can't be loaded: no symbol"),
    ],
)
def test_one_that_does_not_fit_is_not_used_and_the_reason_is_kept(install, code, built_with, why):
    assert install(code, built_with) == (None, why)


def test_one_of_this_torch_is_loaded_and_where_none_is_there_is_nothing_to_say(install):
    loaded, failure = install("ANSWER = 42", OURS)
    assert loaded.ANSWER == 42 and failure is None
    sys.modules["cifar_winograd"] = None
    assert hardware._load_winograd() == (None, None)


def test_a_missing_compiled_part_is_an_import_error(install):
    sys.modules["_cifar_winograd"] = None
    spec = importlib.util.spec_from_file_location("cifar_winograd", SOURCE)
    with pytest.raises(ImportError, match="compiled part"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_one_that_is_not_used_is_spoken_of_once_and_where_it_would_be_used(
    install, monkeypatch, capsys
):
    loaded, failure = install("", OTHER)
    monkeypatch.setattr(hardware, "cifar_winograd", loaded)
    monkeypatch.setattr(hardware, "winograd_failure", failure)
    monkeypatch.setattr("torch.backends.cudnn.benchmark", False)
    hardware._say_that_winograd_is_not_used.cache_clear()
    hardware.prepare(CUDA, "bf16")
    hardware.prepare(CPU, "bf16")
    assert capsys.readouterr().err == ""
    for _ in range(2):
        hardware.prepare(CPU, "fp32")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and failure in said and said.endswith(f"{hardware.REBUILD}\n")
    assert hardware.describe(CPU)["winograd"] is False
