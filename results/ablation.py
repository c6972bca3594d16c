"""Every adaptation on every shift and severity, with the package's weights: results/shift/.

    python results/ablation.py [--images N]

Goes on after the shifts that results/shift/measures.csv already holds.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import pandas as pd
import torch
from scipy.stats import binomtest

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs without an installation

from cifar_lib.checkpoint import write_atomically
from cifar_lib.data import ImageSet, load_cifar10, stratified_split
from cifar_lib.evaluate import TTA, average_views, features, predict_views, wilson_interval
from cifar_lib.hardware import choose_device, describe
from cifar_lib.model import PRETRAINED, ResNet, load_model
from cifar_lib.shift import (
    ADAPTATIONS,
    FAMILIES,
    SEVERITIES,
    adapt,
    channel_distance,
    frechet_distance,
    shifted,
)

FOLDER = Path(__file__).parent / "shift"
CLEAN = ("clean", 0)
# The default of `submit` is chosen on these shifts and the first half of the images, and confirmed on the others.
CHOSEN_ON = ("statistics", "contrast", "noise", "jpeg")


def mcnemar(gained: int, lost: int) -> float:
    """The exact p-value that two classifiers are equally often right, from the images on which only one of them is."""
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def score_shift(
    family: str, severity: int, images: torch.Tensor, test: ImageSet, model: ResNet, info: dict
) -> list[dict]:
    """A row for each adaptation and kind of views."""
    rows, reference, half = [], None, len(test) // 2
    for method in ADAPTATIONS:
        network, mean, std = adapt(method, model, images, info["mean"], info["std"])
        views = predict_views(network, images, mean, std)
        for tta in TTA:
            right = average_views(views, tta).argmax(1) == test.labels
            reference = right if reference is None else reference
            gained, lost = int((right & ~reference).sum()), int((reference & ~right).sum())
            low, high = wilson_interval(int(right.sum()), len(right))
            rows.append(
                {"family": family, "severity": severity, "adapt": method, "tta": tta, "n": len(right)}
                | {"accuracy": right.double().mean().item(), "low": low, "high": high}
                | {"gained": gained, "lost": lost, "mcnemar_p": mcnemar(gained, lost)}
                | {"first_half": right[:half].double().mean().item()}
                | {"second_half": right[half:].double().mean().item()}
            )
    return rows


def measure_shift(
    family: str, severity: int, images: torch.Tensor, test: ImageSet, model: ResNet, info: dict, clean: torch.Tensor
) -> dict:
    """What can be seen of a shift without labels; `clean`: the features of the images as they were."""
    red, green, blue = channel_distance(images, test.images)
    moved = features(model, images, info["mean"], info["std"])
    return {"family": family, "severity": severity, "wasserstein_red": red, "wasserstein_green": green} | {
        "wasserstein_blue": blue,
        "frechet": frechet_distance(moved, clean),
    }


def verdict(accuracy: pd.DataFrame) -> dict:
    """The adaptation that is best on the shifts and images it is chosen on, and what it gives on the others."""
    labelled = accuracy.assign(method=accuracy["adapt"] + ", views: " + accuracy["tta"])
    seen = labelled["family"].isin(CHOSEN_ON)
    unseen = ~seen & (labelled["family"] != CLEAN[0])
    chosen_on = labelled[seen].groupby("method")["first_half"].mean()
    confirmed_on = labelled[unseen].groupby("method")["second_half"].mean()
    clean = labelled[labelled["family"] == CLEAN[0]].set_index("method")["accuracy"]
    return {
        "chosen_on": {"families": list(CHOSEN_ON), "mean_accuracy": chosen_on.to_dict(), "best": chosen_on.idxmax()},
        "confirmed_on": {"mean_accuracy": confirmed_on.to_dict(), "best": confirmed_on.idxmax()},
        "clean": clean.to_dict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000, help="a stratified part of the test images")
    options = parser.parse_args()
    device = choose_device()
    model, info = load_model(PRETRAINED)
    model.to(device)
    _, test = load_cifar10()
    _, part = stratified_split(test.labels, options.images, seed=3)
    test = test[part[torch.randperm(len(part), generator=torch.Generator().manual_seed(3))]]
    FOLDER.mkdir(exist_ok=True)
    accuracy, measures = [], []
    paths = [(FOLDER / "accuracy.csv", accuracy), (FOLDER / "measures.csv", measures)]
    for path, rows in paths:
        rows.extend(pd.read_csv(path).to_dict("records") if path.exists() else [])
    done = {(row["family"], row["severity"]) for row in measures}  # written after the accuracies of a shift
    accuracy[:] = [row for row in accuracy if (row["family"], row["severity"]) in done]
    clean = features(model, test.images, info["mean"], info["std"])
    for family, severity in (CLEAN, *itertools.product(FAMILIES, SEVERITIES)):
        if (family, severity) in done:
            continue
        images = test.images if severity == 0 else shifted(test.images, family, severity)
        scores = score_shift(family, severity, images, test, model, info)
        accuracy += scores
        measures.append(measure_shift(family, severity, images, test, model, info, clean))
        for path, rows in paths:
            write_atomically(path, pd.DataFrame(rows).to_csv(index=False, float_format="%.6g").encode())
        best = max(scores, key=lambda row: row["accuracy"])
        way = f"{best['adapt']}, views {best['tta']}"
        print(f"{family} {severity}: {scores[0]['accuracy']:.1%}; best {best['accuracy']:.1%} by {way}", flush=True)
    summary = {"weights": PRETRAINED, "n": options.images, "machine": describe(device)}
    summary |= verdict(pd.DataFrame(accuracy))
    write_atomically(FOLDER / "verdict.json", (json.dumps(summary, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
