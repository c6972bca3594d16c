"""The training step, compiled: the plain one, only faster; and on a GPU where there is one."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cifar_lib import hardware
from cifar_lib.data import Normalization
from cifar_lib.hardware import choose_precision
from cifar_lib.recipes import TrainConfig, recipe
from cifar_lib.train import State, Step, train_one_epoch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# Losses of a compiled step and a plain one may differ by this factor after three epochs: sums run
# in another order, and training multiplies rounding errors. In fp32 a GPU's convolutions take TF32.
TOLERANCE = {"fp32": 5e-3, "bf16": 2e-2, "fp16": 2e-2}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def tiny(**changes: object) -> TrainConfig:
    fields = {"blocks": (1,), "channels": (18,), "epochs": 2, "batch_size": 24}
    fields |= {"warmup_epochs": 1, "learning_rate": 0.02, "precision": "fp32", "compile": False}
    return recipe("report", **{**fields, **changes})


def losses(
    config: TrainConfig, train, device: torch.device = CPU, log=print, channel_multiple: int = 1
) -> list[float]:
    """The training loss of each epoch.

    Trying to compile leaves no trace in the weights and statistics. Gradients lie in memory as
    their parameters do: else the fused optimizer takes a slow way, or a wrong one.
    """
    state = State(config, device, channel_multiple)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    step, train = Step(state, log), train.to(device)
    assert all(torch.equal(value, before[name]) for name, value in state.model.state_dict().items())
    result = [train_one_epoch(step, train, epoch)[0] for epoch in range(config.epochs)]
    for parameter in state.model.parameters():
        sizes = zip(parameter.shape, parameter.stride(), parameter.grad.stride(), strict=True)
        assert all(ours == theirs for n, ours, theirs in sizes if n > 1)
    return result


def test_a_compiled_step_is_the_plain_one_compiled_once_for_each_image_size(stand_in, monkeypatch):
    counter, real = CompileCounterWithBackend("aot_eager"), torch.compile  # needs no C++ compiler
    torch._dynamo.reset()
    monkeypatch.setattr(hardware, "cifar_winograd", None)  # its convolutions are not compiled
    modes: set[str] = set()
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, mode, **more: modes.add(mode) or real(f, backend=counter, **more),
    )
    said: list[str] = []
    compiled = losses(tiny(compile=True, half_size_epochs=1), stand_in[0], log=said.append)
    assert said == ["compiling the training step, which takes a minute or two"]
    assert counter.frame_count == 2 and modes == {"default"}  # CUDA graphs are for GPUs
    assert compiled == losses(tiny(half_size_epochs=1), stand_in[0])


def test_each_image_size_that_is_still_to_come_is_tried_before_training(monkeypatch):
    tried: list[bool] = []

    def compiled(plain, **_):
        return lambda *batch: tried.append(batch[2]) or plain(*batch)

    monkeypatch.setattr(torch, "compile", compiled)
    config = tiny(compile=True, half_size_epochs=1, batch_size=2)
    for epochs_done, half_sizes in ((0, [False, True]), (1, [False])):
        state = State(config, CPU)
        state.history = [{}] * epochs_done
        tried.clear()
        Step(state, log=lambda _: None)
        assert sorted(tried) == sorted(half_sizes * 3)  # a CUDA graph is replayed in the third


@pytest.mark.parametrize("moment", ["at once", "in the backward pass"])
def test_where_compiling_fails_training_says_so_and_is_the_plain_one(stand_in, monkeypatch, moment):
    def fail(*_: object) -> None:
        raise RuntimeError("no compiler\nlong story")

    def broken_compile(plain, **_):
        def run(*batch):
            loss, correct = plain(*batch)  # has changed the batch statistics by now
            loss.register_hook(fail)
            return (loss, correct) if moment == "in the backward pass" else fail()

        return run

    monkeypatch.setattr(torch, "compile", broken_compile)
    said: list[str] = []
    fallen_back = losses(tiny(compile=True), stand_in[0], log=said.append)
    assert said[1:] == ["compiling doesn't work here (no compiler): continuing without it"]
    assert fallen_back == losses(tiny(), stand_in[0])


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_cuda_a_compiled_step_trains_to_the_losses_of_the_plain_one(stand_in, precision):
    if precision == "bf16" and choose_precision("auto", CUDA) != "bf16":
        pytest.skip("this GPU has no bf16")
    changes = {"blocks": (1, 1), "channels": (18, 20), "precision": precision, "batch_size": 8}
    changes |= {"epochs": 3, "schedule": "cosine", "half_size_epochs": 1}
    said: list[str] = []
    fast = losses(tiny(compile=True, **changes), stand_in[0], CUDA, said.append)
    assert all(line.startswith("compiling the training step") for line in said)
    plain = losses(tiny(**changes), stand_in[0], CUDA)
    assert fast == pytest.approx(plain, rel=TOLERANCE[precision])


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_on_cuda_a_padded_network_trains_to_the_losses_of_the_network_itself(stand_in, compiled):
    precision = choose_precision("auto", CUDA)
    changes = {"blocks": (1, 1), "channels": (18, 20), "batch_size": 8, "epochs": 3}
    config = tiny(precision=precision, compile=compiled, schedule="cosine", **changes)
    said: list[str] = []

    def trained(multiple: int) -> list[float]:
        torch._dynamo.reset()  # it compiles a function eight times at most
        return losses(config, stand_in[0], CUDA, said.append, multiple)

    narrow = trained(1)
    for multiple in (8, 64):
        wide = trained(multiple)
        assert wide == pytest.approx(narrow, rel=TOLERANCE[precision])
    assert all(line.startswith("compiling the training step") for line in said)


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_on_cuda_nothing_waits_for_the_device_in_a_step(stand_in, compiled):
    config = tiny(compile=compiled, ema_decay=0.9)
    step, batch = Step(State(config, CUDA)), stand_in[0].to(CUDA)[:24]
    step(batch.images, batch.labels, 0.1, False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batch.images, batch.labels, 0.1, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_on_cuda_images_are_normalised_as_on_a_cpu(stand_in):
    images, normalization = stand_in[0].images, Normalization.of(stand_in[0].images)
    on_gpu = normalization(images.to(CUDA)).cpu()
    torch.testing.assert_close(on_gpu, normalization(images))
