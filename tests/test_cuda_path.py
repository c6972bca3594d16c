"""What runs on a GPU, without one: no tensors of two devices meet, and nothing waits unasked.

For an Apple GPU, which `hardware.APPLE_GPU` names, the same is run on a stricter fake device.
"""

import pytest
import torch

from cifar_lib import hardware
from cifar_lib.augment import RULES, Policy, augment, draw
from cifar_lib.data import CIFAR10_MEAN, CIFAR10_STD, ImageSet, Normalization
from cifar_lib.evaluate import TTA, features, predict
from cifar_lib.model import ResNet
from cifar_lib.recipes import recipe
from cifar_lib.shift import adapt, rebase_batch_norm
from cifar_lib.train import State, Step, Totals
from tests.fakecuda import FakeAppleGpu, FakeCuda

CUDA = torch.device("cuda")
NORMALIZATION = Normalization(CIFAR10_MEAN, CIFAR10_STD)
pytestmark = pytest.mark.skipif(
    not hasattr(torch._C, "_ensureCUDADeviceGuardSet"), reason="needs torch 2.11 or later"
)


@pytest.fixture(params=[FakeCuda, FakeAppleGpu])
def gpu(request, monkeypatch):
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    if request.param is FakeAppleGpu:
        monkeypatch.setattr(hardware, "APPLE_GPU", "cuda")
    with request.param() as mode:
        yield mode


def waits_for_nothing(gpu: FakeCuda) -> bool:
    """Whether the host hasn't waited for a CUDA GPU; for copies to an Apple GPU it has to wait."""
    return gpu.waits == [] or isinstance(gpu, FakeAppleGpu)


def random_images(n: int) -> torch.Tensor:
    return torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8)


def test_the_fake_device_finds_what_a_real_one_would(gpu):
    images = random_images(40).to(CUDA)
    with pytest.raises(RuntimeError, match="meet"):
        images + torch.ones(3, 32, 32, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="waits"):
        images.sum().item()
    gpu.waits.clear()
    images.cpu()
    torch.ones(7).to(CUDA)
    assert gpu.waits == [(40, 3, 32, 32), (7,)]
    if isinstance(gpu, FakeAppleGpu):
        with pytest.raises(RuntimeError, match="isn't waited for"):
            torch.ones(5).to(CUDA, non_blocking=True)
        with pytest.raises(TypeError, match="no float64"):
            torch.ones(3).to(CUDA).double()
        with pytest.raises(TypeError, match="no float64"):
            torch.ones(3, dtype=torch.float64).to(CUDA)
    else:
        torch.ones(5).to(CUDA, non_blocking=True)
        assert len(gpu.waits) == 2


@pytest.mark.parametrize("ops", RULES)
def test_augmentation_stays_on_the_device(gpu, ops):
    policy = Policy(ops=ops, cutout=8, num_ops=2)
    train = ImageSet(random_images(80), torch.zeros(80, dtype=torch.int64)).to(CUDA)
    for epoch in (0, 0):  # in the first, the maps of geometric operations are put there
        gpu.waits.clear()
        images = train[torch.randperm(80)].images
        result = augment(images, policy, draw(80, policy, seed=0, epoch=epoch))
    assert result.shape == images.shape and result.dtype == torch.uint8
    assert result.device.type == "cuda" and waits_for_nothing(gpu)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("half_size", [False, True])
def test_a_step_waits_for_nothing(gpu, monkeypatch, precision, half_size):
    config = recipe("best", blocks="1,1", channels="18,20", precision=precision, compile=False)
    state, totals = State(config, CUDA), Totals(CUDA)

    def backward(_: torch.Tensor) -> None:  # fake tensors can't go backwards
        for parameter in state.model.parameters():
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    step = Step(state)
    images, labels = random_images(16).to(CUDA), torch.zeros(16, dtype=torch.int64).to(CUDA)
    gpu.waits.clear()
    for _ in range(2):
        totals.add(*step(images, labels, rate=0.1, half_size=half_size), 16)
    assert totals.sums.device.type == "cuda" and waits_for_nothing(gpu)


@pytest.mark.parametrize("tta", TTA)
def test_only_logits_come_back_from_a_prediction(gpu, tta):
    model = ResNet((1, 1), (18, 20)).to(CUDA)
    logits = predict(model, random_images(40), NORMALIZATION, "bf16", tta)
    assert logits.shape == (40, 10) and gpu.waits[-1:] == [(TTA[tta], 40, 10)]  # of each view


def test_features_and_adaptation_run_on_the_device(gpu):
    model, images = ResNet((1, 1), (18, 20)).to(CUDA), random_images(40)
    gpu.counts_are_read = True
    adapted, normalization = adapt("normalize+batchnorm", model, images, NORMALIZATION)
    rebased = rebase_batch_norm(model, images, NORMALIZATION)
    for network in (adapted, rebased):
        assert network.bn1.running_mean.device.type == "cuda"
    assert features(adapted, images, normalization).shape == (40, 20)
