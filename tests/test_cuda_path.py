"""What runs on a GPU, without one: no tensors of two devices meet, and nothing waits unasked."""

import pytest
import torch

from cifar_lib.augment import RULES, Policy, augment, draw
from cifar_lib.data import CIFAR10_MEAN, CIFAR10_STD
from cifar_lib.evaluate import TTA, features, predict
from cifar_lib.model import ResNet
from cifar_lib.recipes import recipe
from cifar_lib.shift import adapt
from cifar_lib.train import State, Step
from tests.fakecuda import FakeCuda

CUDA = torch.device("cuda")
NORMALISATION = (CIFAR10_MEAN, CIFAR10_STD)


pytestmark = pytest.mark.skipif(
    not hasattr(torch._C, "_ensureCUDADeviceGuardSet"), reason="needs torch 2.11 or later"
)


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    with FakeCuda() as mode:
        yield mode


def images_on(device: torch.device, n: int = 40) -> torch.Tensor:
    return torch.zeros(n, 3, 32, 32, dtype=torch.uint8).to(device)


def test_the_fake_device_finds_what_a_real_one_would(cuda):
    images = images_on(CUDA)
    with pytest.raises(RuntimeError, match="meet"):
        images + torch.ones(3, 32, 32, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="waits"):
        images.sum().item()
    cuda.waits.clear()
    images.cpu()
    torch.ones(7).to(CUDA)
    torch.ones(5).to(CUDA, non_blocking=True)
    assert cuda.waits == [(40, 3, 32, 32), (7,)]


@pytest.mark.parametrize("ops", RULES)
def test_augmentation_stays_on_the_device(cuda, ops):
    policy = Policy(ops=ops, cutout=8, num_ops=2)
    images = images_on(CUDA, 80)
    for epoch in (0, 0):  # in the first, the maps of geometric operations are put there
        cuda.waits.clear()
        result = augment(images, policy, draw(80, policy, seed=0, epoch=epoch))
    assert result.shape == images.shape and result.dtype == torch.uint8
    assert result.device.type == "cuda" and cuda.waits == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("half_size", [False, True])
def test_a_step_waits_for_nothing(cuda, monkeypatch, precision, half_size):
    config = recipe("best", blocks="1,1", channels="18,20", precision=precision, compile=False)
    state = State(config, CUDA)

    def backward(_: torch.Tensor) -> None:
        for parameter in state.model.parameters():
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    step = Step(state, config)
    labels = torch.zeros(16, dtype=torch.int64).to(CUDA)
    images = images_on(CUDA, 16)
    cuda.waits.clear()
    for _ in range(2):
        step(images, labels, rate=0.1, half_size=half_size)
    assert step.totals.device.type == "cuda" and cuda.waits == []


@pytest.mark.parametrize("tta", TTA)
def test_only_logits_come_back_from_a_prediction(cuda, tta):
    model = ResNet((1, 1), (18, 20)).to(CUDA)
    cuda.waits.clear()
    logits = predict(
        model, torch.zeros(40, 3, 32, 32, dtype=torch.uint8), *NORMALISATION, "bf16", tta
    )
    assert logits.shape == (40, 10) and cuda.waits[-1:] == [(40, 10)]


def test_features_and_adaptation_run_on_the_device(cuda):
    model = ResNet((1, 1), (18, 20)).to(CUDA)
    images = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    cuda.counts_are_read = True
    adapted, mean, std = adapt("normalize+batchnorm", model, images, *NORMALISATION)
    assert adapted.bn1.running_mean.device.type == "cuda"
    assert features(adapted, images, mean, std).shape == (40, 20)
