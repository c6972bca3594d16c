"""The report's network, a CIFAR ResNet (He et al. 2015, arXiv:1512.03385), and its weights."""

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
DEEPEST = 100  # the most blocks that a network may have, all stages together
WIDEST = 10_000  # the most channels that a stage may have
# The fewest channels that a stage may have. With fewer, oneDNN's 1x1 convolutions write out of
# bounds (uxlfoundation/oneDNN#6035).
NARROWEST = 16
LARGEST_FILE = 100_000_000  # the most bytes that a file of weights may have
PRETRAINED = "pretrained"  # given instead of a path, it means the package's `report.safetensors`
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
        out = self.bn2(self.conv2(out))  # (N, channels, H / stride, W / stride), like shortcut(x)
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class ResNet(nn.Module):
    """A 3x3 convolution, one stage per entry of `blocks`, average pooling and a linear layer.

    blocks: how many blocks each stage has.
    channels: how many channels each stage has. Each stage after the first halves height and width.

    Normalised float images (N, 3, H, W) become logits (N, num_classes). If `blocks` and `channels`
    come from outside, call `check_shape` first.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (3, 4, 3),
        channels: Sequence[int] = (66, 132, 264),
        num_classes: int = 10,
    ):
        super().__init__()
        self.blocks, self.channels, self.num_classes = tuple(blocks), tuple(channels), num_classes

        # The stem: a convolution that keeps height and width.
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])

        # The stages layer1, layer2, and so on. The first block of each stage changes the number of
        # channels and, from layer2 on, halves height and width.
        in_channels = channels[0]
        for i, (depth, out_channels) in enumerate(zip(blocks, channels, strict=True)):
            stage = [BasicBlock(in_channels, out_channels, stride=1 if i == 0 else 2)]
            stage += [BasicBlock(out_channels, out_channels, stride=1) for _ in range(depth - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
            in_channels = out_channels

        # The head: the average over all positions, and from it one logit per class.
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels[-1], num_classes)

    @property
    def stages(self) -> list[nn.Module]:
        """The stages layer1, layer2, and so on, in this order."""
        return [getattr(self, f"layer{i + 1}") for i in range(len(self.blocks))]

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W); the report's: (N, 3, 32, 32)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (N, channels[0], H, W)
        for stage in self.stages:
            x = stage(x)  # the report's: (N, 66, 32, 32), (N, 132, 16, 16), (N, 264, 8, 8)
        x = self.pool(x).flatten(1)  # (N, channels[-1])
        return self.linear(x)  # (N, num_classes)


def check_shape(
    blocks: Sequence[int], channels: Sequence[int], budget: int = PARAMETER_BUDGET
) -> None:
    """Check a network's shape, `blocks` and `channels` from a configuration or a file.

    Raises InputError if no network has this shape, or if its network would have more than `budget`
    parameters.
    """
    # `type(n) is int` refuses True and False, which `isinstance` would take for 1 and 0.
    are_depths = all(type(n) is int and 1 <= n <= DEEPEST for n in blocks)
    are_widths = all(type(n) is int and NARROWEST <= n <= WIDEST for n in channels)
    are_stages = are_depths and are_widths and len(blocks) == len(channels)
    if not are_stages or not 1 <= sum(blocks) <= DEEPEST:
        wanted = f"a whole number of each for every stage, 1 to {DEEPEST} blocks in all"
        wanted = f"{wanted}, and {NARROWEST} to {WIDEST:,} channels"
        what = f"blocks and channels: expected {wanted}; got {blocks} and {channels}"
        raise InputError(f"{what}: correct them")
    count = count_parameters(blocks, channels)
    if count > budget:
        what = f"blocks {blocks} and channels {channels} make {count:,} parameters"
        raise InputError(f"{what}, over the budget of {budget:,}: use fewer blocks or channels")


def count_parameters(blocks: Sequence[int], channels: Sequence[int], num_classes: int = 10) -> int:
    """Count the trainable parameters of `ResNet(blocks, channels, num_classes)`."""
    with torch.device("meta"):  # tensors there have a shape and take no memory
        model = ResNet(blocks, channels, num_classes)
    return sum(parameter.numel() for parameter in model.parameters())


# Its weights on disk.

# The types of a mean and a standard deviation, in a file of weights and in a configuration: three
# numbers in a sane range. JSON has no tuples, so `strict=False` lets a list become one.
Mean = Annotated[
    tuple[Annotated[float, Field(ge=-1e3, le=1e3)], ...],
    Field(min_length=3, max_length=3, strict=False),
]
Std = Annotated[
    tuple[Annotated[float, Field(ge=1e-3, le=1e3)], ...],
    Field(min_length=3, max_length=3, strict=False),
]


class WeightsInfo(BaseModel, strict=True, frozen=True):
    """What a file says about its weights, above all how to normalise images for them.

    A network predicts worse if images are normalised in a way that its weights don't expect.

    recipe, seed, data, epochs: how the weights were trained, for people to read.
    mean, std: what images are normalised with before the network predicts their classes.
    train_mean, train_std: what training images were normalised with; None in older files.
    temperature: what logits are divided by before they become probabilities; None if it wasn't
    fitted, because fitting takes validation images.
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
            raise ValueError("one of train_mean and train_std is missing")
        return self

    @property
    def test_normalization(self) -> Normalization:
        """How images are normalised before the network predicts their classes."""
        return Normalization(self.mean, self.std)

    @property
    def training_normalization(self) -> Normalization:
        """How images were normalised in training.

        The recipe's name doesn't say how, because each run may change the recipe's fields.

        Raises InputError if the file doesn't say how either: files of older versions don't.
        """
        if self.train_mean is None or self.train_std is None:
            what = "the file doesn't say how training images were normalised"
            remedy = "use `pretrained`, or train the network again"
            raise InputError(f"weights: {what} (train_mean, train_std): {remedy}")
        return Normalization(self.train_mean, self.train_std)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities (N, 10) of logits (N, 10), calibrated if there is a temperature.

        Without one, the logits aren't divided.
        """
        return (logits / (self.temperature or 1.0)).softmax(1)

    def as_record(self) -> dict:
        """Return the fields that aren't None, as a file's JSON holds them."""
        return self.model_dump(exclude_none=True)


def save_model(path: Path, model: ResNet, info: WeightsInfo) -> None:
    """Write the model's weights to a safetensors file, with the network's shape and `info`.

    Raises InputError if the file can't be written.
    """
    shape = {"blocks": model.blocks, "channels": model.channels, "num_classes": model.num_classes}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    # Put everything under one key, because safetensors writes several keys in random order, and the
    # files of equal weights should have equal bytes.
    metadata = {"cifar_lib": json.dumps({"model": shape, "info": info.as_record()})}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def load_model(path: str | os.PathLike) -> tuple[ResNet, WeightsInfo]:
    """Read a file that `save_model` has written, or the package's report weights for `pretrained`.

    Returns the network, float32 on the CPU and in evaluation mode, and what the file says about its
    weights. For `pretrained`, the file's sha256 is checked.

    Raises InputError if the file is missing or damaged, or if its network gives no usable logits.
    """
    remedy = "give a model.safetensors that `cifar_lib train` wrote"
    shipped = str(path) == PRETRAINED
    if shipped:
        path, remedy = SHIPPED, "get cifar_lib/weights from the repository again"
    known = (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError)
    with explained(f"weights: can't load {path}", remedy, *known):
        content = read_regular(Path(path), LARGEST_FILE)
        if shipped:
            listed = (SHIPPED.parent / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
            if f"{hashlib.sha256(content).hexdigest()}  {SHIPPED.name}" not in listed:
                raise ValueError("its sha256 isn't the one that SHA256SUMS beside it lists")
        return _parse(content)


def _parse(content: bytes) -> tuple[ResNet, WeightsInfo]:
    """Return the network and the info that a safetensors file's `content` holds."""
    tensors = safetensors.torch.load(content)

    # The metadata is in the file's header: its length in 8 bytes, then that many bytes of JSON.
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = parse_object(header["__metadata__"]["cifar_lib"].encode())
    info = WeightsInfo.model_validate(metadata["info"])

    # Build the network only after its shape has been checked.
    blocks, channels = metadata["model"]["blocks"], metadata["model"]["channels"]
    check_shape(blocks, channels)
    model = ResNet(blocks, channels).eval()
    model.load_state_dict(tensors)

    # If weights are NaN, so are the logits, and argmax would call every image an airplane. Try one
    # image, a ramp over the values that normalised images have.
    with torch.inference_mode():
        logits = model(torch.linspace(-3, 3, 32).expand(1, 3, 32, 32))  # (1, 10)
    if not all(tensor.isfinite().all() for tensor in (*model.state_dict().values(), logits)):
        raise ValueError("its weights, or the logits they give, are not finite")
    return model, info
