"""What runs on an Apple GPU, without one: `hardware.APPLE_GPU` names another device instead.

So these tests show what the package hands to torch there. What torch's kernels for Apple GPUs make
of it, only a Mac can show. Layouts are looked at on the CPU, where the step computes and goes
backwards; types and copies on the fake CUDA device, which can tell its tensors from the CPU's.
"""

import argparse

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cifar_lib import cli, hardware
from cifar_lib.augment import Policy, augment, draw
from cifar_lib.data import CIFAR10_MEAN, CIFAR10_STD, ImageSet
from cifar_lib.evaluate import TTA, features, predict
from cifar_lib.explain import grad_cam
from cifar_lib.model import PRETRAINED, ResNet
from cifar_lib.recipes import recipe
from cifar_lib.shift import adapt, rebase_batch_norm
from cifar_lib.train import State, Step
from tests.fakecuda import COPIES, FakeCuda

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NORMALISATION = (CIFAR10_MEAN, CIFAR10_STD)
BLOCKS, CHANNELS = (1, 1), (18, 20)
BATCH_NORMS = 6  # the stem's, two in each of two blocks, and one in a shortcut
needs_fake_cuda = pytest.mark.skipif(
    not hasattr(torch._C, "_ensureCUDADeviceGuardSet"), reason="needs torch 2.11 or later"
)


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class BatchNormTrace(TorchDispatchMode):
    """Notes of every image batch (N, C, H, W) that enters batch normalisation, in the forward and
    the backward pass, whether it is channels-last."""

    def __init__(self):
        super().__init__()
        self.forward: list[bool] = []
        self.backward: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "batch_norm" in name:
            batches = [x for x in args if isinstance(x, Tensor) and x.dim() == 4]
            seen = self.backward if "backward" in name else self.forward
            seen += [is_channels_last(x) for x in batches]
        return function(*args, **(kwargs or {}))


@pytest.fixture
def cpu_as_apple_gpu(monkeypatch):
    monkeypatch.setattr(hardware, "APPLE_GPU", "cpu")
    monkeypatch.setattr(hardware, "cifar_winograd", None)  # it is for CPUs


