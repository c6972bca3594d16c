"""extras/winograd is used with the torch that it was compiled against, and with no other one."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from cifar_lib import hardware

CPU = torch.device("cpu")
NAMES = ("cifar_winograd", "cifar_winograd_build", "_cifar_winograd")
SOURCE = Path(__file__).parent.parent / "extras" / "winograd" / "cifar_winograd.py"
FITTING = {"record": f"TORCH = {torch.__version__!r}"}


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Puts stubs in the place of the extension and of its record, or takes the record away; gives
    what `hardware` makes of them."""
    kept = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    monkeypatch.syspath_prepend(str(tmp_path))

    def written(code: str = "", record: str | None = None) -> tuple:
        (tmp_path / "cifar_winograd.py").write_text(code, encoding="utf-8")
        if record is None:
            sys.modules["cifar_winograd_build"] = None  # which makes its import an ImportError
        else:
            (tmp_path / "cifar_winograd_build.py").write_text(record, encoding="utf-8")
        return hardware._load_winograd()

    yield written
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(kept)


def test_one_of_this_torch_is_loaded(install):
    loaded, failure = install("ANSWER = 42", **FITTING)
    assert loaded.ANSWER == 42 and failure is None


def test_one_of_another_torch_is_not_even_imported(install):
    code = "raise SystemExit('a segmentation fault')"
    loaded, failure = install(code, record="TORCH = '1.13.1'")
    assert loaded is None and "cifar_winograd" not in sys.modules
    assert failure == f"it was built with torch 1.13.1, this is torch {torch.__version__}"


def test_one_without_a_record_is_not_even_imported(install):
    loaded, failure = install("raise SystemExit('a segmentation fault')")
    assert loaded is None and failure == "it doesn't say which torch it was built with"


@pytest.mark.parametrize("kind", ["ImportError", "OSError", "AttributeError"])
def test_one_that_cannot_be_loaded_is_left_alone(install, kind):
    loaded, failure = install(f"raise {kind}('undefined symbol: _ZN2at\\nmore')", **FITTING)
    assert loaded is None and failure == "it can't be loaded: undefined symbol: _ZN2at"


def test_where_none_is_installed_there_is_nothing_to_say(install):
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
    loaded, failure = install("", record="TORCH = '1.13.1'")
    monkeypatch.setattr(hardware, "cifar_winograd", loaded)
    monkeypatch.setattr(hardware, "winograd_failure", failure)
    monkeypatch.setattr("torch.backends.cudnn.benchmark", False)
    hardware._say_that_winograd_is_not_used.cache_clear()
    hardware.prepare(torch.device("cuda"), "bf16")
    hardware.prepare(CPU, "bf16")
    assert capsys.readouterr().err == ""
    for _ in range(2):
        hardware.prepare(CPU, "fp32")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and failure in said and said.endswith(f"{hardware.REBUILD}\n")
    assert hardware.describe(CPU)["winograd"] is False
