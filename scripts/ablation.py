"""Measure every adaptation, with and without flip TTA, on every shift and severity.

    python -m scripts.ablation [--images N]

The package's weights predict a part of the test images under each shift, and then all test images
under the shift that imitates the competition's custom test set. A "way" to predict is an adaptation
together with flip TTA. The results are in results/shift/; an interrupted run resumes after
the shifts that are already there:

right.npz      for each shift a bool array (ways, images), true if the way found the image's label;
               and the sha256 of the weights
measures.csv   how far each shift is from the clean images, measured without labels
accuracy.csv   from right.npz: accuracies, with intervals and paired tests
verdict.json   from right.npz: which adaptation is best, and whether that holds on other shifts
"""

import argparse
import hashlib
import io
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import ttest_1samp, wasserstein_distance

from cifar_lib.data import (
    ImageSet,
    Normalization,
    channel_histogram,
    load_cifar10,
    stratified_split,
)
from cifar_lib.errors import InputError
from cifar_lib.evaluate import TTA, features, mcnemar, predict_views, wilson_interval
from cifar_lib.files import write_atomically
from cifar_lib.hardware import choose_device, describe
from cifar_lib.model import PRETRAINED, SHIPPED, ResNet, load_model
from cifar_lib.shift import ADAPTATIONS, adapt
from notebooks.course.corruptions import FAMILIES, SEVERITIES, shifted

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "results" / "shift"
# The ways to predict: pairs of an adaptation and a TTA. All are compared with the first
# one, which is no adaptation and one view.
WAYS = tuple(itertools.product(ADAPTATIONS, TTA))

# A shift is named by its family and its severity. These two have no severity.
CLEAN = "clean 0"
CUSTOM = "custom 0"  # all test images with the channel statistics of "statistics 1"

# The default way of `submit` is chosen on these families, with the first half of the images. It is
# confirmed on the remaining families, with the second half.
CHOSEN_ON = ("statistics", "contrast", "noise", "jpeg")


def measured(weights: str, images: int) -> tuple[dict[str, np.ndarray], list[dict]]:
    """Return what results/shift/ already holds: the arrays of right.npz, and rows of measures.csv.

    The arrays are {shift: bool (ways, images)}. `weights` is the sha256 of the weights that are
    measured now.

    Raises InputError if what is there was measured with other weights or another number of images.
    """
    if not (FOLDER / "right.npz").exists():
        return {}, []

    # Compare the weights and the number of images with those that were measured.
    with np.load(FOLDER / "right.npz") as stored:
        right = dict(stored)
    before = str(right.pop("weights", "unknown")), len(right[CLEAN][0])
    if before != (weights, images):
        what = f"expected measurements of {images} images by weights {weights[:12]}..."
        found = f"found {before[1]} by {before[0][:12]}..."
        raise InputError(f"{FOLDER.name}: {what}, {found}: move the folder away to measure anew")

    # measures.csv is written first, so it can have a row for a shift that right.npz doesn't have.
    measures = pd.read_csv(FOLDER / "measures.csv").to_dict("records")
    return right, [row for row in measures if f"{row['family']} {row['severity']}" in right]


def score(
    images: torch.Tensor, test: ImageSet, model: ResNet, normalization: Normalization
) -> np.ndarray:
    """Return whether each way finds each image's label: bool (ways, images).

    images: uint8 (images, 3, 32, 32), shifted; their labels are those of `test`.
    """
    right = {}
    for method in ADAPTATIONS:
        network, own_normalization = adapt(method, model, images, normalization)
        views = predict_views(network, images, own_normalization)  # (2, images, 10)
        logits = {"none": views[0], "flip": views.mean(0)}
        for tta in logits:
            right[method, tta] = logits[tta].argmax(1) == test.labels
    return torch.stack([right[way] for way in WAYS]).numpy()


def channel_distance(images: torch.Tensor, others: torch.Tensor) -> np.ndarray:
    """Return the Wasserstein distance between the pixel values of two sets, for each channel.

    uint8 (N, 3, H, W), uint8 (M, 3, H, W) -> float64 (3,), between 0 and 1.
    """
    values = np.arange(256) / 255
    ours, theirs = (channel_histogram(part).numpy() for part in (images, others))
    return np.array([wasserstein_distance(values, values, ours[c], theirs[c]) for c in range(3)])


def frechet_distance(features: torch.Tensor, others: torch.Tensor) -> float:
    """Return the Fréchet distance between two sets of features, float (N, D) and (M, D).

    It is the distance between the normal distributions with their means m and covariances C:
    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017, arXiv:1706.08500).

    If N or M is below D + 1, it is too large. Therefore compare distances only between sets of
    equal sizes.
    """
    a, b = features.double().cpu(), others.double().cpu()
    c1, c2 = a.T.cov(), b.T.cov()  # (D, D)

    # The trace of the square root is the sum of the square roots of the eigenvalues. Those of C1 C2
    # are never negative; rounding can make them so, or complex, hence the real part.
    cross = torch.linalg.eigvals(c1 @ c2).sqrt().real.sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * cross
    return distance.item()


def keep(right: dict[str, np.ndarray], shift: str, found: np.ndarray, weights: str) -> None:
    """Add the result on a shift, bool (ways, images), to `right`; write all of it to right.npz."""
    right[shift] = found
    packed = io.BytesIO()
    np.savez_compressed(packed, weights=weights, **right)
    write_atomically(FOLDER / "right.npz", packed.getvalue())

    # Print a line of progress.
    accuracies = found.mean(1)  # (ways,)
    best = accuracies.argmax()
    print(f"{shift}: {accuracies[0]:.1%}; best {accuracies[best]:.1%} by {WAYS[best]}", flush=True)


