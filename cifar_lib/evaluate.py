"""Prediction, from images to logits, and measurement, from logits to numbers."""

import copy
import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from sklearn import metrics
from torch import Tensor, nn

from cifar_lib.data import CLASSES, Normalization
from cifar_lib.hardware import computing
from cifar_lib.model import ResNet

# Test-time augmentation, and how many views of each image it predicts from: only the image, or the
# image and its mirror image.
TTA = {"none": 1, "flip": 2}


# From images to logits.


def predict(
    model: nn.Module,
    images: Tensor,
    normalization: Normalization,
    precision: str = "fp32",
    tta: str = "none",
) -> Tensor:
    """Return the logits of images, averaged over the views of `tta`.

    images: uint8 (N, 3, 32, 32). Returns float32 (N, 10) on the CPU.

    precision: fp32, bf16 or fp16; `hardware.choose_precision` resolves "auto".
    tta: one of TTA's names.

    The model runs in evaluation mode, on the device that holds its weights. Afterwards it has the
    mode that it had before.
    """
    return predict_views(model, images, normalization, precision, tta).mean(0)


@torch.no_grad()
def predict_views(
    model: nn.Module,
    images: Tensor,
    normalization: Normalization,
    precision: str = "fp32",
    tta: str = "flip",
) -> Tensor:
    """Return the logits of each view separately: float32 (views, N, 10) on the CPU.

    The first view is the unchanged image. With `flip`, the logits of the first view are therefore
    what `predict` gives for `none`, and the mean over both views is what it gives for `flip`.
    """
    was_training = model.training
    model.eval()
    logits = []  # of each batch: (views, b, 10)
    on_cpu = next(model.parameters()).device.type == "cpu"
    size = 400 if on_cpu else 1000  # images at once: a matter of speed and memory
    for inputs in batches(model, images, normalization, size):
        views = [inputs]  # (b, 3, 32, 32) each
        if TTA[tta] == 2:
            views.append(inputs.flip(3))
        with computing(inputs.device, precision):
            logits.append(torch.stack([model(view).float() for view in views]).cpu())
    model.train(was_training)
    return torch.cat(logits, dim=1)


def batches(
    model: nn.Module, images: Tensor, normalization: Normalization, size: int
) -> Iterator[Tensor]:
    """Yield normalised batches of uint8 images, float32 (b, 3, 32, 32), on the weights' device.

    A batch has at most `size` images. All batches have nearly the same size, even the last one.
    """
    device = next(model.parameters()).device
    for piece in images.tensor_split(max(math.ceil(len(images) / size), 1)):
        yield normalization(piece.to(device))


def features(
    model: ResNet, images: Tensor, normalization: Normalization, precision: str = "fp32"
) -> Tensor:
    """Return what the linear layer sees: float32 (N, channels of the last stage) on the CPU.

    These are the last stage's channels, each averaged over the image.
    """
    headless = copy.deepcopy(model)
    headless.linear = nn.Identity()
    return predict(headless, images, normalization, precision)


# From logits to numbers.


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the fraction of images whose largest logit is that of their label."""
    return (logits.argmax(1) == labels.cpu()).float().mean(dtype=torch.float64).item()


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval, given that `correct` of n images are classified correctly.

    It is an interval for the accuracy over all images of this kind. The accuracy on another n of
    them varies by chance as well: only 83 % of such accuracies fall into a 95 % interval.
    """
    interval = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(
    is_correct: Tensor | np.ndarray, reference: Tensor | np.ndarray
) -> tuple[int, int, float]:
    """Compare a classifier with a reference on the same images with McNemar's exact test.

    is_correct: bool (N,), whether the classifier is correct on each image.
    reference: bool (N,), whether the reference is.

    Returns how many images only the classifier gets right, how many only the reference gets right,
    and the p-value.
    """
    gained = int((is_correct & ~reference).sum())
    lost = int((reference & ~is_correct).sum())
    # If they never differ, there is nothing to test.
    p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return gained, lost, p_value


