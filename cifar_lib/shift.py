"""Domain shift: adapting a network to images of another kind, without their labels."""

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cifar_lib.data import CLASSES, Normalization
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
# How alike the two networks' class counts must be, as `agreement` counts it: a class mix shows in
# both. "choose" files of 300 images on which adapting loses accuracy have 0.59 and more. Balanced
# images with the strongest pixelation, on which adapting wins about 20 points in spite of its
# doubt, have less than 0 (tests/test_shift.py).
AGREEMENT = 0.5
STATISTICS_BATCH = 250  # images; the variance between batches is not in the statistics


@torch.no_grad()
def adapt(
    method: str,
    model: nn.Module,
    images: Tensor,
    normalization: Normalization,
    precision: str = "fp32",
) -> tuple[nn.Module, Normalization]:
    """Return the network and the normalization to predict unlabelled images with.

    images: uint8 (N, 3, 32, 32), the whole set, whose statistics every `method` but `none` uses.

    none: as they come.
    normalize: normalised by the images' own channel statistics, as the report does.
    batchnorm: a copy of the network whose batch norms have statistics of these images, mixed with
    the training ones (Schneider et al. 2020, arXiv:2006.16971; Li et al. 2016, arXiv:1603.04779).

    Raises InputError if a channel is constant and the images are to be normalised by their own.
    """
    assert method in ADAPTATIONS, method
    if "normalize" in method:
        normalization = Normalization.of(images)
    if "batchnorm" in method:
        model = _with_statistics_of(images, model, normalization, precision)
    return model, normalization


def _with_statistics_of(
    images: Tensor, model: nn.Module, normalization: Normalization, precision: str
) -> nn.Module:
    """A copy whose batch norms have mixed these images' statistics into the training ones."""
    adapted = copy.deepcopy(model).eval()

    # Forget the training statistics, and gather those of these images.
    for layer in _batch_norms(adapted):
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over batches
        layer.train()
    _forward(adapted, images, normalization, precision)

    # Mix the training ones in, as if they were of PRIOR more images.
    share = PRIOR / (PRIOR + len(images))
    for layer, trained in zip(_batch_norms(adapted), _batch_norms(model), strict=True):
        layer.running_mean.lerp_(trained.running_mean, share)
        layer.running_var.lerp_(trained.running_var, share)
        layer.eval()
    return adapted


class Adapted(NamedTuple):
    """Logits float32 (N, 10), the adaptation that made them, and why it was taken, in one line."""

    logits: Tensor
    method: str
    why: str


def predict_adapted(
    model: nn.Module,
    images: Tensor,
    normalization: Normalization,
    precision: str = "fp32",
    tta: str = "none",
) -> Adapted:
    """Predict unlabelled images, uint8 (N, 3, 32, 32), adapted unless their class mix forbids it.

    Statistics of a file carry its class mix as well as its shift: on 300 images of one class,
    batch norm removes what makes them that class. So the predictions are looked at. Where the
    adapted classes are far from equally frequent, the unadapted network predicts too, and
    `is_misled` decides between them.

    Raises InputError if a channel is constant.
    """
    # Adapt, and look at the classes that this predicts.
    network, own_normalization = adapt(BALANCED, model, images, normalization, precision)
    adapted = predict(network, images, own_normalization, precision, tta)
    counts = class_counts(adapted)
    if is_balanced(counts):
        return Adapted(adapted, BALANCED, "the predicted classes are balanced")

    # They are far from balanced: is that the file's classes, or a strong shift?
    unadapted = predict(model, images, normalization, precision, tta)
    unadapted_counts = class_counts(unadapted)
    sure, adapted_sure = confidence(unadapted), confidence(adapted)
    allowed = allowed_imbalance(len(images))
    why = f"classes are unbalanced ({imbalance(counts):.2f} from equal, {allowed:.2f} allowed)"
    if is_misled(counts, unadapted_counts, sure - adapted_sure):
        why = f"{why}, and adapting lowers the confidence ({sure:.1%} to {adapted_sure:.1%})"
        return Adapted(unadapted, UNBALANCED, why)
    if agreement(counts, unadapted_counts) < AGREEMENT:
        why = f"{why}, but without adapting they would be quite others, as on a strong shift"
    else:
        why = f"{why}, but adapting doesn't lower the confidence ({sure:.1%} to {adapted_sure:.1%})"
    return Adapted(adapted, BALANCED, why)