def accuracy_table(right: dict[str, np.ndarray]) -> pd.DataFrame:
    """Return accuracy.csv as a table with one row per shift and way.

    A row has the accuracy, Wilson's interval, and the exact McNemar test against the first way.
    """
    rows = []
    for shift, table in right.items():
        family, severity = shift.split()
        for (method, tta), ours in zip(WAYS, table, strict=True):
            low, high = wilson_interval(int(ours.sum()), len(ours))
            gained, lost, p = mcnemar(ours, table[0])
            row = {"family": family, "severity": int(severity), "adapt": method, "tta": tta}
            row |= {"n": len(ours), "accuracy": ours.mean(), "low": low, "high": high}
            rows.append(row | {"gained": gained, "lost": lost, "mcnemar_p": p})
    return pd.DataFrame(rows)


def gains(tables: list[np.ndarray]) -> dict[str, dict]:
    """Return each way's mean accuracy over some shifts, and its gain over the first way in points.

    tables: a bool array (ways, images) for each shift, all of the same images.

    The gain has Student's 95 % interval. Because all shifts have the same images, each image is
    first averaged over the shifts, and the interval is that of a mean over images.
    """
    by_image = np.mean(tables, axis=0)  # (ways, images)
    result = {}
    for way, ours in zip(WAYS, by_image, strict=True):
        gain = 100 * (ours - by_image[0])  # (images,), in percentage points
        interval = ttest_1samp(gain, 0).confidence_interval(0.95) if gain.any() else (0.0, 0.0)
        result[" + ".join(way)] = {
            "accuracy": round(float(ours.mean()), 4),
            "gain": round(float(gain.mean()), 2),
            "interval": [round(float(end), 2) for end in interval],
        }
    return result


def verdict(right: dict[str, np.ndarray]) -> dict:
    """Return verdict.json: the way that becomes the default of `submit`, and the evidence for it.

    The best way on the shifts and images for choosing becomes the default if its gain is confirmed
    on the others. The report claims that adapting helps on the custom test set, so the verdict also
    says whether the default beats the first way there, with intervals that don't overlap.
    """
    # Choose on one half of the images and some families, confirm on the other half and families.
    half = right[CLEAN].shape[1] // 2
    seen = [table[:, :half] for shift, table in right.items() if shift.split()[0] in CHOSEN_ON]
    others = [family for family in FAMILIES if family not in CHOSEN_ON]
    unseen = [table[:, half:] for shift, table in right.items() if shift.split()[0] in others]
    chosen, confirmed = gains(seen), gains(unseen)

    # The best way is confirmed if the interval of its gain is above 0.
    best = max(WAYS, key=lambda way: chosen[" + ".join(way)]["accuracy"])
    held = confirmed[" + ".join(best)]["interval"][0] > 0
    default = best if held else WAYS[0]

    # Wilson's intervals of the first way and of the default on the custom set.
    none, ours = (
        wilson_interval(int(found.sum()), len(found))
        for found in right[CUSTOM][[0, WAYS.index(default)]]
    )
    return {
        "default": dict(zip(("adapt", "tta"), default, strict=True)),
        "chosen": " + ".join(best),
        "confirmed": held,
        "beats_none_outside_the_intervals_on_the_custom_set": ours[0] > none[1],
        "chosen_on": {"families": list(CHOSEN_ON), "images": half, "ways": chosen},
        "confirmed_on": {
            "families": others,
            "images": right[CLEAN].shape[1] - half,
            "ways": confirmed,
        },
        "clean": gains([right[CLEAN]]),
        "custom": gains([right[CUSTOM]]),
    }


def main() -> None:
    """Measure what results/shift/ lacks, and write its files.

    Raises InputError if that folder holds other measurements.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--images", type=int, default=1000, help="a stratified part of the test images"
    )
    options = parser.parse_args()

    # Load what is already measured, the network, and a part of the test images in random order.
    weights = hashlib.sha256(SHIPPED.read_bytes()).hexdigest()
    right, measures = measured(weights, options.images)
    device = choose_device()
    model, info = load_model(PRETRAINED)
    model.to(device)
    _, test = load_cifar10()
    _, part = stratified_split(test.labels, options.images, seed=3)
    part = test[part[torch.randperm(len(part), generator=torch.Generator().manual_seed(3))]]

    # Measure each shift that is missing.
    clean = features(model, part.images, info.test_normalization)
    for family, severity in (("clean", 0), *itertools.product(FAMILIES, SEVERITIES)):
        shift = f"{family} {severity}"
        if shift in right:
            continue
        images = shifted(part.images, family, severity) if severity else part.images
        found = score(images, part, model, info.test_normalization)
        red, green, blue = channel_distance(images, part.images)
        measures.append(
            {"family": family, "severity": severity}
            | {"wasserstein_red": red, "wasserstein_green": green, "wasserstein_blue": blue}
            | {"frechet": frechet_distance(features(model, images, info.test_normalization), clean)}
        )
        text = pd.DataFrame(measures).to_csv(index=False, float_format="%.6g")
        write_atomically(FOLDER / "measures.csv", text.encode())
        keep(right, shift, found, weights)

    # Measure the custom test set, with all test images.
    if CUSTOM not in right:
        custom = shifted(test.images, "statistics", 1)
        keep(right, CUSTOM, score(custom, test, model, info.test_normalization), weights)

    # Write what follows from these measurements.
    text = accuracy_table(right).to_csv(index=False, float_format="%.6g")
    write_atomically(FOLDER / "accuracy.csv", text.encode())
    shipped = info.as_record() | {"name": PRETRAINED, "sha256": weights}
    summary = {"weights": shipped, "n": options.images, "machine": describe(device)}
    text = json.dumps(summary | verdict(right), indent=2) + "\n"
    write_atomically(FOLDER / "verdict.json", text.encode())


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
