"""What adapting is worth on files whose classes aren't balanced: `python -m scripts.class_balance`.

Each file holds real test images: one class has a share of 10 to 100 %, the other nine have equal
parts of the rest; or there are two classes, or a long tail. `shift.is_misled` was chosen on
the even test images and some families of shift ("choose"), and is measured on the odd images, other
classes and other families ("confirm"). Rows are appended to results/shift/class_balance.csv as they
are measured, so that an interrupted run goes on; `--figure` draws them without measuring.
"""

import argparse
import csv
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from cifar_lib import shift
from cifar_lib.data import CLASSES, load_cifar10
from cifar_lib.evaluate import predict, wilson_interval
from cifar_lib.hardware import choose_precision
from cifar_lib.model import SHIPPED, load_model
from notebooks.course.corruptions import shifted

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "results" / "shift" / "class_balance.csv"
FIGURE = TABLE.with_suffix(".png")
SHARES = (0.3, 1.0, 0.1, 0.5, 0.2)
METHODS = ("none", "normalize", "normalize+batchnorm")
CHOOSE = ("none 0", "noise 3", "pixelate 3", "statistics 3")
CONFIRM = ("none 0", "jpeg 5", "contrast 4")
KEYS = ["part", "shift", "n", "draw", "mix", "share", "method"]
COLUMNS = [*KEYS, "correct", "confidence", "predicted"]

# Part, shifts, mixes (a class, or a name from `class_counts`), shares, images, draws.
GRID = (
    ("choose", CHOOSE, ("cat", "ship"), SHARES, 300, (0,)),
    ("choose", CHOOSE[:3], ("cat", "ship"), (0.1, 0.3, 1.0), 50, (0,)),
    ("confirm", CONFIRM, ("deer", "frog"), SHARES, 300, (0,)),
    ("confirm", CONFIRM[:2], ("two classes", "long tail"), (0.0,), 300, (0,)),
    ("confirm", CONFIRM[:2], ("deer", "frog"), (0.1, 0.3, 1.0), 50, (0, 1)),
    ("confirm", CONFIRM[:2], ("frog",), (0.1, 0.3), 1000, (0,)),
)


def class_counts(mix: str, share: float, n: int) -> np.ndarray:
    """How many of n images each class has: int64 (10,)."""
    weights = np.full(len(CLASSES), (1 - share) / (len(CLASSES) - 1))
    if mix == "two classes":
        weights = np.isin(CLASSES, ("automobile", "horse")) / 2
    elif mix == "long tail":  # the most frequent class has 20 times the images of the rarest
        weights = 20.0 ** -np.linspace(0, 1, len(CLASSES))
    else:
        weights[CLASSES.index(mix)] = share
    edges = (n * np.cumsum(weights) / weights.sum()).round().astype(int)
    return np.diff(edges, prepend=0)


