"""The report's network, a CIFAR ResNet (He et al. 2015, arXiv:1512.03385), and its file."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import safetensors.torch
import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, model_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from cifar_lib.data import Normalization
from cifar_lib.errors import InputError, explained
from cifar_lib.files import parse_object, read_regular, write_atomically

PARAMETER_BUDGET = 5_000_000  # the competition's limit
DEEPEST, WIDEST = 100, 10_000  # blocks in all; channels
LARGEST_FILE = 100_000_000  # bytes
PRETRAINED = "pretrained"  # stands for the weights that come with the package
SHIPPED = Path(__file__).parent / "weights" / "report.safetensors"


# The network.


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, added to the (projected) input."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()  # the input itself
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor) -> Tensor:  # (N, in_channels, H, W)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (N, channels, H / stride, W / stride)
        out = self.bn2(self.conv2(out))  # the same shape, as the shortcut's
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class ResNet(nn.Module):
    """A 3x3 convolution, one stage per entry of `blocks`, average pooling and a linear layer.

    Each stage after the first halves the image. Normalised float images (N, 3, H, W) become logits
    (N, num_classes). `check_shape` says which shapes are sound.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (3, 4, 3),
        channels: Sequence[int] = (66, 132, 264),
        num_classes: int = 10,
    ):
        super().__init__()
        self.blocks, self.channels, self.num_classes = tuple(blocks), tuple(channels), num_classes

        # The stem keeps the image's size.
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])

        # layer1, layer2, ...: in each stage the first block changes the width and halves the image.
        width_in = channels[0]
        for i, (depth, width) in enumerate(zip(blocks, channels, strict=True)):
            stage = [BasicBlock(width_in, width, stride=1 if i == 0 else 2)]
            stage += [BasicBlock(width, width, stride=1) for _ in range(depth - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
            width_in = width

        # The head.
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels[-1], num_classes)

    @property
    def stages(self) -> list[nn.Module]:
        return [getattr(self, f"layer{i + 1}") for i in range(len(self.blocks))]

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W); the report's: (N, 3, 32, 32)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (N, channels[0], H, W); 66, 32, 32
        for stage in self.stages:
            x = stage(x)  # 66, 32, 32; then 132, 16, 16; then 264, 8, 8
        x = self.pool(x).flatten(1)  # (N, channels[-1])
        return self.linear(x)  # (N, num_classes)


def check_shape(
    blocks: Sequence[int], channels: Sequence[int], budget: int = PARAMETER_BUDGET
) -> None:
    """Check a shape that comes from outside: a configuration's or a file's.

    Raises InputError if it isn't a network's, or if its network has more than `budget` parameters.
    """
    numbers = all(type(n) is int and 1 <= n <= WIDEST for n in (*blocks, *channels))
    if not numbers or len(blocks) != len(channels) or not 1 <= sum(blocks) <= DEEPEST:
        what = f"as many blocks as channels, whole numbers from 1 to {WIDEST:,}"
        most = f"at most {DEEPEST} blocks in all; got {blocks} and {channels}"
        raise InputError(f"a network takes {what}, and {most}")
    count = count_parameters(blocks, channels)
    if count > budget:
        what = f"blocks {blocks} and channels {channels} make {count:,} parameters"
        raise InputError(f"{what}, over the budget of {budget:,}: use fewer of them")


def count_parameters(blocks: Sequence[int], channels: Sequence[int], num_classes: int = 10) -> int:
    """Count the trainable parameters of `ResNet(blocks, channels, num_classes)`.

    None of them is allocated.
    """
    with torch.device("meta"):
        model = ResNet(blocks, channels, num_classes)
    return sum(parameter.numel() for parameter in model.parameters())


# Its weights on disk.

# JSON has lists where Python has tuples.
Mean = Annotated[
    tuple[Annotated[float, Field(ge=-1e3, le=1e3)], ...],
    Field(min_length=3, max_length=3, strict=False),
]
Std = Annotated[
    tuple[Annotated[float, Field(ge=1e-3, le=1e3)], ...],
    Field(min_length=3, max_length=3, strict=False),
]


