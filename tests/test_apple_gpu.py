"""Layouts in memory on an Apple GPU, without one: `hardware.APPLE_GPU` names the CPU instead.

So these tests show what the package hands to torch there. What torch's kernels for Apple GPUs make
of it, only a Mac can show.
"""

import argparse

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cifar_lib import cli, hardware
from cifar_lib.explain import grad_cam
from cifar_lib.model import PRETRAINED
from cifar_lib.recipes import recipe
from cifar_lib.train import State, Step
from notebooks.course.session import Session

CPU = torch.device("cpu")
BLOCKS, CHANNELS = (1, 1), (18, 20)
BATCH_NORMS = 6  # the stem's, two in each of two blocks, and one in a shortcut


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class BatchNormTrace(TorchDispatchMode):
    """Notes whether each batch (N, C, H, W) that enters batch normalisation is channels-last, in
    the forward and in the backward pass."""

    def __init__(self):
        super().__init__()
        self.forward: list[bool] = []
        self.backward: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "batch_norm" in name:
            seen = self.backward if "backward" in name else self.forward
            seen += [is_channels_last(x) for x in args if isinstance(x, Tensor) and x.dim() == 4]
        return function(*args, **(kwargs or {}))


@pytest.fixture
def cpu_as_apple_gpu(monkeypatch):
    monkeypatch.setattr(hardware, "APPLE_GPU", "cpu")
    monkeypatch.setattr(hardware, "cifar_winograd", None)  # it is for CPUs


def images_of_a_file(n: int) -> Tensor:
    """They lie in memory as a file of (N, 32, 32, 3) has them."""
    return torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)


@pytest.mark.parametrize("half_size", [False, True])
def test_batch_norm_gets_channels_last_images_but_for_apple(request, half_size):
    def trace_step_and_grad_cam() -> tuple[BatchNormTrace, BatchNormTrace]:
        changes = {"precision": "fp32", "compile": False}
        config = recipe("best", blocks=BLOCKS, channels=CHANNELS, **changes)
        state = State(config, CPU)
        step, images = Step(state), images_of_a_file(16)
        with BatchNormTrace() as stepped:
            step(images, torch.zeros(16, dtype=torch.int64), rate=0.1, half_size=half_size)
        with BatchNormTrace() as explained:
            grad_cam(state.model.eval(), images[:4], torch.arange(4), config.training_normalization)
        assert len(stepped.forward) == len(explained.forward) == BATCH_NORMS
        assert len(stepped.backward) == 2 * BATCH_NORMS
        return stepped, explained

    stepped, explained = trace_step_and_grad_cam()
    assert all(stepped.forward + explained.forward)
    request.getfixturevalue("cpu_as_apple_gpu")
    stepped, explained = trace_step_and_grad_cam()
    assert not any(stepped.forward + stepped.backward + explained.forward)


def test_weights_lie_in_memory_as_their_device_wants_it(request, stand_in, monkeypatch):
    monkeypatch.setenv("CIFAR_WEIGHTS", PRETRAINED)
    monkeypatch.setattr("notebooks.course.session.choose_device", lambda name: CPU)
    session = Session(*stand_in)

    def layouts() -> list[bool]:
        options = argparse.Namespace(device="cpu", precision="fp32", weights=PRETRAINED)
        models = [cli._load(options)[0], session.network().model]
        return [is_channels_last(model.layer1[0].conv1.weight) for model in models]

    assert layouts() == [True, True]
    request.getfixturevalue("cpu_as_apple_gpu")
    assert layouts() == [False, False]


def test_only_an_apple_gpu_is_given_contiguous_tensors():
    formats = {kind: hardware.memory_format(torch.device(kind)) for kind in hardware.DEVICE_TYPES}
    assert formats.pop("mps") == torch.contiguous_format
    assert set(formats.values()) == {torch.channels_last}
