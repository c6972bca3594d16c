"""Domain shift: make it with known labels, measure it without labels, adapt to it."""

import copy
from collections.abc import Callable

import numpy as np
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as kernels

from cifar_lib.data import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    KAGGLE_MEAN,
    KAGGLE_STD,
    channel_histogram,
    channel_statistics,
)
from cifar_lib.errors import InputError
from cifar_lib.evaluate import batches
from cifar_lib.hardware import computing

SEVERITIES = (1, 2, 3, 4, 5)
ADAPTATIONS = ("none", "normalize", "batchnorm", "normalize+batchnorm")
PRIOR = 16  # images that the training statistics count for: Schneider et al. found 8 to 32 best
STATISTICS_BATCH = 250  # images; the variance between batches is not in the statistics


def _statistics(images: Tensor, severity: int, seed: int) -> Tensor:
    """`severity` times as far from CIFAR-10's statistics as the published run's custom set is."""
    target = [
        np.asarray(here) + severity * (np.asarray(there) - np.asarray(here))
        for here, there in ((CIFAR10_MEAN, KAGGLE_MEAN), (CIFAR10_STD, KAGGLE_STD))
    ]
    return match_statistics(images, *target)


def _noise(images: Tensor, severity: int, seed: int) -> Tensor:
    sigma = 255 * (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + (sigma * noise).to(images.device)).round().clamp(0, 255).to(torch.uint8)


def _jpeg(images: Tensor, severity: int, seed: int) -> Tensor:
    quality = (80, 65, 58, 50, 40)[severity - 1]
    return torch.stack([kernels.jpeg(image, quality) for image in images.cpu()]).to(images.device)


def _pixelate(images: Tensor, severity: int, seed: int) -> Tensor:
    side = (24, 20, 16, 12, 8)[severity - 1]
    small = kernels.resize(images, [side, side], kernels.InterpolationMode.BILINEAR, antialias=True)
    return kernels.resize(small, [32, 32], kernels.InterpolationMode.NEAREST_EXACT)


def _kernel(function: Callable, amounts: tuple[float, ...]) -> Callable[[Tensor, int, int], Tensor]:
    """A family that is one of torchvision's kernels at five amounts."""
    return lambda images, severity, seed: function(images, amounts[severity - 1])


# Five severities each. The amounts of contrast, noise, blur and JPEG are those of CIFAR-10-C
# (Hendrycks and Dietterich 2019, arXiv:1903.12261); brightness goes towards dark, saturation
# towards grey, pixelation down to 8x8.
FAMILIES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "statistics": _statistics,  # severity 1: a synthetic copy of the published custom set
    "brightness": _kernel(kernels.adjust_brightness, (0.85, 0.7, 0.55, 0.4, 0.25)),
    "contrast": _kernel(kernels.adjust_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "saturation": _kernel(kernels.adjust_saturation, (0.8, 0.6, 0.4, 0.2, 0.0)),
    "noise": _noise,
    "blur": _kernel(
        lambda images, sigma: kernels.gaussian_blur(images, [7, 7], [sigma]),
        (0.4, 0.6, 0.7, 0.8, 1.0),
    ),
    "jpeg": _jpeg,
    "pixelate": _pixelate,
}


def shifted(images: Tensor, family: str, severity: int, seed: int = 0) -> Tensor:
    """`images` uint8 (N, 3, 32, 32) as another source might have given them, deterministic by seed.

    Raises InputError for a family or severity that doesn't exist.
    """
    if family not in FAMILIES:
        raise InputError(f"shift: expected one of {', '.join(FAMILIES)}; got {family!r}")
    if severity not in SEVERITIES:
        raise InputError(f"severity: expected a whole number from 1 to 5, got {severity!r}")
    return FAMILIES[family](images, severity, seed)


def match_statistics(
    images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], rounds: int = 20
) -> Tensor:
    """A gain and an offset per channel that give the whole set this mean and std, in [0, 1]; uint8
    -> uint8.

    Values are cut off at 0 and 255, which moves the statistics again, so gain and offset are
    corrected a few times. Raises InputError where a channel is constant: no gain spreads it.
    """
    target_mean, target_std = np.asarray(mean), np.asarray(std)
    start_mean, start_std = channel_statistics(images)
    if min(start_std) == 0:
        raise InputError("shift: a channel of these images is constant: give images with contrast")
    gain = target_std / start_std
    offset = target_mean - gain * start_mean
    for _ in range(rounds):
        moved = _gain_offset(images, gain, offset)
        now_mean, now_std = channel_statistics(moved)
        if max(np.abs(now_mean - target_mean).max(), np.abs(now_std - target_std).max()) < 5e-5:
            break
        gain *= target_std / now_std
        offset += target_mean - now_mean - (target_std / now_std - 1) * start_mean * gain
    return moved


def _gain_offset(images: Tensor, gain: np.ndarray, offset: np.ndarray) -> Tensor:
    """round(255 (gain x / 255 + offset)), cut off at 0 and 255, by a table of the 256 values of
    each channel."""
    values = np.arange(256)[None] * gain[:, None] + 255 * offset[:, None]
    table = torch.from_numpy(values.round().clip(0, 255).astype(np.uint8))
    return torch.stack([table[c][images[:, c].long()] for c in range(3)], dim=1)


