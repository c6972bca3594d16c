"""What several test files use: data, a network, and what a folder holds."""

from pathlib import Path

import pytest
import torch

from cifar_lib.data import ImageSet, find_cifar10, load_cifar10
from cifar_lib.model import ResNet
from notebooks.course.stand_in import generate_stand_in

# On tensors this small, threads only wait for each other: ten times slower on busy cores.
torch.set_num_threads(1)


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file in the folder and below it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def untrained_network(spread: float) -> ResNet:
    """A tiny network whose batch-norm statistics are random ones, of no images in particular."""
    torch.manual_seed(0)
    network = ResNet((1, 1), (16, 32)).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-spread, spread)
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(23_460)  # as after 60 epochs of `report`
    return network


@pytest.fixture(scope="session")
def cifar10() -> tuple[ImageSet, ImageSet]:
    home = Path(__file__).parent.parent / "data"
    if find_cifar10(home=home) is None:
        pytest.skip(
            "needs real CIFAR-10: it is not in CIFAR10_ROOT, data/ or Kaggle's input folder"
        )
    return load_cifar10(home=home)


@pytest.fixture(scope="session")
def stand_in() -> tuple[ImageSet, ImageSet]:
    return generate_stand_in(60, 30)


@pytest.fixture(scope="session")
def pictures() -> torch.Tensor:
    """A dozen images with what real ones have in one way or another: uint8 (12, 3, 32, 32)."""
    generator = torch.Generator().manual_seed(7)
    ramp = torch.linspace(0, 255, 32)
    across, down = ramp.expand(32, 32), ramp[:, None].expand(32, 32)
    gradients = [
        torch.stack([across, down, 255 - across]),
        torch.stack([(across + down) / 2] * 3),  # grey
        # Low contrast, a narrow histogram.
        torch.stack([100 + across / 8, 90 + down / 8, 110 + across / 16]),
    ]
    noise = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    flat = torch.tensor([200, 30, 90], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    smooth = [image.to(torch.uint8)[None] for image in gradients]
    return torch.cat([generate_stand_in(6, 0, seed=3)[0].images, *smooth, noise, flat])
