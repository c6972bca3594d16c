"""Measure what adapting is worth on test files whose classes aren't balanced.

    python -m scripts.class_balance [--figure]

A "file" here is a set of real test images, like one that `submit` may get. In most files one class
has a share of 10 to 100 %, and the other nine have equal parts of the rest. Others have only two
classes, or a long tail.

The rule `shift.is_misled`, which decides whether to adapt, was chosen on the images with even
numbers, with some classes and families of shift ("choose"). It is confirmed on the images with odd
numbers, with other classes and other families ("confirm").

Each measurement is appended to results/shift/class_balance.csv at once, so an interrupted run
resumes where it stopped. Then the figure beside it is drawn; with --figure nothing else is done.
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
from notebooks.course.style import BLACK, BLUE, COLOURS, in_style, save_figure

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "results" / "shift" / "class_balance.csv"
FIGURE = TABLE.with_suffix(".png")
ORANGE = COLOURS[1]
SHARES = (0.3, 1.0, 0.1, 0.5, 0.2)  # of one class; 0.1 is a balanced file
METHODS = ("none", "normalize", "normalize+batchnorm")

# Shifts, each named by its family and its severity; "none 0" leaves the images as they are.
CHOOSE = ("none 0", "noise 3", "pixelate 3", "statistics 3")
CONFIRM = ("none 0", "jpeg 5", "contrast 4")

# The columns of the table: those that say what was measured, and the results.
KEYS = ["part", "shift", "n", "draw", "mix", "share", "method"]
COLUMNS = [*KEYS, "correct", "confidence", "predicted"]

# What is measured: part, shifts, mixes, shares, images per file, draws. A mix is the class that has
# the share, or one of the two names that `class_counts` knows. Each draw shuffles the images anew.
GRID = (
    ("choose", CHOOSE, ("cat", "ship"), SHARES, 300, (0,)),
    ("choose", CHOOSE[:3], ("cat", "ship"), (0.1, 0.3, 1.0), 50, (0,)),
    ("confirm", CONFIRM, ("deer", "frog"), SHARES, 300, (0,)),
    ("confirm", CONFIRM[:2], ("two classes", "long tail"), (0.0,), 300, (0,)),
    ("confirm", CONFIRM[:2], ("deer", "frog"), (0.1, 0.3, 1.0), 50, (0, 1)),
    ("confirm", CONFIRM[:2], ("frog",), (0.1, 0.3), 1000, (0,)),
)


def class_counts(mix: str, share: float, n: int) -> np.ndarray:
    """Return how many of a file's n images each class has: int64 (10,)."""
    # The class weights. By default, nine classes share equally what one class leaves.
    weights = np.full(len(CLASSES), (1 - share) / (len(CLASSES) - 1))
    if mix == "two classes":
        weights = np.isin(CLASSES, ("automobile", "horse")) / 2
    elif mix == "long tail":  # the most frequent class has 20 times the images of the rarest
        weights = 20.0 ** -np.linspace(0, 1, len(CLASSES))
    else:
        weights[CLASSES.index(mix)] = share

    # Round the cumulative sums, not the counts, so that the counts add up to n.
    edges = (n * np.cumsum(weights) / weights.sum()).round().astype(int)
    return np.diff(edges, prepend=0)


