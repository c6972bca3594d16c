"""Domain shift: adapting a network to images that differ from its training images, without labels.

A file of images to predict may differ in two ways. Its pixels may be shifted: darker, noisier,
blurred. Its class mix may also differ: half of the images may be cats. Adapting removes a shift,
but mistakes a different class mix for a shift. `predict_adapted` uses the predictions to tell the
two apart.
"""

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cifar_lib.data import CLASSES, Normalization
from cifar_lib.evaluate import batches, predict
from cifar_lib.hardware import computing

ADAPTATIONS = ("none", "normalize", "batchnorm", "normalize+batchnorm")
PRIOR = 16  # the training statistics count as this many images; Schneider et al. found 8 to 32 best
# The adaptation if the classes are about equally frequent, chosen in results/shift/verdict.json.
BALANCED = "normalize+batchnorm"
# The adaptation if they aren't: the images' own statistics would reflect the class mix.
UNBALANCED = "none"
# The allowed `imbalance` of the classes that are predicted for n images is
# CHANCE_IMBALANCE / sqrt(n) + SHIFT_MARGIN.
# If n images are drawn from equally frequent classes, their imbalance is
# 5 sqrt(2 * 0.1 * 0.9 / (pi n)) = 1.2 / sqrt(n) on average. The margin is for the
# variation around this average, and for a strong shift, which makes the network favour some
# classes.
CHANCE_IMBALANCE = 1.2
SHIFT_MARGIN = 0.05
# How much mean confidence adapting may cost. The value was chosen on unbalanced files of 300 images
# ("choose" in results/shift/class_balance.csv). If adapting loses accuracy there, it costs 0.037 to
# 0.410 of confidence. If it gains accuracy, it costs at most 0.018, except on two files: 0.073 on
# pixelated images of which half are cats, and 0.133 on ships with noise, where it gains one image.
MAX_CONFIDENCE_LOSS = 0.03
# If the `agreement` of the adapted and the unadapted network is at least this value, they see the
# same class mix. On the unbalanced files above, it is 0.59 or more if adapting loses accuracy. On
# balanced images with the strongest pixelation it is below 0, and adapting gains about 20 points of
# accuracy, although it costs confidence (tests/test_shift.py).
MIN_AGREEMENT = 0.5
# Images per batch when batch-norm statistics are measured. The measured variance is the average of
# the variances within the batches, and doesn't include the variance between batches.
STATISTICS_BATCH = 250


