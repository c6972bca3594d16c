"""The device that is chosen is one that computes, and it is set up and described.

GPUs are stubs here.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from cifar_lib import hardware
from cifar_lib.errors import InputError
from cifar_lib.hardware import choose_device, choose_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"
# What a Tesla P100 answers with wheels of torch that have no kernels for it.
P100 = RuntimeError(f"{NO_KERNEL}\nCUDA kernel errors might be reported at some other call.")


@pytest.fixture
def results(monkeypatch) -> dict[str, float | Exception]:
    """GPUs of both kinds are present in a new process.

    The values are what the small computation gives or raises on each kind of device, 10 being
    right. A test changes what it is about.
    """
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
    for name in ("_failure", "_first_that_computes"):
        fresh = getattr(hardware, name).__wrapped__
        monkeypatch.setattr(hardware, name, hardware.functools.cache(fresh))
    return outcomes


def test_the_small_computation_comes_out_right_here():
    assert hardware._small_computation(CPU) == 10.0 and hardware._failure(CPU) is None


@pytest.mark.parametrize(
    ("broken", "chosen", "reasons"),
    [
        ({}, "cuda", []),
        ({"cuda": P100}, "mps", [f"cuda is present but can't compute ({NO_KERNEL})"]),
        # An Apple GPU that gives a wrong result.
        ({"cuda": P100, "mps": 0.0}, "cpu", ["cuda is", "mps is present but can't compute (3 x 3"]),
    ],
)
def test_auto_is_the_first_kind_that_computes_and_says_once_what_it_passes_over(
    results, capsys, recwarn, broken, chosen, reasons
):
    results.update(broken)
    assert [choose_device().type for _ in range(3)] == [chosen] * 3
    said = capsys.readouterr().err.splitlines()
    for line, reason in zip(said, reasons, strict=True):
        assert reason in line and line.endswith("): continuing without it")
    assert not recwarn


@pytest.mark.parametrize(
    ("broken", "why"), [(P100, "no kernel image"), (9.0, "came out as 9.0"), (math.nan, "as nan")]
)
def test_a_named_gpu_computes_and_becomes_the_current_one_or_is_an_error_in_one_line(
    results, monkeypatch, broken, why
):
    current: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    assert [choose_device("cuda:1")] == [torch.device("cuda:1")] == current
    results["cuda"] = broken
    for name in ("cuda", "cuda:2"):
        with pytest.raises(InputError, match=rf"^device: .*{why}.*--device auto or cpu$"):
            choose_device(name)
    assert len(current) == 1


def test_a_gpu_is_set_up_for_fast_fp32_and_a_cpu_is_left_alone(monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    hardware.prepare(CPU, "fp32")
    assert asked == [] and not torch.backends.cudnn.benchmark
    hardware.prepare(CUDA, "bf16")
    assert asked == [] and torch.backends.cudnn.benchmark
    hardware.prepare(CUDA, "fp32")
    assert asked == ["high"]


def test_precision_is_what_the_hardware_is_good_for_or_is_taken_as_named(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    for flags, chosen in (("avx2", "fp32"), ("avx512_bf16", "bf16"), ("amx_bf16", "bf16")):
        (tmp_path / "cpuinfo").write_bytes(b"model name : \xff\n" + f"flags : {flags}\n".encode())
        assert choose_precision("auto", CPU) == chosen
    for capability, chosen in (((7, 5), "fp16"), ((8, 0), "bf16")):  # a T4, an A100
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _, c=capability: c)
        assert choose_precision("auto", CUDA) == chosen
    assert choose_precision("auto", torch.device("mps")) == "fp32"
    assert [choose_precision("fp16", device) for device in (CPU, CUDA)] == ["fp16", "fp16"]
    with pytest.raises(InputError, match="fp8"):
        choose_precision("fp8", CPU)


# The number of threads of training and of the background thread, in a process that computes for the
# first time.
EPOCH_BESIDE_A_BACKGROUND_THREAD = """
import torch
from cifar_lib.data import ImageSet
from cifar_lib.hardware import background_thread
from cifar_lib.recipes import recipe
from cifar_lib.train import State, Step, plan_epoch, train_one_epoch

config, cpu = recipe("small", precision="fp32"), torch.device("cpu")
images = ImageSet(torch.zeros(128, 3, 32, 32, dtype=torch.uint8), torch.zeros(128).long())
with background_thread() as background:
    plan = background.submit(plan_epoch, config, len(images), 0).result()
    train_one_epoch(Step(State(config, cpu)), images, 0, plan)
    print(torch.get_num_threads(), background.submit(torch.get_num_threads).result())
"""


def test_the_background_thread_has_one_core_and_training_keeps_all_of_its_own():
    here = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", EPOCH_BESIDE_A_BACKGROUND_THREAD]
    environment = os.environ | {"PYTHONPATH": here, "OMP_NUM_THREADS": "2"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["2", "1"]


def test_the_description_of_the_machine_goes_into_json(monkeypatch):
    described = json.loads(json.dumps(hardware.describe(CPU)))
    assert described["gpu"] is None and described["cpu_cores"] >= 1
    assert described["torch"] == torch.__version__ and 0.1 < described["memory_gb"] < 1e5
    monkeypatch.setattr(hardware, "_cpuinfo", lambda name: {"model name": "Abacus"}[name])
    assert hardware.describe(CPU)["cpu"] == "Abacus"


def test_the_commit_is_named_in_a_checkout_only(monkeypatch, tmp_path):
    if (Path(hardware.__file__).parents[1] / ".git").exists() and shutil.which("git"):
        assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", hardware._commit())
    monkeypatch.setattr(hardware, "__file__", str(tmp_path / "cifar_lib" / "hardware.py"))
    assert hardware._commit() is None
    (tmp_path / ".git").mkdir()  # of no repository, and then without git
    assert hardware._commit() is None
    monkeypatch.setenv("PATH", "")
    assert hardware._commit() is None
