import copy
import shutil
from dataclasses import replace

import pytest
import torch
from tqdm import tqdm

from cifar_lib.data import CIFAR10_MEAN, CIFAR10_STD, normalize
from cifar_lib.errors import InputError
from cifar_lib.hardware import choose_precision
from cifar_lib.model import ResNet
from cifar_lib.recipes import TrainConfig, recipe
from cifar_lib.step import State, Step, ZeroPadded, choose_step, smooth_cross_entropy
from cifar_lib.train import epoch_plan, train_one_epoch
from cifar_lib.winograd import build

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ODD = (18, 20)  # channels that are no multiples of 8
# Losses of the fast step and the plain one may differ by this factor after three epochs: sums run
# in another order, and training multiplies rounding errors.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
ON_CUDA = {
    **TOLERANCE,
    "fp32": 5e-3,
}  # convolutions take TF32 there, and pick their algorithms anew

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")


def tiny(**changes: object) -> TrainConfig:
    fields = {
        "blocks": (1, 1),
        "channels": ODD,
        "epochs": 3,
        "batch_size": 16,
        "warmup_epochs": 1,
        "precision": "fp32",
    }
    return recipe("report", **{**fields, "step": "plain", "learning_rate": 0.02, **changes})


def losses(config: TrainConfig, train, device: torch.device = CPU, log=print) -> list[float]:
    """The training loss of each epoch."""
    state = State.new(config, device)
    step, train = Step(state, config, log), train.to(device)
    result = []
    for state.epoch in range(config.epochs):
        plan = epoch_plan(config, len(train), state.epoch)
        result.append(train_one_epoch(step, train, config, plan, tqdm(disable=True))[0])
    return result


# Channels padded with zeros


def test_padding_changes_neither_logits_nor_gradients_nor_batch_statistics():
    torch.manual_seed(0)
    plain = ResNet((1, 2), ODD)
    for parameter in plain.parameters():  # a scale of 1 and a shift of 0 would hide mistakes
        torch.nn.init.normal_(parameter, 0.2, 0.2)
    under = copy.deepcopy(plain)
    padded = ZeroPadded(under)
    for _ in range(2):  # the second pass starts from the statistics that the first one left
        images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
        outputs = [model(images) for model in (plain, padded)]
        torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=1e-4)
        for model, logits in zip((plain, padded), outputs, strict=True):
            model.zero_grad()
            smooth_cross_entropy(logits, labels, 0.05).backward()
        for (name, ours), theirs in zip(under.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-3, msg=name)
    for (name, ours), theirs in zip(under.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, msg=name)


def test_padding_adds_no_parameter():
    model = ResNet()
    assert all(
        p is q for p, q in zip(ZeroPadded(model).parameters(), model.parameters(), strict=True)
    )
    assert sum(p.numel() for p in ZeroPadded(model).parameters()) == 4_916_284


def test_in_half_precision_the_step_computes_with_padded_channels(stand_in):
    state = State.new(tiny(precision="bf16"), CPU)
    network = Step(state, tiny(precision="bf16")).network
    assert network.shapes["layer2.0.conv1.weight"] == (24, 24, 3, 3)
    assert state.model.layer2[0].conv1.weight.shape == (20, 18, 3, 3)


# Ways to run


def test_on_cuda_long_runs_are_compiled_and_a_graph_needs_cuda():
    long, short = tiny(step="auto", epochs=60, batch_size=128), tiny(step="auto")
    assert (
        choose_step(long, CUDA, 50_000) == "compiled" and choose_step(short, CUDA, 1000) == "graph"
    )
    assert choose_step(short, CPU, 100) == choose_step(long, torch.device("mps"), 50_000) == "plain"
    assert choose_step(tiny(step="compiled"), CPU, 100) == "compiled"
    with pytest.raises(InputError, match="a CUDA graph needs a CUDA device, got cpu"):
        choose_step(tiny(step="graph"), CPU, 1000)
    assert choose_step(replace(short, precision="fp16"), CUDA, 1000) == "plain"
    with pytest.raises(InputError, match="a CUDA graph needs bf16 or fp32, got fp16"):
        choose_step(tiny(step="graph", precision="fp16"), CUDA, 1000)


def test_on_a_cpu_long_runs_in_fp32_take_winograds_way():
    long = tiny(step="auto", epochs=60, batch_size=128)
    assert choose_step(long, CPU, 50_000) == choose_step(long, CPU, 200) == "winograd"
    assert choose_step(long, CPU, 128) == "plain"  # 60 steps
    assert choose_step(replace(long, precision="bf16"), CPU, 50_000) == "plain"
    for device, precision in ((CUDA, "fp32"), (CPU, "bf16")):
        with pytest.raises(
            InputError, match=f"winograd needs a CPU and fp32, got {device.type} and {precision}"
        ):
            choose_step(tiny(step="winograd", precision=precision), device, 100)


def test_several_ranks_run_plain():
    assert choose_step(tiny(step="auto", ranks=2, epochs=1000), CUDA, 50_000) == "plain"
    with pytest.raises(
        InputError, match="step: expected auto or plain on several ranks, got compiled"
    ):
        choose_step(tiny(step="compiled", ranks=2), CPU, 100)


@needs_compiler
def test_a_compiled_step_trains_to_the_losses_of_the_plain_one(stand_in):
    changes = {"ema_decay": 0.9, "schedule": "cosine", "nesterov": True, "decay_all": False}
    lines: list[str] = []
    compiled = losses(tiny(step="compiled", **changes), stand_in[0], log=lines.append)
    assert lines == []  # it did compile
    assert compiled == pytest.approx(losses(tiny(**changes), stand_in[0]), rel=TOLERANCE["fp32"])


