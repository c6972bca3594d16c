"""The published run's loop, written from its description: what ours is compared with."""

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
    """The images as PIL pictures, one at a time through the published transforms."""

    def __init__(self, images: ImageSet):
        self.arrays = images.images.permute(0, 2, 3, 1).contiguous().numpy()
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
    """One call, one epoch: fp32, contiguous, two loader workers, the loss read after every step."""

    def __init__(self, train: ImageSet, device: torch.device):
        torch.manual_seed(42)
        self.device, self.model = device, ResNet().to(device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4
        )
        on_gpu = device.type == "cuda"
        self.loader = DataLoader(
            Pictures(train), batch_size=128, shuffle=True, num_workers=2, pin_memory=on_gpu
        )

    def __call__(self) -> float:
        """Images a second from the end of the first step on, so that starting the workers doesn't
        count."""
        steps = self._steps()
        next(steps)
        start = time.perf_counter()
        for _ in steps:
            pass
        return (len(self.loader.dataset) - self.loader.batch_size) / (time.perf_counter() - start)

    def _steps(self) -> Iterator[float]:
        self.model.train()
        for images, labels in self.loader:
            images, labels = images.to(self.device), labels.to(self.device)
            self.optimizer.zero_grad()
            loss = smooth_cross_entropy(self.model(images), labels, 0.05)
            loss.backward()
            self.optimizer.step()
            yield loss.item()
