"""The training step: compiled as written, in half precision, on a GPU where there is one."""

import copy
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from tqdm import tqdm

from cifar_lib import hardware
from cifar_lib.data import CIFAR10_MEAN, CIFAR10_STD, ImageSet, normalize
from cifar_lib.errors import InputError
from cifar_lib.fit import resolve
from cifar_lib.hardware import choose_precision
from cifar_lib.recipes import TrainConfig, recipe
from cifar_lib.train import State, Step, epoch_plan, train_one_epoch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# Losses of a compiled step and a plain one may differ by this factor after three epochs: sums run
# in another order, and training multiplies rounding errors. In fp32 a GPU's convolutions take TF32.
TOLERANCE = {"fp32": 5e-3, "bf16": 2e-2, "fp16": 2e-2}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def tiny(**changes: object) -> TrainConfig:
    fields = {"blocks": (1, 1), "channels": (18, 20), "epochs": 2, "batch_size": 24}
    fields |= {"warmup_epochs": 1, "learning_rate": 0.02, "precision": "fp32", "compile": False}
    return recipe("report", **{**fields, **changes})


def losses(
    config: TrainConfig, train: ImageSet, device: torch.device = CPU, log=print
) -> list[float]:
    """The training loss of each epoch. Gradients must lie in memory as their parameters do: else
    the fused optimizer takes a slow way, or a wrong one."""
    state = State(config, device)
    step, train = Step(state, config, log), train.to(device)
    result = []
    for state.epoch in range(config.epochs):
        plan = epoch_plan(config, len(train), state.epoch)
        result.append(train_one_epoch(step, train, plan, tqdm(disable=True))[0])
    for parameter in state.model.parameters():
        sizes = zip(parameter.shape, parameter.stride(), parameter.grad.stride(), strict=True)
        assert all(ours == theirs for n, ours, theirs in sizes if n > 1)
    return result


def with_backend(monkeypatch, backend) -> None:
    """torch.compile as the step calls it, but for the backend: this one needs no C++ compiler."""
    real = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(hardware, "cifar_winograd", None)  # these are not compiled
    monkeypatch.setattr(torch, "compile", lambda f, mode, **more: real(f, backend=backend, **more))


def test_only_long_runs_on_one_gpu_are_compiled_unless_asked_for(monkeypatch):
    assert resolve(tiny(compile=None, epochs=60, batch_size=128), CUDA, 50_000).compile
    assert not resolve(tiny(compile=None), CUDA, 1000).compile
    assert not resolve(tiny(compile=None, epochs=60), CPU, 50_000).compile
    assert resolve(tiny(compile=True), CPU, 1000).compile
    monkeypatch.setattr("cifar_lib.ranks.count", lambda: 2)
    assert not resolve(tiny(compile=None, epochs=60), CUDA, 50_000).compile
    with pytest.raises(InputError, match="compile: expected false on several ranks"):
        resolve(tiny(compile=True), CPU, 1000)


def test_a_compiled_step_is_the_plain_one_compiled_once_for_each_image_size(stand_in, monkeypatch):
    counter = CompileCounterWithBackend("aot_eager")
    with_backend(monkeypatch, counter)
    changes = {"half_size_epochs": 1, "blocks": (1,), "channels": (18,)}
    lines: list[str] = []
    compiled = losses(tiny(compile=True, **changes), stand_in[0], log=lines.append)
    assert lines == ["compiling the training step, which takes a minute or two"]
    assert counter.frame_count == 2
    assert compiled == losses(tiny(**changes), stand_in[0])


@pytest.mark.parametrize("moment", ["at once", "in the backward pass"])
def test_where_compiling_fails_training_says_so_and_is_the_plain_one(stand_in, monkeypatch, moment):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(context, loss):
            return loss.clone()

        @staticmethod
        def backward(context, gradient):
            raise RuntimeError("no compiler\nlong story")

    def broken_compile(function, **_):
        def run(*arguments):
            loss, right = function(*arguments)  # has changed the batch statistics by now
            if moment == "at once":
                raise RuntimeError("no compiler\nlong story")
            return Broken.apply(loss), right

        return run

    monkeypatch.setattr(torch, "compile", broken_compile)
    lines: list[str] = []
    fallen_back = losses(tiny(compile=True), stand_in[0], log=lines.append)
    assert lines[1:] == ["compiling doesn't work here (no compiler): going on without"]
    assert fallen_back == losses(tiny(), stand_in[0])


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


def test_the_commit_is_named_in_a_checkout_only(monkeypatch, tmp_path):
    if (Path(hardware.__file__).parents[1] / ".git").exists() and shutil.which("git"):
        assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", hardware.describe(CPU)["commit"])
    monkeypatch.setattr(hardware, "__file__", str(tmp_path / "cifar_lib" / "hardware.py"))
    assert hardware.describe(CPU)["commit"] is None
    (tmp_path / ".git").mkdir()  # of no repository, and then without git
    assert hardware.describe(CPU)["commit"] is None
    monkeypatch.setenv("PATH", "")
    assert hardware.describe(CPU)["commit"] is None


def test_a_first_gradient_that_overflows_in_fp16_leaves_no_trace(stand_in):
    config = tiny(precision="fp16", weight_decay=0.0)
    images, labels = stand_in[0].images[:4], torch.arange(4)
    after = []
    for scale in (2.0**120, 2.0**10):  # the first one overflows float32, too
        state = State(config, CPU)
        step = Step(state, config)
        fixed = state.scaler.state_dict() | {"growth_interval": 10**6}
        state.scaler.load_state_dict(fixed | {"scale": scale})
        if scale > 2.0**100:
            before = copy.deepcopy(state.model.state_dict())
            step(images, labels, 0.1, False)
            state.model.load_state_dict(before)  # with its batch statistics
            momentum = [entry["momentum_buffer"] for entry in state.optimizer.state.values()]
            assert len(momentum) > 10 and not any(buffer.any() for buffer in momentum)
            state.scaler.load_state_dict(fixed | {"scale": 2.0**10})
        step(images, labels, 0.1, False)
        step.check(1)  # the loss itself was finite
        after.append(state.model)
    for overflowed, smooth in zip(*(model.parameters() for model in after), strict=True):
        torch.testing.assert_close(overflowed, smooth)


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_cuda_a_compiled_step_trains_to_the_losses_of_the_plain_one(stand_in, precision):
    if precision == "bf16" and choose_precision("auto", CUDA) != "bf16":
        pytest.skip("this GPU has no bf16")
    changes = {"precision": precision, "half_size_epochs": 1, "batch_size": 8}
    changes |= {"epochs": 3, "schedule": "cosine"}
    lines: list[str] = []
    fast = losses(tiny(compile=True, **changes), stand_in[0], CUDA, lines.append)
    assert all(line.startswith("compiling the training step") for line in lines)
    plain = losses(tiny(**changes), stand_in[0], CUDA)
    assert fast == pytest.approx(plain, rel=TOLERANCE[precision])


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_on_cuda_nothing_waits_for_the_device_in_a_step(stand_in, compiled):
    config = tiny(compile=compiled)
    step = Step(State(config, CUDA), config)
    train = stand_in[0].to(CUDA)
    images, labels = train.images[:24], train.labels[:24]
    step(images, labels, 0.1, False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(images, labels, 0.1, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_on_cuda_images_are_normalised_as_on_a_cpu(stand_in):
    images, constants = stand_in[0].images, (CIFAR10_MEAN, CIFAR10_STD)
    on_gpu = normalize(images.to(CUDA), *constants).cpu()
    torch.testing.assert_close(on_gpu, normalize(images, *constants))