def draw_file(labels: Tensor, counts: np.ndarray, draw: int) -> Tensor:
    """Return the positions of a file's images among all images: int64 (n,).

    labels: int64 (N,), of all images. counts: int64 (10,), from `class_counts`.

    Files of one draw have many images in common, so the unadapted network predicts these only once.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw))
    of_class = [order[labels[order] == c][:count] for c, count in enumerate(counts)]
    return torch.cat(of_class)


def measure() -> None:
    """Measure what the table lacks, and append it, one row per file and method."""
    torch.set_num_threads(2)
    model, info = load_model(SHIPPED)
    precision = choose_precision("auto", torch.device("cpu"))
    test = load_cifar10()[1]
    halves = {
        "choose": test[torch.arange(0, 10_000, 2)],
        "confirm": test[torch.arange(1, 10_000, 2)],
    }

    # Find out which rows are already there.
    done = set()
    if TABLE.is_file():
        known = pd.read_csv(TABLE, dtype=str, keep_default_na=False)
        done = set(map(tuple, known[KEYS].to_numpy()))
    else:
        TABLE.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")

    # The shifted images of each part and shift, uint8 (5000, 3, 32, 32), and the logits of the
    # unadapted network, float32 (5000, 10). These are nan until some file needs them.
    sources: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    for part, shift_names, mixes, shares, n, draws in GRID:
        for draw, share, mix, shift_name in product(draws, shares, mixes, shift_names):
            if share == 0.1 and mix != mixes[0]:
                continue  # the file is balanced, and the same for every class

            # Shift all images of this part, the first time that a file needs them.
            half = halves[part]
            if (part, shift_name) not in sources:
                family, severity = shift_name.split()
                images = half.images
                if family != "none":
                    images = shifted(images, family, int(severity))
                unknown = torch.full((len(half), len(CLASSES)), torch.nan)
                sources[part, shift_name] = images, unknown
            images, unadapted = sources[part, shift_name]

            # Measure each method on the file that has the images at these positions.
            positions = draw_file(half.labels, class_counts(mix, share, n), draw)
            for method in METHODS:
                row = (part, shift_name, str(len(positions)), str(draw), mix, str(share), method)
                if row in done:
                    continue

                # Predict. Without adaptation, logits don't depend on the file, and are kept.
                if method == "none":
                    missing = positions[unadapted[positions, 0].isnan()]
                    if len(missing):
                        unadapted[missing] = predict(
                            model, images[missing], info.test_normalization, precision
                        )
                    logits = unadapted[positions]
                else:
                    network, normalization = shift.adapt(
                        method, model, images[positions], info.test_normalization, precision
                    )
                    logits = predict(network, images[positions], normalization, precision)

                # Append the row.
                labels = logits.argmax(1)
                confidence = round(shift.confidence(logits), 4)
                correct = int((labels == half.labels[positions]).sum())
                counts = " ".join(map(str, labels.bincount(minlength=len(CLASSES)).tolist()))
                with TABLE.open("a", newline="", encoding="utf-8") as table:
                    csv.writer(table, lineterminator="\n").writerow(
                        [*row, correct, confidence, counts]
                    )


def files() -> pd.DataFrame:
    """Return one row per measured file: how many images each method classifies correctly.

    `default` is the count of `--adapt auto`: it adapts unless `shift.is_misled` says that the
    file's classes mislead the adaptation, which is in the column `misled`.
    """
    # Put the methods of a file side by side. Files that aren't measured completely are left out.
    table = pd.read_csv(TABLE, keep_default_na=False)
    table["predicted"] = [torch.tensor([*map(int, row.split())]) for row in table.predicted]
    keys = [key for key in KEYS if key != "method"]
    measured = table.pivot(index=keys, columns="method").dropna().reset_index()
    found = measured[keys].droplevel(1, axis=1)
    for method in METHODS:
        found[method] = measured["correct", method].astype(int)

    # Decide for each file, from its predicted classes and the confidence that adapting costs.
    adapted = shift.BALANCED
    lost = measured["confidence", shift.UNBALANCED] - measured["confidence", adapted]
    counts = measured["predicted", adapted], measured["predicted", shift.UNBALANCED]
    found["misled"] = [shift.is_misled(*row) for row in zip(*counts, lost, strict=True)]
    found["default"] = found[adapted].mask(found.misled, found[shift.UNBALANCED])
    return found


@in_style
def draw() -> Figure:
    """Draw the accuracy against the share of one class, for unshifted and for shifted files."""
    table = files()
    table = table[(table.n == 300) & (table.share > 0)]
    panels = [
        ("choose", "none 0", "Chosen on: not shifted (cats, ships)"),
        ("choose", "noise 3", "Chosen on: noise 3 (cats, ships)"),
        ("choose", "pixelate 3", "Chosen on: pixelation 3 (cats, ships)"),
        ("confirm", "none 0", "Confirmed on: not shifted (deer, frogs)"),
        ("confirm", "jpeg 5", "Confirmed on: JPEG 5 (deer, frogs)"),
        ("confirm", "contrast 4", "Confirmed on: contrast 4 (deer, frogs)"),
    ]
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    figure.suptitle("Accuracy on files of 300 images, by the share of one class")
    grid = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, (part, shift_name, title) in zip(grid.flat, panels, strict=True):
        # Add up the files that have the same share.
        rows = table[(table.part == part) & (table["shift"] == shift_name)]
        sums = rows.groupby("share")[["n", "none", shift.BALANCED, "default"]].sum()

        # `auto` equals one of the other two nearly everywhere: a wide band behind them.
        axes.plot(sums.index, sums.default / sums.n, color=ORANGE, linewidth=7, label="auto")

        # The other two, with Wilson's intervals as error bars.
        for column, line, colour in (("none", "o-", BLUE), (shift.BALANCED, "s--", BLACK)):
            ranges = [
                wilson_interval(int(k), int(n)) for k, n in zip(sums[column], sums.n, strict=True)
            ]
            middle = sums[column] / sums.n
            bars = np.abs(np.array(ranges).T - middle.to_numpy())
            look = {"fmt": line, "color": colour, "capsize": 2, "ms": 4, "label": column}
            axes.errorbar(sums.index, middle, bars, **look)

        axes.set(ylim=(0, 1), xticks=(0.1, 0.3, 0.5, 1.0))
        axes.set_title(title, fontsize=9)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
    grid[0, 0].legend(loc="lower left")
    figure.supxlabel("share of one class in the file (10%: balanced)")
    figure.supylabel("accuracy, with Wilson's 95% interval")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", action="store_true", help="draw what is measured")
    options = parser.parse_args()
    if not options.figure:
        measure()
    save_figure(draw(), FIGURE)
