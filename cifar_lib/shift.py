"""Domain shift: adapting to it without labels."""

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cifar_lib.data import CLASSES, Channels, channel_statistics
from cifar_lib.errors import InputError
from cifar_lib.evaluate import batches, predict
from cifar_lib.hardware import computing

ADAPTATIONS = ("none", "normalize", "batchnorm", "normalize+batchnorm")
PRIOR = 16  # images that the training statistics count for: Schneider et al. found 8 to 32 best
BALANCED = "normalize+batchnorm"  # where classes are about equally frequent: verdict.json chose it
UNBALANCED = "none"  # where they are not: batch-norm statistics would carry the class mix
# How far from equal the predicted class shares of n images may be, as `imbalance` counts it. Equal
# classes, drawn n times, deviate by 5 sqrt(2 * 0.1 * 0.9 / (pi n)) = 1.2 / sqrt(n) on average; the
# margin leaves room for the classes that a strong shift favours.
CHANCE, MARGIN = 1.2, 0.05
# Confidence that adapting may cost. On the unbalanced files of 300 images by which it was chosen
# (results/shift/class_balance.csv, "choose"), it costs 0.037 to 0.410 where adapting loses
# accuracy, and at most 0.018 where it gains, but for two files: 0.073 for half cats, pixelated,
# and 0.133 for ships with noise, where adapting gains one image.
DOUBT = 0.03
STATISTICS_BATCH = 250  # images; the variance between batches is not in the statistics


@torch.no_grad()
def adapt(
    method: str,
    model: nn.Module,
    images: Tensor,
    mean: Channels,
    std: Channels,
    precision: str = "fp32",
) -> tuple[nn.Module, Channels, Channels]:
    """The network, mean and std to predict unlabelled uint8 `images` (N, 3, 32, 32) with.

    none: as they come. normalize: the images' own channel statistics, as the report does.
    batchnorm: a copy of the network with batch-norm statistics of these images, mixed with the
    training ones (Schneider et al. 2020, arXiv:2006.16971; Li et al. 2016, arXiv:1603.04779).
    All but `none` look at the whole set at once. InputError for another, or a constant channel.
    """
    if method not in ADAPTATIONS:
        raise InputError(f"adapt: expected one of {', '.join(ADAPTATIONS)}; got {method!r}")
    if "normalize" in method:
        own_mean, own_std = channel_statistics(images)
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


class Adapted(NamedTuple):
    """Logits float32 (N, 10), the adaptation that made them, and why it was taken, in one line."""

    logits: Tensor
    method: str
    why: str


def predict_adapted(
    model: nn.Module,
    images: Tensor,
    mean: Channels,
    std: Channels,
    precision: str = "fp32",
    tta: str = "none",
) -> Adapted:
    """Predict unlabelled uint8 `images` (N, 3, 32, 32), adapted unless their class mix forbids it.

    Statistics of a file carry its class mix as well as its shift: on 300 images of one class,
    batch norm removes what makes them that class. So the predictions are looked at. Where the
    adapted classes are far from equally frequent, the unadapted network predicts too, and the one
    that is more confident is taken: a class mix lowers the confidence of the adapted network, a
    strong shift that of the other one. The unadapted classes alone can't tell: a strong shift, too,
    makes one class of nearly all images. Raises InputError if a channel is constant.
    """
    network, own_mean, own_std = adapt(BALANCED, model, images, mean, std, precision)
    adapted = predict(network, images, own_mean, own_std, precision, tta)
    found, allowed = imbalance(adapted.argmax(1)), allowed_imbalance(len(images))
    if found <= allowed:
        return Adapted(adapted, BALANCED, "the predicted classes are balanced")
    unadapted = predict(model, images, mean, std, precision, tta)
    sure, adapted_sure = confidence(unadapted), confidence(adapted)
    mix = f"classes are unbalanced (predictions {found:.2f} from equal, {allowed:.2f} allowed)"
    if keeps_adapted(found, len(images), sure, adapted_sure):
        why = f"{mix}, but adapting doesn't lower the confidence ({sure:.1%} to {adapted_sure:.1%})"
        return Adapted(adapted, BALANCED, why)
    why = f"{mix} and adapting lowers the confidence ({sure:.1%} to {adapted_sure:.1%})"
    return Adapted(unadapted, UNBALANCED, why)


def keeps_adapted(found: float, n: int, confidence: float, adapted_confidence: float) -> bool:
    """Whether predictions of n images stay adapted: their classes are about equally frequent, by
    the imbalance `found`, or adapting costs no confidence, as on a strong shift."""
    return found <= allowed_imbalance(n) or adapted_confidence >= confidence - DOUBT


def allowed_imbalance(n: int) -> float:
    """The imbalance of n predicted classes that chance and a strong shift may make."""
    return MARGIN + CHANCE / math.sqrt(n)


def imbalance(labels: Tensor) -> float:
    """How far the classes of int64 (N,) are from equally frequent: the total variation distance of
    their shares, the part of the images that would have to change class; 0 to 0.9."""
    shares = labels.bincount(minlength=len(CLASSES)) / len(labels)
    return (shares - 1 / len(CLASSES)).abs().sum().item() / 2


def confidence(logits: Tensor) -> float:
    """The mean over the images of the likeliest class's probability, of logits (N, 10)."""
    return logits.softmax(1).amax(1).mean().item()


@torch.no_grad()
def rebase_batch_norm(
    model: nn.Module, images: Tensor, mean: Channels, std: Channels, precision: str = "fp32"
) -> nn.Module:
    """A copy that computes the same, its batch norms written around these uint8 images' statistics.

    Training leaves those of augmented images, from which others deviate as the weights expect.
    `adapt` would take that away with the shift; rebased on plain ones, only the shift is left.
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
