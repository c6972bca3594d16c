"""The published run's training loop, written from its description, to compare ours with."""

import time
from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import (
    Compose,
    Normalize,
    RandAugment,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    ToTensor,
)

from cifar_lib.data import CIFAR10_MEAN, PUBLISHED_STD, ImageSet
from cifar_lib.model import ResNet
from cifar_lib.train import smooth_cross_entropy


class Pictures(Dataset):
    """The images as PIL pictures, each augmented by itself with the published transforms."""

    def __init__(self, images: ImageSet):
        self.arrays = images.images.permute(0, 2, 3, 1).contiguous().numpy()  # (N, 32, 32, 3)
        self.labels = images.labels.tolist()
        self.transform = Compose(
            [
                RandomCrop(32, padding=4),
                RandomHorizontalFlip(),
                RandAugment(num_ops=2, magnitude=9),
                ToTensor(),
                RandomErasing(p=0.5, scale=(0.02, 0.33), ratio=(0.3, 3.3)),
                Normalize(CIFAR10_MEAN, PUBLISHED_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.arrays[i])), self.labels[i]


class PublishedLoop:
    """The published training; each call trains for one epoch.

    It computes in fp32 with contiguous tensors, loads images in two worker processes, and reads the
    loss after every step.
    """

    def __init__(self, train: ImageSet, device: torch.device, model: ResNet | None = None):
        torch.manual_seed(42)
        self.device, self.model = device, (model or ResNet()).to(device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4
        )
        on_gpu = device.type == "cuda"
        self.loader = DataLoader(
            Pictures(train), batch_size=128, shuffle=True, num_workers=2, pin_memory=on_gpu
        )

    def __call__(self) -> float:
        """Train for an epoch, and return how many images per second it takes.

        The first step doesn't count, because the workers start during it.
        """
        steps = self._steps()
        next(steps)
        start = time.perf_counter()
        for _ in steps:
            pass
        return (len(self.loader.dataset) - self.loader.batch_size) / (time.perf_counter() - start)

    def _steps(self) -> Iterator[float]:
        """Train for an epoch, and yield the loss of each step."""
        self.model.train()
        for images, labels in self.loader:
            images, labels = images.to(self.device), labels.to(self.device)
            self.optimizer.zero_grad()
            loss = smooth_cross_entropy(self.model(images), labels, 0.05)
            loss.backward()
            self.optimizer.step()
            yield loss.item()