def channel_distance(images: Tensor, others: Tensor) -> np.ndarray:
    """Wasserstein distance between the pixel values of two sets, a channel at a time, in [0, 1]:
    float64 (3,)."""
    values = np.arange(256) / 255
    pairs = zip(channel_histogram(images).numpy(), channel_histogram(others).numpy(), strict=True)
    return np.array([scipy.stats.wasserstein_distance(values, values, a, b) for a, b in pairs])


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """Fréchet distance of two normal distributions fitted to features (N, D) and (M, D) (Heusel et
    al. 2017, arXiv:1706.08500): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    With N or M below D + 1 a covariance is singular and the distance too large; compare only sets
    of equal sizes.
    """
    (mean_a, cov_a), (mean_b, cov_b) = (
        (f.mean(0), np.cov(f, rowvar=False)) for f in map(_numpy, (features, others))
    )
    # tr (C1 C2)^(1/2): the eigenvalues of C1 C2 are those of the symmetric R C2 R with R =
    # C1^(1/2).
    values, vectors = scipy.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    product = scipy.linalg.eigvalsh(root @ cov_b @ root).clip(0)
    return float(
        ((mean_a - mean_b) ** 2).sum()
        + np.trace(cov_a)
        + np.trace(cov_b)
        - 2 * np.sqrt(product).sum()
    )


def _numpy(features: Tensor) -> np.ndarray:
    return features.double().cpu().numpy()


def adapt(
    method: str,
    model: nn.Module,
    images: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    precision: str = "fp32",
) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """The network, mean and standard deviation to predict unlabelled uint8 `images` (N, 3, 32, 32)
    with.

    none: as they come. normalize: the images' own channel statistics, as the report does.
    batchnorm: a copy of the network with batch-norm statistics of these images, mixed with the
    training ones (Schneider et al. 2020, arXiv:2006.16971; Li et al. 2016, arXiv:1603.04779);
    rebased weights, as `fit` writes them, lose nothing by it where there is no shift. All but
    `none` look at the whole set at once: transductive. Raises InputError for another method, and
    where these images have no statistics of their own.
    """
    if method not in ADAPTATIONS:
        raise InputError(f"adapt: expected one of {', '.join(ADAPTATIONS)}; got {method!r}")
    if "normalize" in method:
        own_mean, own_std = channel_statistics(images)
        if min(own_std) == 0:
            raise InputError(
                "adapt: normalize can't divide by 0, a channel of these images is constant: "
                "use --adapt none"
            )
        mean, std = tuple(own_mean.tolist()), tuple(own_std.tolist())
    if "batchnorm" in method:
        model = _with_batch_statistics(model, images, mean, std, precision)
    return model, mean, std


@torch.no_grad()
def rebase_batch_norm(
    model: nn.Module,
    images: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    precision: str = "fp32",
) -> nn.Module:
    """A copy that computes the same, each batch-norm layer written around the statistics of these
    uint8 images.

    Training leaves the statistics of augmented images, from which images as they come (no erased
    boxes, no padding) deviate, and the weights expect them to. Exchanging them for a new set's own,
    as `adapt` does, would take that deviation away with the shift. After rebasing on training
    images without augmentation only the shift is left.
    """
    model = copy.deepcopy(model).eval()
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    moments: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}

    def measure(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        moments[layer].append(torch.stack(torch.var_mean(inputs[0].float(), (0, 2, 3))))

    hooks = [layer.register_forward_pre_hook(measure) for layer in layers]
    for inputs in batches(model, images, mean, std, STATISTICS_BATCH):
        with computing(inputs.device, precision):
            model(inputs)
    for hook in hooks:
        hook.remove()
    for layer in layers:
        variance, centre = torch.stack(moments[layer]).mean(0)
        scale = layer.weight / (layer.running_var + layer.eps).sqrt()
        layer.bias += scale * (centre - layer.running_mean)
        layer.weight.copy_(scale * (variance + layer.eps).sqrt())
        layer.running_mean.copy_(centre)
        layer.running_var.copy_(variance)
    return model


@torch.no_grad()
def _with_batch_statistics(
    model: nn.Module,
    images: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    precision: str,
) -> nn.Module:
    """A copy whose statistics are (PRIOR training + N own) / (PRIOR + N); own: the mean over
    batches of equal size."""
    n = len(images)
    if n < 2:
        raise InputError(
            f"adapt: batchnorm takes its statistics from the images themselves, and {n} can't tell "
            "the set's from the image's: give at least 2, better hundreds, or use --adapt none"
        )
    model = copy.deepcopy(model)
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    trained = [(layer.running_mean.clone(), layer.running_var.clone()) for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    for i, inputs in enumerate(batches(model, images, mean, std, STATISTICS_BATCH)):
        for layer in layers:
            layer.momentum = 1 / (i + 1)  # the plain mean over batches
        with computing(inputs.device, precision):
            model(inputs)
    weight = n / (PRIOR + n)
    for layer, (old_mean, old_var) in zip(layers, trained, strict=True):
        layer.running_mean.lerp_(old_mean, 1 - weight)
        layer.running_var.lerp_(old_var, 1 - weight)
    return model.eval()