def is_misled(counts: Tensor, unadapted_counts: Tensor, confidence_lost: float) -> bool:
    """Whether the classes of a file, and not a shift, unbalance what an adapted network predicts.

    counts, unadapted_counts: int64 (10,), the images of each predicted class, with adapting and
    without.
    confidence_lost: by how much adapting lowers the mean confidence.

    A class mix shows without adapting too, and adapting to it costs confidence. A strong shift
    makes the unadapted network doubt, or see quite other classes.
    """
    both_see_it = agreement(counts, unadapted_counts) >= AGREEMENT
    return not is_balanced(counts) and both_see_it and confidence_lost > DOUBT


def is_balanced(counts: Tensor) -> bool:
    """Whether predictions, int64 (10,) per class, are as equal as chance makes them."""
    return imbalance(counts) <= allowed_imbalance(int(counts.sum()))


def allowed_imbalance(n: int) -> float:
    """The imbalance of n predicted classes that chance and a strong shift may make."""
    return MARGIN + CHANCE / math.sqrt(n)


def imbalance(counts: Tensor) -> float:
    """How far classes, int64 (10,), are from equally frequent, from 0 to 0.9.

    It is the total variation distance of their shares from equal ones: the part of the images that
    would have to change class.
    """
    shares = counts / counts.sum()
    return (shares - 1 / len(CLASSES)).abs().sum().item() / 2


def agreement(counts: Tensor, others: Tensor) -> float:
    """The correlation of two networks' class counts, int64 (10,) each, from -1 to 1."""
    return torch.corrcoef(torch.stack([counts, others]).double())[0, 1].item()


def class_counts(logits: Tensor) -> Tensor:
    """How many of N images are predicted to be of each class: logits (N, 10) -> int64 (10,)."""
    return logits.argmax(1).bincount(minlength=len(CLASSES))


def confidence(logits: Tensor) -> float:
    """The mean over the images of the likeliest class's probability, of logits (N, 10)."""
    return logits.softmax(1).amax(1).mean().item()


@torch.no_grad()
def rebase_batch_norm(
    model: nn.Module, images: Tensor, normalization: Normalization, precision: str = "fp32"
) -> nn.Module:
    """Return a copy that computes the same, with batch norms written around other statistics.

    images: uint8 (N, 3, 32, 32), plain training images, whose statistics they are.

    Training leaves statistics of augmented images, and weights that expect other images to deviate
    from them. `adapt` would take that deviation away together with the shift; around those of plain
    images only the shift is left.
    """
    model = copy.deepcopy(model).eval()

    # Measure the variance and mean of what comes into each batch norm, batch by batch.
    moments: dict[nn.Module, list[Tensor]] = {layer: [] for layer in _batch_norms(model)}

    def measure(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        moments[layer].append(torch.stack(torch.var_mean(inputs[0].float(), (0, 2, 3))))

    hooks = [layer.register_forward_pre_hook(measure) for layer in moments]
    _forward(model, images, normalization, precision)
    for hook in hooks:
        hook.remove()

    # Exchange the statistics, and undo the exchange in weight and bias.
    for layer, measured in moments.items():
        variance, mean = torch.stack(measured).mean(0)  # (channels,) each
        scale = layer.weight / (layer.running_var + layer.eps).sqrt()
        layer.bias += scale * (mean - layer.running_mean)
        layer.weight.copy_(scale * (variance + layer.eps).sqrt())
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
    return model


def _batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def _forward(
    model: nn.Module, images: Tensor, normalization: Normalization, precision: str
) -> None:
    """Let the model see all images, for what its layers measure."""
    for inputs in batches(model, images, normalization, STATISTICS_BATCH):
        with computing(inputs.device, precision):
            model(inputs)
