"""From images to logits, once, and from logits to every number."""

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

TTA = {"none": 1, "flip": 2}  # test-time views: the image; the image and its mirror image


# From images to logits.


def predict(
    model: nn.Module,
    images: Tensor,
    normalization: Normalization,
    precision: str = "fp32",
    tta: str = "none",
) -> Tensor:
    """Return the logits of uint8 images (N, 3, 32, 32): float32 (N, 10) on the CPU.

    They are the mean over the views of `tta`. The model runs in evaluation mode, on the device that
    holds it, and is left in the mode that it was in.
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
    """Return the logits of each view by itself: float32 (views, N, 10) on the CPU.

    The first view is the image as it is, so one pass gives the logits for both values of `tta`.
    """
    was_training = model.training
    model.eval()
    logits = []
    on_cpu = next(model.parameters()).device.type == "cpu"
    for inputs in batches(model, images, normalization, size=400 if on_cpu else 1000):
        with computing(inputs.device, precision):
            views = (inputs, inputs.flip(3))[: TTA[tta]]  # (b, 3, 32, 32) each
            logits.append(torch.stack([model(view).float() for view in views]).cpu())
    model.train(was_training)
    return torch.cat(logits, dim=1)


def batches(
    model: nn.Module, images: Tensor, normalization: Normalization, size: int
) -> Iterator[Tensor]:
    """Yield normalised batches of uint8 images, float32 (b, 3, 32, 32), on the weights' device.

    They have nearly the same size, at most `size` images, instead of a small last one.
    """
    device = next(model.parameters()).device
    for piece in images.tensor_split(max(math.ceil(len(images) / size), 1)):
        yield normalization(piece.to(device))


def features(
    model: ResNet, images: Tensor, normalization: Normalization, precision: str = "fp32"
) -> Tensor:
    """Return what the last layer sees, the last stage's averages: float32 (N, channels), CPU."""
    headless = copy.deepcopy(model)
    headless.linear = nn.Identity()
    return predict(headless, images, normalization, precision)


# From logits to numbers.


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the fraction of images whose largest logit is the label's."""
    return (logits.argmax(1) == labels.cpu()).float().mean(dtype=torch.float64).item()


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval for the accuracy over all images like these n.

    `correct` of them are labelled correctly. The accuracy on n other images deviates too: 83 % of
    such accuracies fall into a 95 % interval.
    """
    interval = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(
    is_correct: Tensor | np.ndarray, reference: Tensor | np.ndarray
) -> tuple[int, int, float]:
    """Compare two classifiers, given as bool (N,): whether each is correct on the same images.

    Returns how many images only the first labels correctly, how many only the reference does, and
    McNemar's exact p-value.
    """
    gained, lost = int((is_correct & ~reference).sum()), int((reference & ~is_correct).sum())
    return gained, lost, float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


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

    `true` leaves only images of that class, `predicted` only images that were taken for that class;
    both are class numbers.
    """
    confidence, guess = logits.softmax(1).max(1)  # (N,) each
    labels = labels.cpu()
    is_mistake = guess != labels
    if true is not None:
        is_mistake &= labels == true
    if predicted is not None:
        is_mistake &= guess == predicted
    order = confidence.argsort(descending=True, stable=True)
    return order[is_mistake[order]]


def reliability(logits: Tensor, labels: Tensor, bins: int = 15) -> dict[str, np.ndarray]:
    """Compare confidence with accuracy in bins of confidence of equal width, each (low, high].

    Returns `edges` (bins + 1,) and, for each bin, `count`, mean `confidence` and `accuracy`
    (bins,), nan where the bin is empty.
    """
    confidence, guess = (t.double().numpy() for t in logits.softmax(1).max(1))
    is_correct = guess == labels.cpu().numpy()
    edges = np.linspace(0, 1, bins + 1)
    which = np.searchsorted(edges[1:], confidence).clip(max=bins - 1)  # float32 may round above 1
    count = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin
        means = [np.bincount(which, values, bins) / count for values in (confidence, is_correct)]
    return {"edges": edges, "count": count, "confidence": means[0], "accuracy": means[1]}


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Return the expected calibration error: mean |accuracy - confidence| over the images.

    Source: Guo et al. 2017, arXiv:1706.04599.
    """
    r = reliability(logits, labels, bins)
    gaps = np.nan_to_num(np.abs(r["accuracy"] - r["confidence"]))
    return float(np.average(gaps, weights=r["count"]))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the T, from e^-3 to e^3, for which logits / T have the smallest cross-entropy.

    Source: Guo et al. 2017, arXiv:1706.04599.
    """
    labels = labels.cpu()
    found = minimize_scalar(
        lambda t: F.cross_entropy(logits / math.exp(t), labels).item(), bounds=(-3, 3)
    )
    return math.exp(found.x)


def summarize(logits: Tensor, labels: Tensor) -> dict:
    """Return all that is measured on a labelled set, as fractions, for JSON."""
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