def draw_file(labels: Tensor, counts: np.ndarray, draw: int) -> Tensor:
    """Positions int64 of a file's images; files of one draw share images, so that predictions of
    the unadapted network serve them all."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw))
    of_class = [order[labels[order] == c][:count] for c, count in enumerate(counts)]
    return torch.cat(of_class)


def measure() -> None:
    """Measures what the table lacks."""
    torch.set_num_threads(2)
    model, info = load_model(SHIPPED)
    precision = choose_precision("auto", torch.device("cpu"))
    test = load_cifar10()[1]
    halves = {
        "choose": test[torch.arange(0, 10_000, 2)],
        "confirm": test[torch.arange(1, 10_000, 2)],
    }
    done = set()
    if TABLE.is_file():
        known = pd.read_csv(TABLE, dtype=str, keep_default_na=False)
        done = set(map(tuple, known[KEYS].to_numpy()))
    else:
        TABLE.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    sources: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    for part, names, mixes, shares, n, draws in GRID:
        for draw, share, mix, name in product(draws, shares, mixes, names):
            if share == 0.1 and mix != mixes[0]:
                continue  # balanced, whatever the class
            half = halves[part]
            if (part, name) not in sources:
                family, severity = name.split()
                images = half.images
                if family != "none":
                    images = shifted(images, family, int(severity))
                unknown = torch.full((len(half), len(CLASSES)), torch.nan)
                sources[part, name] = images, unknown
            images, unadapted = sources[part, name]  # logits (5000, 10), nan where not yet known
            where = draw_file(half.labels, class_counts(mix, share, n), draw)
            for method in METHODS:
                row = (part, name, str(len(where)), str(draw), mix, str(share), method)
                if row in done:
                    continue
                if method == "none":
                    missing = where[unadapted[where, 0].isnan()]
                    if len(missing):
                        unadapted[missing] = predict(
                            model, images[missing], info.normalization, precision
                        )
                    logits = unadapted[where]
                else:
                    network, normalization = shift.adapt(
                        method, model, images[where], info.normalization, precision
                    )
                    logits = predict(network, images[where], normalization, precision)
                labels = logits.argmax(1)
                confidence = round(shift.confidence(logits), 4)
                correct = int((labels == half.labels[where]).sum())
                counts = " ".join(map(str, labels.bincount(minlength=len(CLASSES)).tolist()))
                with TABLE.open("a", newline="", encoding="utf-8") as table:
                    csv.writer(table, lineterminator="\n").writerow(
                        [*row, correct, confidence, counts]
                    )


def files() -> pd.DataFrame:
    """One row per measured file: the accuracies, and which of them the new default has."""
    table = pd.read_csv(TABLE, keep_default_na=False)
    table["predicted"] = [torch.tensor([*map(int, row.split())]) for row in table.predicted]
    keys = [key for key in KEYS if key != "method"]
    measured = table.pivot(index=keys, columns="method").dropna().reset_index()
    found = measured[keys].droplevel(1, axis=1)
    for method in METHODS:
        found[method] = measured["correct", method].astype(int)
    adapted = shift.BALANCED
    lost = measured["confidence", shift.UNBALANCED] - measured["confidence", adapted]
    counts = measured["predicted", adapted], measured["predicted", shift.UNBALANCED]
    found["misled"] = [shift.is_misled(*row) for row in zip(*counts, lost, strict=True)]
    found["default"] = found[adapted].mask(found.misled, found[shift.UNBALANCED])
    return found


def draw() -> None:
    """Accuracy against the share of one class, on unshifted files and on shifted ones."""
    table = files()
    table = table[(table.n == 300) & (table.share > 0)]
    panels = [
        ("choose", "none 0", "not shifted: cat, ship"),
        ("choose", "noise 3", "noise, severity 3: cat, ship"),
        ("choose", "pixelate 3", "pixelation, severity 3: cat, ship"),
        ("confirm", "none 0", "not shifted: deer, frog"),
        ("confirm", "jpeg 5", "JPEG, severity 5: deer, frog"),
        ("confirm", "contrast 4", "contrast, severity 4: deer, frog"),
    ]
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, (part, name, title) in zip(grid.flat, panels, strict=True):
        rows = table[(table.part == part) & (table["shift"] == name)]
        sums = rows.groupby("share")[["n", "none", shift.BALANCED, "default"]].sum()
        lines = {"none": "o-", shift.BALANCED: "s--", "default": "D:"}
        names = ("none", "the old default", "the new default")
        for (column, line), label in zip(lines.items(), names, strict=True):
            ranges = [
                wilson_interval(int(k), int(n)) for k, n in zip(sums[column], sums.n, strict=True)
            ]
            middle = sums[column] / sums.n
            bars = np.abs(np.array(ranges).T - middle.to_numpy())
            axes.errorbar(sums.index, middle, bars, fmt=line, capsize=2, ms=4, label=label)
        axes.set(title=f"{part}, {title}", ylim=(0, 1), xticks=sorted(SHARES))
        axes.title.set_size(9)
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
    grid[0, 0].legend(frameon=False, loc="lower left")
    figure.supxlabel("share of one class in the file, % (10: balanced)")
    figure.supylabel("accuracy, with Wilson's 95 % interval")
    figure.savefig(FIGURE, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", action="store_true", help="draw what is measured")
    options = parser.parse_args()
    if not options.figure:
        measure()
    draw()