@torch.no_grad()
def adapt(
    method: str,
    model: nn.Module,
    images: Tensor,
    normalization: Normalization,
    precision: str = "fp32",
) -> tuple[nn.Module, Normalization]:
    """Return a network and a normalization, adapted to unlabelled images, for predicting them.

    images: uint8 (N, 3, 32, 32), all images of a set: adapting uses their statistics.

    method:
    none changes nothing.
    normalize returns the normalization with the images' own channel statistics, as in the report.
    batchnorm returns a copy of the network, whose batch norms have the statistics of these images
    mixed with those of training (Schneider et al. 2020, arXiv:2006.16971; Li et al. 2016,
    arXiv:1603.04779).
    normalize+batchnorm does both.

    Raises InputError if the images' own channel statistics are needed and a channel is constant.
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
    """Return a copy of `model` whose batch norms have these images' statistics, mixed with its own.

    images: uint8 (N, 3, 32, 32).
    """
    adapted = copy.deepcopy(model).eval()

    # Forget the training statistics, and measure those of these images. A batch norm in training
    # mode measures them while the images pass through it.
    for layer in _batch_norms(adapted):
        layer.reset_running_stats()
        layer.momentum = None  # the plain average over all batches
        layer.train()
    _forward(adapted, images, normalization, precision)

    # Mix the training statistics in, as if they came from PRIOR more images.
    share = PRIOR / (PRIOR + len(images))
    for layer, trained in zip(_batch_norms(adapted), _batch_norms(model), strict=True):
        layer.running_mean.lerp_(trained.running_mean, share)
        layer.running_var.lerp_(trained.running_var, share)
        layer.eval()
    return adapted


class Adapted(NamedTuple):
    """The result of `predict_adapted`: the logits, and which adaptation was used and why."""

    logits: Tensor  # float32 (N, 10), on the CPU
    method: str  # BALANCED or UNBALANCED
    why: str  # in one line


def predict_adapted(
    model: nn.Module,
    images: Tensor,
    normalization: Normalization,
    precision: str = "fp32",
    tta: str = "none",
) -> Adapted:
    """Predict unlabelled images, uint8 (N, 3, 32, 32), adapted unless their class mix forbids it.

    The statistics of a file depend on its class mix as well as on its shift. On 300 images of one
    class, for example, an adapted batch norm removes what distinguishes that class from others.
    Therefore the predictions decide. If the adapted network predicts classes that are far from
    equally frequent, the unadapted one predicts too, and `is_misled` chooses between the two.

    Raises InputError if a channel is constant.
    """
    # Predict with the adapted network. If its classes are balanced, that is the answer.
    adapted_model, own_normalization = adapt(BALANCED, model, images, normalization, precision)
    adapted_logits = predict(adapted_model, images, own_normalization, precision, tta)
    counts = class_counts(adapted_logits)
    if is_balanced(counts):
        return Adapted(adapted_logits, BALANCED, "the predicted classes are balanced")

    # They aren't balanced, because of the file's class mix or of a strong shift. Predict without
    # adapting, to compare.
    unadapted_logits = predict(model, images, normalization, precision, tta)
    unadapted_counts = class_counts(unadapted_logits)
    before, after = confidence(unadapted_logits), confidence(adapted_logits)
    allowed = allowed_imbalance(len(images))

    # Choose, and say why.
    distance = f"{imbalance(counts):.2f} from equal, {allowed:.2f} allowed"
    why = f"the predicted classes are unbalanced ({distance})"
    if is_misled(counts, unadapted_counts, before - after):
        why = f"{why}, and adapting lowers the confidence ({before:.1%} to {after:.1%})"
        return Adapted(unadapted_logits, UNBALANCED, why)
    if agreement(counts, unadapted_counts) < MIN_AGREEMENT:
        why = f"{why}, but very different without adapting, which points to a strong shift"
    else:
        why = f"{why}, but adapting hardly lowers the confidence ({before:.1%} to {after:.1%})"
    return Adapted(adapted_logits, BALANCED, why)


def is_misled(counts: Tensor, unadapted_counts: Tensor, confidence_lost: float) -> bool:
    """Return whether adapting to a file has removed its class mix, and not a shift.

    counts: int64 (10,), how many images the adapted network assigns to each class.
    unadapted_counts: int64 (10,), how many images the unadapted network assigns to each class.
    confidence_lost: by how much adapting lowers the mean confidence.

    If the file's class mix isn't balanced, both networks predict a similar mix, and adapting costs
    confidence. If there is a strong shift, adapting costs little confidence or none, or the
    unadapted network predicts a quite different mix.
    """
    networks_agree = agreement(counts, unadapted_counts) >= MIN_AGREEMENT
    return not is_balanced(counts) and networks_agree and confidence_lost > MAX_CONFIDENCE_LOSS


def is_balanced(counts: Tensor) -> bool:
    """Return whether the imbalance of class counts, int64 (10,), is at most the allowed one."""
    return imbalance(counts) <= allowed_imbalance(int(counts.sum()))


def allowed_imbalance(n: int) -> float:
    """Return the imbalance that chance and a strong shift may cause if n images are predicted."""
    return SHIFT_MARGIN + CHANCE_IMBALANCE / math.sqrt(n)


def imbalance(counts: Tensor) -> float:
    """Return how far class counts, int64 (10,), are from equal.

    It is the fraction of the images that would have to change class to make the counts equal (the
    total variation distance from equal shares): 0 if they are equal, 0.9 if only one class occurs.
    """
    shares = counts / counts.sum()  # (10,)
    return (shares - 1 / len(CLASSES)).abs().sum().item() / 2


def agreement(counts: Tensor, others: Tensor) -> float:
    """Return the correlation of two networks' class counts, int64 (10,) each.

    It is from -1 to 1, and 0 if the counts of one network are all equal.
    """
    correlation = torch.corrcoef(torch.stack([counts, others]).double())[0, 1]
    return correlation.nan_to_num(0).item()


def class_counts(logits: Tensor) -> Tensor:
    """Count how many of N images are assigned to each class: logits (N, 10) -> int64 (10,)."""
    return logits.argmax(1).bincount(minlength=len(CLASSES))


def confidence(logits: Tensor) -> float:
    """Return the mean confidence: the likeliest class's probability, averaged over logits (N, 10).

    Here the logits aren't divided by a temperature.
    """
    return logits.softmax(1).amax(1).mean().item()


@torch.no_grad()
def rebase_batch_norm(
    model: nn.Module, images: Tensor, normalization: Normalization, precision: str = "fp32"
) -> nn.Module:
    """Return a copy of `model` that gives the same logits with other batch-norm statistics.

    images: uint8 (N, 3, 32, 32), training images without augmentation. The copy's batch norms have
    the statistics of these images.

    Training leaves the statistics of augmented images. Plain images deviate from them even without
    a shift, and the weights classify them well with this deviation. If `adapt` got such a model, it
    would remove the deviation together with the shift. From the statistics of plain images, other
    images deviate only by their shift.
    """
    model = copy.deepcopy(model).eval()

    # Measure the variance and the mean of each batch norm's input, (b, channels, H, W), in each
    # batch.
    moments: dict[nn.Module, list[Tensor]] = {layer: [] for layer in _batch_norms(model)}

    def measure(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        variance_and_mean = torch.var_mean(inputs[0].float(), (0, 2, 3))  # (channels,) each
        moments[layer].append(torch.stack(variance_and_mean))  # (2, channels)

    hooks = [layer.register_forward_pre_hook(measure) for layer in moments]
    _forward(model, images, normalization, precision)
    for hook in hooks:
        hook.remove()

    # Replace the statistics. A batch norm computes scale * (x - mean) + bias, so a new bias and a
    # new weight keep its result the same.
    for layer, measured in moments.items():
        variance, mean = torch.stack(measured).mean(0)  # (channels,) each
        scale = layer.weight / (layer.running_var + layer.eps).sqrt()  # (channels,)
        layer.bias += scale * (mean - layer.running_mean)
        layer.weight.copy_(scale * (variance + layer.eps).sqrt())
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
    return model


def _batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    """Return the model's batch norms, from the first to the last."""
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def _forward(
    model: nn.Module, images: Tensor, normalization: Normalization, precision: str
) -> None:
    """Run the model on all images, uint8 (N, 3, 32, 32), only so that its layers can measure."""
    for inputs in batches(model, images, normalization, STATISTICS_BATCH):
        with computing(inputs.device, precision):
            model(inputs)