def confusion_matrix(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Count the images of each true class (row) and predicted class (column): int64 (10, 10)."""
    return metrics.confusion_matrix(labels.cpu(), logits.argmax(1), labels=range(len(CLASSES)))


def per_class(matrix: np.ndarray) -> dict[str, dict[str, float]]:
    """Return each class's precision, recall, F1 (0 where undefined) and number of images.

    `matrix` is a confusion matrix (10, 10).
    """
    hits, true, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)  # (10,) each
    table = pd.DataFrame(index=CLASSES)
    table["precision"] = hits / np.maximum(predicted, 1)
    table["recall"] = hits / np.maximum(true, 1)
    table["f1"] = 2 * hits / np.maximum(true + predicted, 1)
    table["images"] = true
    return table.to_dict("index")


def most_confident_mistakes(
    logits: Tensor, labels: Tensor, true: int | None = None, predicted: int | None = None
) -> Tensor:
    """Return the positions of the misclassified images, int64, the most confident first.

    `true` and `predicted` are class numbers. If `true` is given, only images with that label are
    returned; if `predicted` is given, only images that are misclassified as that class.
    """
    confidence, guess = logits.softmax(1).max(1)  # (N,) each
    labels = labels.cpu()
    is_mistake = guess != labels
    if true is not None:
        is_mistake &= labels == true
    if predicted is not None:
        is_mistake &= guess == predicted

    # Sort all positions, and keep those of the mistakes.
    order = confidence.argsort(descending=True, stable=True)  # (N,)
    return order[is_mistake[order]]


def reliability(logits: Tensor, labels: Tensor, bins: int = 15) -> dict[str, np.ndarray]:
    """Compare confidence with accuracy in bins of confidence.

    The bins have equal width. Each contains its upper edge, and not its lower one.

    Returns four arrays: the `edges` (bins + 1,), and for each bin the `count` of its images, their
    mean `confidence` and their `accuracy`, (bins,) each. The last two are nan in an empty bin.
    """
    confidence, guess = (t.double().numpy() for t in logits.softmax(1).max(1))  # (N,) each
    is_correct = guess == labels.cpu().numpy()

    # Which bin each image is in. A confidence may be rounded to a little more than 1; `clip` puts
    # it into the last bin.
    edges = np.linspace(0, 1, bins + 1)
    which = np.searchsorted(edges[1:], confidence).clip(max=bins - 1)  # (N,)

    # With weights as its second argument, bincount gives the sum of the weights in each bin.
    count = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin
        means = [np.bincount(which, values, bins) / count for values in (confidence, is_correct)]
    return {"edges": edges, "count": count, "confidence": means[0], "accuracy": means[1]}


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Return the expected calibration error.

    It is the average of |accuracy - confidence| over the bins of `reliability`, each bin weighted
    by its number of images.

    Source: Guo et al. 2017, arXiv:1706.04599.
    """
    r = reliability(logits, labels, bins)
    # The gap of an empty bin is nan. Its weight is 0, but 0 * nan is nan, so the gap is set to 0.
    gaps = np.nan_to_num(np.abs(r["accuracy"] - r["confidence"]))
    return float(np.average(gaps, weights=r["count"]))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T for which logits / T have the smallest cross-entropy.

    T is between e^-3 and e^3. Source: Guo et al. 2017, arXiv:1706.04599.
    """
    labels = labels.cpu()
    # Search over t = log T, in which halving and doubling T are steps of the same length.
    found = minimize_scalar(
        lambda t: F.cross_entropy(logits / math.exp(t), labels).item(), bounds=(-3, 3)
    )
    return math.exp(found.x)


def summarize(logits: Tensor, labels: Tensor) -> dict:
    """Return everything that is measured on labelled images, ready for JSON.

    Accuracy, precision and the like are fractions, not percentages.
    """
    matrix = confusion_matrix(logits, labels)
    correct, n = int(matrix.trace()), len(labels)
    return {
        "accuracy": correct / n,
        "n": n,
        "interval": wilson_interval(correct, n),
        "cross_entropy": F.cross_entropy(logits, labels.cpu()).item(),
        "calibration_error": calibration_error(logits, labels),
        "per_class": per_class(matrix),
        "confusion_matrix": matrix.tolist(),
    }
