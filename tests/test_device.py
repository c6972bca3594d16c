"""The device that is chosen is one that computes. GPUs are stubs here."""

import warnings

import pytest
import torch

from cifar_lib import hardware
from cifar_lib.cli import main
from cifar_lib.errors import InputError
from cifar_lib.hardware import choose_device

NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    caches = (hardware._failure, hardware._first_that_computes)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def results(monkeypatch) -> dict[str, float | Exception]:
    """GPUs of both kinds are present: what the small computation gives or raises on each kind of
    device, 10 being right. A test changes what it is about."""
    outcomes: dict[str, float | Exception] = {"cuda": 10.0, "mps": 10.0, "cpu": 10.0}

    def compute(device: torch.device) -> float:
        outcome = outcomes[device.type]
        if isinstance(outcome, Exception):
            warnings.warn("this GPU is not compatible\nwith this torch", stacklevel=2)
            raise outcome
        return outcome

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr(hardware, "_small_computation", compute)
    return outcomes


def p100() -> RuntimeError:
    """What a Tesla P100 answers with wheels of torch that have no kernels for it."""
    return RuntimeError(f"{NO_KERNEL}\nCUDA kernel errors might be reported at some other call.")


def test_the_small_computation_comes_out_right_here():
    assert hardware._small_computation(torch.device("cpu")) == 10.0
    assert hardware._failure(torch.device("cpu")) is None


def test_auto_is_the_first_kind_of_gpu_that_computes(results, capsys):
    assert choose_device().type == "cuda"
    assert capsys.readouterr().err == ""


def test_auto_passes_over_a_gpu_that_cannot_compute_and_says_so_once(results, capsys, recwarn):
    results["cuda"] = p100()
    assert [choose_device().type for _ in range(3)] == ["mps"] * 3
    line = f"device: cuda is here but can't compute ({NO_KERNEL}): going on without it\n"
    assert capsys.readouterr() == ("", line)
    assert not recwarn


def test_auto_is_the_cpu_where_no_gpu_computes(results, capsys):
    results.update(cuda=p100(), mps=0.0)  # an Apple GPU that gives a wrong result
    assert choose_device() == torch.device("cpu")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "mps is here but can't compute (3 x 3 + 1 came out as 0.0)" in said[1]


@pytest.mark.parametrize("broken", [p100(), 9.0, float("nan")])
def test_a_named_gpu_that_cannot_compute_is_an_error_in_one_line(results, broken):
    results["cuda"] = broken
    why = "no kernel image" if isinstance(broken, Exception) else f"came out as {broken}"
    for name in ("cuda", "cuda:0"):
        with pytest.raises(InputError, match=rf"^device: [^\n]*{why}[^\n]*--device auto or cpu$"):
            choose_device(name)


def test_a_broken_gpu_ends_a_training_before_its_folder_is_made(results, tmp_path, capsys):
    results["cuda"] = p100()
    run = tmp_path / "run"
    assert main(["train", "--recipe", "quick", "--run", str(run), "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: device: ") and NO_KERNEL in error and error.count("\n") == 1
    assert not run.exists()


def test_a_numbered_gpu_becomes_the_current_one_once_it_has_computed(results, monkeypatch):
    current: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    assert choose_device("cuda:1") == torch.device("cuda:1") and current == [torch.device("cuda:1")]
    results["cuda"] = p100()
    with pytest.raises(InputError):
        choose_device("cuda:2")
    assert len(current) == 1