class WeightsInfo(BaseModel, strict=True, frozen=True):
    """What must be known of weights to use them: wrongly normalised images get wrong labels.

    recipe, seed, data, epochs: how they were trained, for people.
    mean, std: how images are normalised to predict them.
    train_mean, train_std: how they were normalised in training; None in files of older versions.
    temperature: what logits are divided by before they become probabilities; None if none was
    fitted, for want of a validation part.
    """

    recipe: str | None = None
    seed: int | None = None
    data: str | None = None
    epochs: int | None = None
    mean: Mean
    std: Std
    train_mean: Mean | None = None
    train_std: Std | None = None
    temperature: float | None = Field(None, ge=math.exp(-3), le=math.exp(3))

    @model_validator(mode="after")
    def _both_or_neither(self) -> "WeightsInfo":
        if (self.train_mean is None) != (self.train_std is None):
            raise ValueError("of train_mean and train_std, one is missing")
        return self

    @property
    def normalization(self) -> Normalization:
        """How images are normalised to predict them."""
        return Normalization(self.mean, self.std)

    @property
    def training_normalization(self) -> Normalization:
        """How images were normalised in training; the recipe's name doesn't tell, as fields change.

        Raises InputError where the file doesn't say, as older ones don't.
        """
        if self.train_mean is None or self.train_std is None:
            what = "expected the mean and std of the training (train_mean, train_std), found none"
            raise InputError(f"weights: {what}: use `pretrained`, or train them again")
        return Normalization(self.train_mean, self.train_std)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return logits (N, 10) as probabilities, calibrated if there is a temperature."""
        return (logits / (self.temperature or 1.0)).softmax(1)

    def as_record(self) -> dict:
        """Return what is known, for JSON, as files hold it."""
        return self.model_dump(exclude_none=True)


def save_model(path: Path, model: ResNet, info: WeightsInfo) -> None:
    """Write weights as safetensors, with the network's shape and `info` to use them."""
    shape = {"blocks": model.blocks, "channels": model.channels, "num_classes": model.num_classes}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    # One key: safetensors writes several in random order, and equal weights should be equal bytes.
    metadata = {"cifar_lib": json.dumps({"model": shape, "info": info.as_record()})}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def load_model(path: str | os.PathLike) -> tuple[ResNet, WeightsInfo]:
    """Read a file that `save_model` has written.

    Returns the network, float32 and in evaluation mode on the CPU, and what is known of its
    weights. `pretrained` names the package's own, whose sha256 is checked.

    Raises InputError if the file is missing or damaged, or its network gives no usable logits.
    """
    remedy = "give a model.safetensors that `cifar_lib train` wrote"
    shipped = str(path) == PRETRAINED
    if shipped:
        path, remedy = SHIPPED, "get cifar_lib/weights of the repository again"
    known = (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError)
    with explained(f"weights: {path} isn't a file of this package's weights", remedy, *known):
        content = read_regular(Path(path), LARGEST_FILE)
        if shipped:
            listed = (SHIPPED.parent / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
            if f"{hashlib.sha256(content).hexdigest()}  {SHIPPED.name}" not in listed:
                raise ValueError("its sha256 isn't the one that SHA256SUMS beside it lists")
        return _parse(content)


def _parse(content: bytes) -> tuple[ResNet, WeightsInfo]:
    """The network and the info of a safetensors file's content."""
    tensors = safetensors.torch.load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = parse_object(header["__metadata__"]["cifar_lib"].encode())
    info = WeightsInfo.model_validate(metadata["info"])

    # The network, once its shape is known to be one.
    blocks, channels = metadata["model"]["blocks"], metadata["model"]["channels"]
    check_shape(blocks, channels)
    model = ResNet(blocks, channels).eval()
    model.load_state_dict(tensors)

    # Weights that aren't numbers would label everything an airplane.
    with torch.inference_mode():
        logits = model(torch.linspace(-3, 3, 32).expand(1, 3, 32, 32))  # as normalised images are
    if not all(tensor.isfinite().all() for tensor in (*model.state_dict().values(), logits)):
        raise ValueError("its weights, or the logits they give, are not finite")
    return model, info