@pytest.mark.xdist_group("winograd")
@needs_compiler
def test_a_winograd_step_trains_to_the_losses_of_the_plain_one(stand_in):
    changes = {"ema_decay": 0.9, "schedule": "cosine", "nesterov": True, "half_size_epochs": 1}
    lines: list[str] = []
    ours = losses(tiny(step="winograd", **changes), stand_in[0], log=lines.append)
    assert lines == []
    assert ours == losses(
        tiny(step="winograd", **changes), stand_in[0]
    )  # to the bit: a resumed run must be the same
    assert ours == pytest.approx(losses(tiny(**changes), stand_in[0]), rel=TOLERANCE["fp32"])


def test_without_a_compiler_a_winograd_step_is_the_plain_one(stand_in, monkeypatch):
    monkeypatch.setattr("cifar_lib.step.build", build.__wrapped__)
    monkeypatch.setenv("CXX", "no-such-compiler")
    lines: list[str] = []
    fallen_back = losses(tiny(step="winograd"), stand_in[0], log=lines.append)
    assert "a winograd step doesn't work here (no C++ compiler" in lines[0]
    assert fallen_back == losses(tiny(), stand_in[0])


@pytest.mark.parametrize("moment", ["at once", "in the first step", "in the first backward pass"])
def test_where_compiling_fails_training_says_so_and_goes_on_without(stand_in, monkeypatch, moment):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(context, loss):
            return loss.clone()

        @staticmethod
        def backward(context, gradient):
            raise RuntimeError("no compiler\nlong story")

    def broken_compile(function, **_):
        if moment == "at once":
            raise RuntimeError("no compiler\nlong story")

        def run(*arguments):
            loss, right = function(*arguments)  # has changed the batch statistics by now
            if moment == "in the first step":
                raise RuntimeError("no compiler\nlong story")
            return Broken.apply(loss), right

        return run

    monkeypatch.setattr(torch, "compile", broken_compile)
    lines: list[str] = []
    fallen_back = losses(tiny(step="compiled"), stand_in[0], log=lines.append)
    assert lines == ["a compiled step doesn't work here (no compiler); going on without"]
    assert fallen_back == losses(tiny(), stand_in[0])


def test_a_first_gradient_that_overflows_in_fp16_leaves_no_trace(stand_in):
    config = tiny(precision="fp16", decay_all=False, weight_decay=0.0)
    images, labels = stand_in[0].images[:16], torch.arange(16) % 10
    after = []
    for scale in (2.0**120, 2.0**10):  # the first one overflows float32, too
        state = State.new(config, CPU)
        step = Step(state, config)
        state.scaler.load_state_dict(
            state.scaler.state_dict() | {"scale": scale, "growth_interval": 10**6}
        )
        state.model.train()
        if scale > 2.0**100:
            before = copy.deepcopy(state.model.state_dict())
            step(images, labels, rate=0.1)
            state.model.load_state_dict(before)  # with its batch statistics
            momentum = [
                state.optimizer.state[p]["momentum_buffer"] for p in state.model.parameters()
            ]
            assert not any(buffer.any() for buffer in momentum)
            state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 2.0**10})
        step(images, labels, rate=0.1)
        after.append(state.model)
    for overflowed, smooth in zip(*(model.parameters() for model in after), strict=True):
        torch.testing.assert_close(overflowed, smooth)


def test_averaging_starts_at_the_first_step_and_takes_batch_statistics_along(stand_in):
    config = tiny(ema_decay=0.5, epochs=1, batch_size=30)
    state = State.new(config, CPU)
    step, seen = Step(state, config), []
    for half in stand_in[0].images.split(30):
        step.state.model.train()
        step(half, torch.arange(30) % 10, rate=0.1)
        seen.append({name: tensor.clone() for name, tensor in state.model.state_dict().items()})
    for name, tensor in state.ema.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (seen[0][name] + seen[1][name]) / 2)


# On a GPU


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["graph", "compiled"])
def test_on_cuda_fast_steps_train_to_the_losses_of_plain_ones(stand_in, kind, precision):
    if precision == "bf16" and choose_precision("auto", CUDA) != "bf16":
        pytest.skip("this GPU has no bf16")
    changes = {
        "precision": precision,
        "ema_decay": 0.9,
        "half_size_epochs": 1,
        "schedule": "cosine",
        "batch_size": 8,
    }
    lines: list[str] = []
    fast = losses(tiny(step=kind, **changes), stand_in[0], CUDA, lines.append)
    assert lines == []
    assert fast == pytest.approx(losses(tiny(**changes), stand_in[0], CUDA), rel=ON_CUDA[precision])


@needs_cuda
@pytest.mark.parametrize("kind", ["plain", "graph", "compiled"])
def test_on_cuda_a_loss_that_is_not_finite_changes_no_weight_and_is_found(stand_in, kind):
    config = tiny(step=kind, batch_size=8, epochs=1)
    state = State.new(config, CUDA)
    step, train = Step(state, config), stand_in[0].to(CUDA)
    for i, (images, labels) in enumerate(
        zip(train.images.split(8), train.labels.split(8), strict=True)
    ):
        if i == 5:
            before = copy.deepcopy(state.model)
            step.scale.fill_(float("nan"))
        step(images, labels, rate=0.1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.parameters(), state.model.parameters(), strict=True)
    )
    with pytest.raises(InputError, match="not finite at epoch 0, step 5"):
        step.check()


@needs_cuda
def test_on_cuda_images_are_normalised_as_on_a_cpu(stand_in):
    images = stand_in[0].images
    torch.testing.assert_close(
        normalize(images.to(CUDA), CIFAR10_MEAN, CIFAR10_STD).cpu(),
        normalize(images, CIFAR10_MEAN, CIFAR10_STD),
    )
