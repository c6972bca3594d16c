"""The report's network: a CIFAR ResNet (He et al. 2015, arXiv:1512.03385) of any number of
stages."""

import hashlib
import json
import math
import os
from itertools import pairwise
from pathlib import Path

import safetensors
import safetensors.torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_lib.checkpoint import write_atomically
from cifar_lib.data import CLASSES
from cifar_lib.errors import InputError

PARAMETER_BUDGET = 5_000_000
PRETRAINED = "pretrained"  # stands for the weights that come with the package
SHIPPED = Path(__file__).parent / "weights" / "best.safetensors"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, added to the (projected) input."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class ResNet(nn.Module):
    """3x3 stem, one stage per entry of `blocks` (each after the first halves the image), average
    pooling, linear.

    `forward` takes normalised float images (N, 3, H, W) and returns logits (N, num_classes).
    Raises InputError for a malformed shape or for more than `budget` parameters (None: no limit).
    """

    def __init__(
        self,
        blocks: tuple[int, ...] = (3, 4, 3),
        channels: tuple[int, ...] = (66, 132, 264),
        num_classes: int = 10,
        budget: int | None = PARAMETER_BUDGET,
    ):
        super().__init__()
        parameters = count_parameters(blocks, channels, num_classes)  # before anything is allocated
        if budget is not None and parameters > budget:
            raise InputError(
                f"blocks {tuple(blocks)} and channels {tuple(channels)} make {parameters:,} parameters, over the "
                f"budget of {budget:,}: use fewer blocks or channels"
            )
        self.blocks, self.channels, self.num_classes = tuple(blocks), tuple(channels), num_classes
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        widths = (channels[0], *channels)
        for i, (depth, (width_in, width)) in enumerate(zip(blocks, pairwise(widths), strict=True)):
            first = BasicBlock(width_in, width, stride=1 if i == 0 else 2)
            rest = [BasicBlock(width, width, stride=1) for _ in range(depth - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(first, *rest))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels[-1], num_classes)

    @property
    def stages(self) -> list[nn.Module]:
        return [getattr(self, f"layer{i + 1}") for i in range(len(self.blocks))]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (N, C0, H, W)
        for stage in self.stages:
            x = stage(x)
        return self.linear(self.pool(x).flatten(1))


def count_parameters(
    blocks: tuple[int, ...], channels: tuple[int, ...], num_classes: int = 10
) -> int:
    """Trainable parameters of `ResNet(blocks, channels, num_classes)`, in closed form."""
    sizes = (*blocks, *channels, num_classes)
    if (
        len(blocks) != len(channels)
        or not blocks
        or any(not isinstance(n, int) or n < 1 for n in sizes)
    ):
        raise InputError(
            f"a network takes as many blocks as channels, all whole numbers of at least 1; "
            f"got blocks {tuple(blocks)}, channels {tuple(channels)}, num_classes {num_classes}"
        )

    def conv_bn(width_in: int, width: int, kernel: int) -> int:
        return width_in * width * kernel**2 + 2 * width

    total, width_in = conv_bn(3, channels[0], 3), channels[0]
    for stage, (depth, width) in enumerate(zip(blocks, channels, strict=True)):
        total += conv_bn(width_in, width, 3) + (2 * depth - 1) * conv_bn(width, width, 3)
        total += conv_bn(width_in, width, 1) if stage > 0 else 0
        width_in = width
    return total + (width_in + 1) * num_classes


def save_model(path: Path, model: ResNet, info: dict, half: bool = False) -> None:
    """Write weights as safetensors with what is needed to use them: the shape of the network, and
    `info` (JSON).

    `half`: convolutions in half precision, which makes half the file.
    """
    shape = {"blocks": model.blocks, "channels": model.channels, "num_classes": model.num_classes}
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    if half:
        tensors = {
            name: tensor.half() if tensor.ndim == 4 else tensor for name, tensor in tensors.items()
        }
    # One key: safetensors writes several in random order, and equal weights should be equal bytes.
    metadata = {"cifar_lib": json.dumps({"model": shape, "info": info})}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def _check_shipped() -> None:
    """The package's own weights are those that SHA256SUMS beside them lists."""
    remedy = "get cifar_lib/weights of the repository again"
    try:
        listed = dict(
            line.split()[::-1] for line in (SHIPPED.parent / "SHA256SUMS").read_text().splitlines()
        )
        expected, found = listed[SHIPPED.name], hashlib.sha256(SHIPPED.read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"weights: the pretrained ones or their SHA256SUMS can't be read ({error}): {remedy}"
        ) from error
    if found != expected:
        raise InputError(
            f"weights: {SHIPPED} should have sha256 {expected[:12]}..., it has {found[:12]}...: {remedy}"
        )


def _check_info(info: dict) -> None:
    """Raises KeyError, TypeError or ValueError where `info` can't have come from `save_model`."""
    mean, std, temperature = info["mean"], info["std"], info.get("temperature", 1.0)
    if not all(
        type(value) in (int, float) and math.isfinite(value) for value in (*mean, *std, temperature)
    ):
        raise TypeError("its mean, std or temperature are no finite numbers")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError("its mean and std are not of three channels")
    if min(*std, temperature) <= 0:
        raise ValueError("its std or temperature is not positive")


def load_model(path: str | os.PathLike) -> tuple[ResNet, dict]:
    """The network of a file written by `save_model`, in float32 and evaluation mode on the CPU, and
    its `info`.

    `pretrained` names the weights that come with the package, whose sha256 is checked. Raises
    InputError where the file is missing, damaged, or holds the weights of another architecture.
    """
    if str(path) == PRETRAINED:
        path = SHIPPED
        _check_shipped()
    path = Path(path)
    remedy = "give a model.safetensors that `cifar_lib train` wrote"
    if not os.path.isfile(path):
        raise InputError(f"weights: expected a file, found none at {path}: {remedy}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        content = json.loads(metadata["cifar_lib"])
        shape, info = content["model"], content["info"]
        model = ResNet(shape["blocks"], shape["channels"], shape["num_classes"])
        if shape["num_classes"] != len(CLASSES):
            raise ValueError(f"it has {shape['num_classes']} classes, not {len(CLASSES)}")
        _check_info(info)
    except InputError:
        raise
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        reason = (
            f"no {error} in its metadata"
            if isinstance(error, KeyError)
            else str(error).splitlines()[0]
        )
        raise InputError(
            f"weights: {path} is no file of this package's weights ({reason}): {remedy}"
        ) from error
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    wrong = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    if wrong:
        name = wrong[0]
        raise InputError(
            f"weights: {path} holds another architecture: {name} should be {expected.get(name, 'absent')} and is "
            f"{found.get(name, 'absent')} ({len(wrong)} tensors differ): {remedy}"
        )
    model.load_state_dict(tensors)
    return model.eval(), info