def traced_step(half_size: bool) -> BatchNormTrace:
    """One step, from images that lie in memory as a file of (N, 32, 32, 3) has them."""
    changes = {"precision": "fp32", "compile": False}
    config = recipe("best", blocks=BLOCKS, channels=CHANNELS, **changes)
    step = Step(State(config, CPU), config)
    images = torch.randint(256, (16, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    labels = torch.zeros(16, dtype=torch.int64)
    with BatchNormTrace() as trace:
        step(images, labels, rate=0.1, half_size=half_size)
    assert len(trace.forward) == BATCH_NORMS and len(trace.backward) == 2 * BATCH_NORMS
    return trace


@pytest.mark.parametrize("half_size", [False, True])
def test_batch_norm_gets_no_channels_last_images_in_a_step_there(cpu_as_apple_gpu, half_size):
    trace = traced_step(half_size)
    assert not any(trace.forward) and not any(trace.backward)


@pytest.mark.parametrize("half_size", [False, True])
def test_batch_norm_gets_channels_last_images_in_a_step_elsewhere(half_size):
    assert all(traced_step(half_size).forward)


def test_batch_norm_gets_no_channels_last_images_from_grad_cam_there(cpu_as_apple_gpu):
    model = ResNet(BLOCKS, CHANNELS).eval()
    images = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    with BatchNormTrace() as trace:
        grad_cam(model, images, torch.arange(4), *NORMALISATION)
    assert trace.forward == BATCH_NORMS * [False]


def test_weights_lie_in_memory_as_their_device_wants_it(request, session_of_pretrained):
    def layouts() -> list[bool]:
        options = argparse.Namespace(device="cpu", precision="fp32", weights=PRETRAINED)
        models = [cli._load(options)[0], session_of_pretrained.trained_model()[0]]
        return [is_channels_last(model.layer1[0].conv1.weight) for model in models]

    assert layouts() == [True, True]
    request.getfixturevalue("cpu_as_apple_gpu")
    assert layouts() == [False, False]


@pytest.fixture
def session_of_pretrained(stand_in, monkeypatch):
    from notebooks.course.session import Session

    monkeypatch.setenv("CIFAR_WEIGHTS", PRETRAINED)
    monkeypatch.setattr("notebooks.course.session.choose_device", lambda name: CPU)
    train, test = stand_in
    return Session("quick", train, test, test, recipe("quick"))


def test_only_an_apple_gpu_is_given_contiguous_tensors():
    formats = {kind: hardware.memory_format(torch.device(kind)) for kind in hardware.DEVICE_TYPES}
    assert formats.pop("mps") == torch.contiguous_format
    assert set(formats.values()) == {torch.channels_last}


class FakeAppleGpu(FakeCuda):
    """FakeCuda that refuses what an Apple GPU can't do, or does wrong: float64, which it lacks, and
    copies that the host doesn't wait for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        there = torch.device(kwargs.get("device") or CPU).type == CUDA.type
        if there and function in COPIES and kwargs.get("non_blocking"):
            raise RuntimeError(f"{function}: a copy that isn't waited for")
        result = super().__torch_dispatch__(function, types, args, kwargs)
        for x in tree_leaves((args, kwargs, result)):
            on_gpu = isinstance(x, FakeTensor) and x.device.type == CUDA.type
            if on_gpu and x.dtype == torch.float64:
                raise TypeError(f"{function}: an Apple GPU has no float64")
        return result


@pytest.fixture
def apple_gpu(monkeypatch):
    monkeypatch.setattr(hardware, "APPLE_GPU", "cuda")
    with FakeAppleGpu() as mode:
        mode.counts_are_read = True
        yield CUDA


def random_images(n: int) -> Tensor:
    return torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8)


@needs_fake_cuda
def test_the_fake_apple_gpu_refuses_what_a_real_one_would(apple_gpu):
    with pytest.raises(TypeError, match="no float64"):
        torch.ones(3).to(apple_gpu).double()
    with pytest.raises(TypeError, match="no float64"):
        torch.ones(3, dtype=torch.float64).to(apple_gpu)
    with pytest.raises(RuntimeError, match="isn't waited for"):
        torch.ones(3).to(apple_gpu, non_blocking=True)


@needs_fake_cuda
@pytest.mark.parametrize("ops", ["none", "randaugment", "autoaugment", "trivialaugment"])
def test_augmentation_needs_no_float64_there(apple_gpu, ops):
    policy = Policy(ops=ops, cutout=8)
    train = ImageSet(random_images(80), torch.zeros(80, dtype=torch.int64)).to(apple_gpu)
    chosen = train[torch.randperm(80)]
    result = augment(chosen.images, policy, draw(80, policy, seed=0, epoch=0))
    assert result.device.type == apple_gpu.type and result.dtype == torch.uint8


@needs_fake_cuda
@pytest.mark.parametrize("half_size", [False, True])
def test_a_step_needs_no_float64_there(apple_gpu, monkeypatch, half_size):
    config = recipe("best", blocks=BLOCKS, channels=CHANNELS, precision="fp32", compile=False)
    state = State(config, apple_gpu)

    def backward(_: Tensor) -> None:  # which fake tensors can't do
        for parameter in state.model.parameters():
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(Tensor, "backward", backward)
    step = Step(state, config)
    labels = torch.zeros(16, dtype=torch.int64).to(apple_gpu)
    step(random_images(16).to(apple_gpu), labels, rate=0.1, half_size=half_size)
    assert step.totals.device.type == apple_gpu.type


@needs_fake_cuda
@pytest.mark.parametrize("tta", TTA)
def test_prediction_features_and_adaptation_need_no_float64_there(apple_gpu, tta):
    model, images = ResNet(BLOCKS, CHANNELS).to(apple_gpu), random_images(40)
    adapted, mean, std = adapt("normalize+batchnorm", model, images, *NORMALISATION)
    assert predict(adapted, images, mean, std, tta=tta).shape == (40, 10)
    assert features(adapted, images, mean, std).shape == (40, CHANNELS[-1])
    rebased = rebase_batch_norm(model, images, *NORMALISATION)
    assert rebased.bn1.weight.device.type == apple_gpu.type
