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

from cifar_lib.data import CLASSES, Channels, normalize
from cifar_lib.hardware import computing
from cifar_lib.model import ResNet

TTA = {"none": 1, "flip": 2}  # test-time views: the image, and its mirror image


@torch.no_grad()
def predict(
    model: nn.Module,
    images: Tensor,
    mean: Channels,
    std: Channels,
    precision: str = "fp32",
    tta: str = "none",
) -> Tensor:
    """Logits float32 (N, 10) on the CPU for uint8 images (N, 3, 32, 32) normalised by `mean` and
    `std`, as a mean over the views of `tta`; the model computes in evaluation mode, where it lies.
    """
    was_training = model.training
    model.eval()
    logits = []
    on_cpu = next(model.parameters()).device.type == "cpu"
    for inputs in batches(model, images, mean, std, size=400 if on_cpu else 1000):
        with computing(inputs.device, precision):
            views = (inputs, inputs.flip(3))[: TTA[tta]]
            logits.append((sum(model(view).float() for view in views) / len(views)).cpu())
    model.train(was_training)
    return torch.cat(logits)


def batches(
    model: nn.Module, images: Tensor, mean: Channels, std: Channels, size: int
) -> Iterator[Tensor]:
    """Normalised batches float32 (b, 3, 32, 32) of uint8 images, where the model's weights lie; of
    at most `size`, all nearly alike instead of a small last one."""
    device = next(model.parameters()).device
    for piece in images.tensor_split(max(math.ceil(len(images) / size), 1)):
        yield normalize(piece.to(device), mean, std)


def features(
    model: ResNet, images: Tensor, mean: Channels, std: Channels, precision: str = "fp32"
) -> Tensor:
    """What the last layer sees, the last stage's means: float32 (N, channels) on the CPU."""
    headless = copy.deepcopy(model)
    headless.linear = nn.Identity()
    return predict(headless, images, mean, std, precision)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The fraction of images whose largest logit is the label's."""
    return (logits.argmax(1) == labels.cpu()).float().mean(dtype=torch.float64).item()


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for the accuracy over all images like these n, of which `correct`
    are right. That on n other images deviates too: 83 % of them fall into a 95 % interval."""
    interval = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(right: Tensor | np.ndarray, reference: Tensor | np.ndarray) -> tuple[int, int, float]:
    """Of two classifiers, bool (N,) each where they are right on the same images: images that only
    the first gets right, those that only the other does, and McNemar's exact p-value."""
    gained, lost = int((right & ~reference).sum()), int((reference & ~right).sum())
    return gained, lost, float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def confusion_matrix(logits: Tensor, labels: Tensor) -> np.ndarray:
    """int64 (10, 10): rows are true classes, columns predicted ones."""
    return metrics.confusion_matrix(labels.cpu(), logits.argmax(1), labels=range(len(CLASSES)))


def per_class(matrix: np.ndarray) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 (0 where undefined) and images by class, of a confusion matrix."""
    hits, true, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    table = pd.DataFrame(index=CLASSES)
    table["precision"] = hits / np.maximum(predicted, 1)
    table["recall"] = hits / np.maximum(true, 1)
    table["f1"] = 2 * hits / np.maximum(true + predicted, 1)
    table["images"] = true
    return table.to_dict("index")


def most_confident_mistakes(
    logits: Tensor, labels: Tensor, true: int | None = None, predicted: int | None = None
) -> Tensor:
    """Positions int64 of the misclassified images (of these classes), most confident first."""
    confidence, guess = logits.softmax(1).max(1)
    labels = labels.cpu()
    wrong = guess != labels
    for classes, wanted in ((labels, true), (guess, predicted)):
        if wanted is not None:
            wrong &= classes == wanted
    order = confidence.argsort(descending=True, stable=True)
    return order[wrong[order]]


def reliability(logits: Tensor, labels: Tensor, bins: int = 15) -> dict[str, np.ndarray]:
    """Equal bins of confidence, open below: `edges` (bins + 1,), and `count`, `confidence`,
    `accuracy` (bins,) in each, nan where it is empty."""
    confidence, guess = (t.double().numpy() for t in logits.softmax(1).max(1))
    right = guess == labels.cpu().numpy()
    edges = np.linspace(0, 1, bins + 1)
    which = np.searchsorted(edges[1:], confidence).clip(max=bins - 1)  # float32 may round above 1
    count = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin
        means = [np.bincount(which, values, bins) / count for values in (confidence, right)]
    return {"edges": edges, "count": count, "confidence": means[0], "accuracy": means[1]}


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error, mean |accuracy - confidence| over images (arXiv:1706.04599)."""
    r = reliability(logits, labels, bins)
    gaps = np.nan_to_num(np.abs(r["accuracy"] - r["confidence"]))
    return float(np.average(gaps, weights=r["count"]))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T from e^-3 to e^3 with the smallest cross-entropy of logits / T (arXiv:1706.04599)."""
    labels = labels.cpu()
    found = minimize_scalar(
        lambda t: F.cross_entropy(logits / math.exp(t), labels).item(), bounds=(-3, 3)
    )
    return math.exp(found.x)


def summarize(logits: Tensor, labels: Tensor) -> dict:
    """All that is measured on a labelled set, for JSON: fractions, and Wilson's 95 % interval."""
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
