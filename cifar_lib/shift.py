"""Domain shift: make it with known labels, measure it without labels, adapt to it."""

import copy

import numpy as np
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as kernels

from cifar_lib import data
from cifar_lib.errors import InputError
from cifar_lib.evaluate import Channels, batches
from cifar_lib.hardware import computing

SEVERITIES = (1, 2, 3, 4, 5)
ADAPTATIONS = ("none", "normalize", "batchnorm", "normalize+batchnorm")
PRIOR = 16  # images that the training statistics count for: Schneider et al. found 8 to 32 best
STATISTICS_BATCH = 250  # images; the variance between batches is not in the statistics


def _statistics(images: Tensor, distance: int) -> Tensor:
    """`distance` times as far from CIFAR-10's statistics as the published run's custom set is."""
    mean = np.add(data.CIFAR10_MEAN, distance * np.subtract(data.KAGGLE_MEAN, data.CIFAR10_MEAN))
    std = np.add(data.CIFAR10_STD, distance * np.subtract(data.KAGGLE_STD, data.CIFAR10_STD))
    return match_statistics(images, mean, std)


def _noise(images: Tensor, sigma: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    moved = images + (255 * sigma * noise).to(images.device)
    return moved.round().clamp(0, 255).to(torch.uint8)


def _pixelate(images: Tensor, side: int) -> Tensor:
    small = kernels.resize(images, [side, side], kernels.InterpolationMode.BILINEAR, antialias=True)
    return kernels.resize(small, [32, 32], kernels.InterpolationMode.NEAREST_EXACT)


# Each family's amounts at severities 1 to 5. Those of contrast, noise, blur and JPEG are
# CIFAR-10-C's (Hendrycks and Dietterich 2019, arXiv:1903.12261); brightness goes towards dark,
# saturation towards grey.
FAMILIES = {
    "statistics": (_statistics, (1, 2, 3, 4, 5)),  # 1: a synthetic copy of the published custom set
    "brightness": (kernels.adjust_brightness, (0.85, 0.7, 0.55, 0.4, 0.25)),
    "contrast": (kernels.adjust_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "saturation": (kernels.adjust_saturation, (0.8, 0.6, 0.4, 0.2, 0.0)),
    "noise": (_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "blur": (
        lambda images, sigma: kernels.gaussian_blur(images, 7, sigma),
        (0.4, 0.6, 0.7, 0.8, 1.0),
    ),
    "jpeg": (
        lambda images, quality: kernels.jpeg(images.cpu(), quality).to(images.device),
        (80, 65, 58, 50, 40),
    ),
    "pixelate": (_pixelate, (24, 20, 16, 12, 8)),
}


def shifted(images: Tensor, family: str, severity: int) -> Tensor:
    """`images` uint8 (N, 3, 32, 32) as another source might have given them, always the same."""
    change, amounts = FAMILIES[family]
    return change(images, amounts[SEVERITIES.index(severity)])


def match_statistics(images: Tensor, mean: Channels, std: Channels) -> Tensor:
    """A gain and an offset per channel that give the whole set this mean and std, in [0, 1]; uint8
    -> uint8.

    Values are cut off at 0 and 255, which moves the statistics again, so gain and offset are
    corrected up to 20 times. Raises InputError where a channel is constant: no gain spreads it.
    """
    mean, std = np.asarray(mean), np.asarray(std)
    start_mean, start_std = data.channel_statistics(images)
    if min(start_std) == 0:
        raise InputError("shift: a channel of these images is constant: give images with contrast")
    counts = data.channel_histogram(images).numpy()
    gain = std / start_std
    offset = mean - gain * start_mean
    for _ in range(20):
        table = np.arange(256) * gain[:, None] + 255 * offset[:, None]
        table = table.round().clip(0, 255)  # (3, 256): what each value becomes
        now_mean = np.average(table, 1, counts) / 255
        now_std = np.sqrt(np.average(table**2, 1, counts) / 255**2 - now_mean**2)
        if max(np.abs(now_mean - mean).max(), np.abs(now_std - std).max()) < 5e-5:
            break
        gain *= std / now_std
        offset += mean - now_mean - (std / now_std - 1) * start_mean * gain
    table = torch.from_numpy(table.astype(np.uint8)).to(images.device)
    return torch.stack([table[c][images[:, c].long()] for c in range(3)], dim=1)


def channel_distance(images: Tensor, others: Tensor) -> np.ndarray:
    """Wasserstein distance between the pixel values of two sets, a channel at a time, in [0, 1]:
    float64 (3,)."""
    values = np.arange(256) / 255
    ours, theirs = (data.channel_histogram(part).numpy() for part in (images, others))
    return np.array([wasserstein_distance(values, values, ours[c], theirs[c]) for c in range(3)])


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """Fréchet distance of two normal distributions fitted to features (N, D) and (M, D) (Heusel et
    al. 2017, arXiv:1706.08500): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    With N or M below D + 1 it is too large: compare only sets of equal sizes.
    """
    a, b = features.double().cpu(), others.double().cpu()
    c1, c2 = a.T.cov(), b.T.cov()
    # C1 C2 has eigenvalues of 0 or more, but for rounding, which may make them negative or complex.
    cross = torch.linalg.eigvals(c1 @ c2).sqrt().real.sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * cross
    return distance.item()


@torch.no_grad()
def adapt(
    method: str,
    model: nn.Module,
    images: Tensor,
    mean: Channels,
    std: Channels,
    precision: str = "fp32",
) -> tuple[nn.Module, Channels, Channels]:
    """The network, mean and standard deviation to predict unlabelled uint8 `images` (N, 3, 32, 32)
    with.

    none: as they come. normalize: the images' own channel statistics, as the report does.
    batchnorm: a copy of the network with batch-norm statistics of these images, mixed with the
    training ones (Schneider et al. 2020, arXiv:2006.16971; Li et al. 2016, arXiv:1603.04779).
    All but `none` look at the whole set at once: transductive. Raises InputError for another
    method, and where these images have no statistics of their own.
    """
    if method not in ADAPTATIONS:
        raise InputError(f"adapt: expected one of {', '.join(ADAPTATIONS)}; got {method!r}")
    if "normalize" in method:
        own_mean, own_std = data.channel_statistics(images)
        if min(own_std) == 0:
            raise InputError("adapt: a channel of these images is constant: use --adapt none")
        mean, std = tuple(own_mean.tolist()), tuple(own_std.tolist())
    if "batchnorm" in method:
        trained, model = _batch_norms(model), copy.deepcopy(model).eval()
        for layer in _batch_norms(model):
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over batches
            layer.train()
        _forward(model, images, mean, std, precision)
        for layer, old in zip(_batch_norms(model), trained, strict=True):
            share = PRIOR / (PRIOR + len(images))
            layer.running_mean.lerp_(old.running_mean, share)
            layer.running_var.lerp_(old.running_var, share)
            layer.eval()
    return model, mean, std


@torch.no_grad()
def rebase_batch_norm(
    model: nn.Module, images: Tensor, mean: Channels, std: Channels, precision: str = "fp32"
) -> nn.Module:
    """A copy that computes the same, each batch-norm layer written around the statistics of these
    uint8 images.

    Training leaves those of augmented images, from which others deviate (no erased boxes, no
    padding), as the weights expect. `adapt` would take that deviation away with the shift; after
    rebasing on training images without augmentation only the shift is left.
    """
    model = copy.deepcopy(model).eval()
    moments: dict[nn.Module, list[Tensor]] = {layer: [] for layer in _batch_norms(model)}

    def measure(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        moments[layer].append(torch.stack(torch.var_mean(inputs[0].float(), (0, 2, 3))))

    hooks = [layer.register_forward_pre_hook(measure) for layer in moments]
    _forward(model, images, mean, std, precision)
    for layer, hook in zip(moments, hooks, strict=True):
        hook.remove()
        variance, centre = torch.stack(moments[layer]).mean(0)
        scale = layer.weight / (layer.running_var + layer.eps).sqrt()
        layer.bias += scale * (centre - layer.running_mean)
        layer.weight.copy_(scale * (variance + layer.eps).sqrt())
        layer.running_mean.copy_(centre)
        layer.running_var.copy_(variance)
    return model


def _batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def _forward(
    model: nn.Module, images: Tensor, mean: Channels, std: Channels, precision: str
) -> None:
    for inputs in batches(model, images, mean, std, STATISTICS_BATCH):
        with computing(inputs.device, precision):
            model(inputs)
