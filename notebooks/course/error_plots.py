"""Charts of a network's mistakes: confusions, the border of two classes, confidence, shifts."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from seaborn.utils import relative_luminance

from cifar_lib.data import CLASSES
from cifar_lib.evaluate import wilson_interval
from notebooks.course.style import BLACK, BLUE, RED, in_style, new_figure

FEW = 20  # a bin with fewer images says too little about its accuracy to be drawn
DARK = 0.2  # the relative luminance below which white has more contrast than black
MINUS = "\N{MINUS SIGN}"  # as wide as a plus; matplotlib's axes have it, too


def per_thousand(matrix: np.ndarray) -> np.ndarray:
    """Return a confusion matrix scaled to 1,000 images per true class, in whole numbers."""
    return (1000 * matrix / matrix.sum(1, keepdims=True)).round().astype(int)


@in_style
def confusion(
    matrices: Mapping[str, np.ndarray], title: str, unit: str, signed: bool = False
) -> Figure:
    """Draw confusion matrices of whole numbers side by side, in one colour scale.

    matrices: {name: (10, 10)}, rows true, columns predicted. The diagonal has no colour, because
    its large numbers would make all mistakes look pale.
    unit: the label of the colour scale.
    signed: whether the numbers are differences. If so, the colour scale is symmetric around 0.
    """
    figure, axes = new_figure(1, len(matrices), (3.4 * len(matrices) + 1.5, 4.8))
    figure.set_layout_engine("compressed")  # no gaps around axes of a fixed shape
    figure.suptitle(title)
    diagonal = np.eye(len(CLASSES), dtype=bool)
    limit = max(np.abs(matrix[~diagonal]).max() for matrix in matrices.values())
    scale = {"cmap": "Blues", "vmin": 0, "vmax": limit}
    if signed:
        scale = {"cmap": "PuOr", "vmin": -limit, "vmax": limit}
    for ax, (name, matrix) in zip(axes[0], matrices.items(), strict=True):
        texts = np.vectorize(_signed if signed else str, otypes=[object])(matrix)
        _draw_cells(ax, np.where(diagonal, np.nan, matrix), texts, scale, square=True)
        for k in range(len(CLASSES)):  # seaborn writes no text in a cell that is nan
            ax.text(k + 0.5, k + 0.5, texts[k, k], ha="center", va="center", size=9, weight="bold")
        middles = np.arange(len(CLASSES)) + 0.5
        ax.set_xticks(middles, CLASSES, rotation=45, ha="right")
        ax.set_yticks(middles, CLASSES, rotation=0)
        is_first = ax is axes[0, 0]
        ax.tick_params(length=0, labelleft=is_first)
        ax.set(title=name, xlabel="predicted", ylabel="true" if is_first else "")
    whole = MaxNLocator(integer=True, steps=[1, 2, 5, 10])
    look = {"label": unit, "shrink": 0.75, "pad": 0.02, "ticks": whole}
    figure.colorbar(axes[0, 0].collections[0], ax=axes, **look)
    return figure


def _signed(count: int) -> str:
    return f"{count:+d}".replace("-", MINUS) if count else "0"


def _draw_cells(
    ax: Axes, values: np.ndarray | pd.DataFrame, texts: object, scale: dict, square: bool = False
) -> None:
    """Draw a heat map (rows, columns) with the text of each cell, without grid and colour bar."""
    sns.heatmap(
        values,
        ax=ax,
        annot=texts,
        fmt="",
        annot_kws={"size": 9},
        cbar=False,
        square=square,
        linewidths=0.5,
        **scale,
    )
    ax.grid(False)

    # White digits on dark cells only: seaborn also writes them on cells of medium darkness, where
    # black ones have more contrast.
    faces = ax.collections[0].get_facecolors()  # (rows * columns, 4)
    columns = np.shape(values)[1]
    for text in ax.texts:
        x, y = text.get_position()
        is_dark = relative_luminance(faces[int(y) * columns + int(x)]) < DARK
        text.set_color("white" if is_dark else BLACK)
        text.set_text(text.get_text().replace("-", MINUS))


@in_style
def confused_pairs(
    pairs: Sequence[tuple[str, str, int]], published: Sequence[int], title: str, xlabel: str
) -> Figure:
    """Draw the most frequent mistakes as bars, and the published run's numbers beside them.

    pairs: (true class, predicted class, images), the most frequent first. The bars of cat and dog
    are red.
    published: one number per pair.
    """
    figure, axes = new_figure(size=(7.5, 1.2 + 0.32 * max(len(pairs), 3)))
    ax = axes[0, 0]
    kinds = {"this network, cat and dog": RED, "this network, other pairs": BLUE}
    for is_pets, (name, colour) in zip((True, False), kinds.items(), strict=True):
        rows = [i for i, (*pair, _) in enumerate(pairs) if (set(pair) == {"cat", "dog"}) == is_pets]
        ax.barh(rows, [pairs[i][2] for i in rows], color=colour, label=name)
    look = {"color": BLACK, "markeredgecolor": "white", "markersize": 8}
    ax.plot(published, range(len(pairs)), "D", label="published run", **look)

    # Both numbers, to the right of the bar and of the diamond.
    beside = {"textcoords": "offset points", "xytext": (8, 0), "va": "center", "fontsize": 9}
    for i, ((_, _, count), theirs) in enumerate(zip(pairs, published, strict=True)):
        ax.annotate(f"{count} (published: {theirs})", (max(count, theirs), i), **beside)
    ax.set_yticks(range(len(pairs)), [f"{true} → {guess}" for true, guess, _ in pairs])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.25)
    ax.set(title=title, xlabel=xlabel, ylabel="true class → predicted class", xlim=(0, None))
    ax.legend(loc="lower right")
    return figure


@in_style
def two_histograms(
    values: Mapping[str, np.ndarray], title: str, xlabel: str, sides: tuple[str, str]
) -> Figure:
    """Draw the histograms of two sets over each other, with a threshold at 0.

    values: {name: (n,)}. sides: the answers on the left and on the right of the threshold.
    """
    figure, axes = new_figure(size=(8, 3.8))
    ax = axes[0, 0]
    everything = np.concatenate(list(values.values()))
    low, high, width = everything.min(), everything.max(), np.ptp(everything) / 60
    # Edges are multiples of the width, so 0 is one of them: no bin lies on both sides.
    edges = width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)
    for (name, numbers), colour in zip(values.items(), (BLUE, RED), strict=True):
        look = {"histtype": "stepfilled", "alpha": 0.5, "edgecolor": colour}
        counts, _, _ = ax.hist(numbers, edges, color=colour, **look)
        if len(numbers):
            top = counts.argmax()
            look = {"color": colour, "ha": "center", "weight": "bold"}
            above = {"textcoords": "offset points", "xytext": (0, 5)}
            ax.annotate(f"{name} ({len(numbers):,})", (edges[top], counts[top]), **above, **look)

    # Draw the threshold, and write the answer on each side at its top.
    ax.axvline(0, color="black", linestyle="--", linewidth=1)
    top = {"xy": (0, 0.97), "xycoords": ("data", "axes fraction"), "va": "top"}
    left, right = sides
    ax.annotate(left, xytext=(-8, 0), textcoords="offset points", ha="right", **top)
    ax.annotate(right, xytext=(8, 0), textcoords="offset points", ha="left", **top)
    ax.margins(y=0.12)
    ax.set(title=title, xlabel=xlabel, ylabel="images")
    return figure


@in_style
def reliability_diagram(series: Mapping[str, Mapping[str, np.ndarray]], title: str) -> Figure:
    """Draw accuracy against confidence, and below it how many images each bin holds.

    series: {name: the bins of `evaluate.reliability`}, two at most. The accuracy of each bin has
    its 95 % Wilson interval. Bins of fewer than FEW images aren't drawn above: their intervals
    span half of the axis.
    """
    figure = Figure(figsize=(7.5, 5.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
    top.plot([0, 1], [0, 1], "--", color="#444444", label="perfectly calibrated")
    looks = [{"color": RED, "marker": "o"}, {"color": BLUE, "marker": "s"}]
    for (name, bins), look in zip(series.items(), looks, strict=False):
        shown = bins["count"] >= FEW
        images = bins["count"][shown]
        confidence, accuracy = bins["confidence"][shown], bins["accuracy"][shown]
        reach = np.abs(_wilson_intervals(accuracy, images) - accuracy)
        top.errorbar(confidence, accuracy, reach, label=name, capsize=3, linewidth=1.2, **look)
        bottom.stairs(bins["count"], bins["edges"], color=look["color"], linewidth=1.6)
    top.set(ylabel="accuracy, 95 % interval", title=title, ylim=(0, 1.02))
    top.legend(loc="upper left")
    bottom.axhline(FEW, color="#444444", linestyle=":", linewidth=1)
    few = f"fewer than {FEW}: not drawn above"
    bottom.text(0.98, FEW * 0.8, few, fontsize=9, ha="right", va="top")
    bottom.set(xlabel="confidence (largest probability)", ylabel="images", xlim=(0, 1))
    bottom.set(yscale="log", ylim=(0.7, None))
    for axis in (top.xaxis, top.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def _wilson_intervals(accuracy: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Return the lower and the upper ends, (2, bins), of the accuracies' 95 % intervals.

    accuracy, images: of each bin, (bins,) each.
    """
    pairs = zip(accuracy, images, strict=True)
    return np.array([wilson_interval(round(share * n), int(n)) for share, n in pairs]).T


@in_style
def coverage_curve(
    coverage: np.ndarray, accuracy: np.ndarray, named: Sequence[float], title: str
) -> Figure:
    """Draw the accuracy on the most confident images against their share, both in percent.

    coverage, accuracy: fractions (n,), in rising order of coverage.
    named: the shares at which the accuracy is written beside the curve.
    """
    figure, axes = new_figure(size=(7.5, 4))
    ax = axes[0, 0]
    ax.plot(coverage, accuracy, linewidth=1.6)
    look = {"textcoords": "offset points", "xytext": (-8, -3), "ha": "right", "va": "top"}
    for share in named:
        i = np.abs(coverage - share).argmin()
        ax.plot(coverage[i], accuracy[i], "o", color=BLUE)
        ax.annotate(f"{accuracy[i]:.2%} at {share:.0%}", (coverage[i], accuracy[i]), **look)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.margins(y=0.12)
    ax.set(title=title, xlabel="coverage (share of images answered, the most confident first)")
    ax.set(ylabel="accuracy on these images")
    return figure


def by_severity(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return a column of the table of shifted images' results, as families by severities.

    rows: one for each family and severity. The families keep their order.
    """
    table = rows.pivot(index="family", columns="severity", values=column)
    return table.loc[list(dict.fromkeys(rows.family))]


@in_style
def severity_maps(
    gains: Mapping[str, pd.DataFrame], significant: Mapping[str, pd.DataFrame], title: str
) -> Figure:
    """Draw gains in points, families by severities, as heat maps in one colour scale, two in a row.

    gains: {name: fractions (families, severities)}.
    significant: {name: bool (families, severities)}. Gains are bold where it is true.
    """
    families = len(next(iter(gains.values())))
    columns = min(len(gains), 2)
    rows = -(-len(gains) // columns)
    size = (1.4 + 3.2 * columns, 0.5 + rows * (0.7 + 0.34 * families))
    figure, axes = new_figure(rows, columns, size)
    figure.suptitle(title)
    limit = max(table.abs().to_numpy().max() for table in gains.values())
    scale = {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit}
    for ax, (name, table) in zip(axes.flat, gains.items(), strict=False):
        _draw_cells(ax, table, (100 * table).map(points), scale)
        for text, bold in zip(ax.texts, significant[name].to_numpy().flat, strict=True):
            text.set_weight("bold" if bold else "normal")
        ax.set(title=name, xlabel="severity", ylabel="")
        ax.tick_params(length=0, labelleft=ax in axes[:, 0], labelrotation=0)
    for ax in axes.flat[len(gains) :]:
        ax.set_axis_off()
    return figure


def points(gain: float) -> str:
    """Return a gain, given in points, as text with one decimal and its sign, unless that is 0.0."""
    text = f"{gain:+.1f}"
    return text if float(text) else "0.0"


@in_style
def accuracy_by_distance(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, xlabel: str
) -> Figure:
    """Draw accuracy against a distance on a log axis, one line per name, named at its end.

    series: {name: (distances, accuracies)}, accuracies as fractions, drawn in percent.
    """
    figure, axes = new_figure(size=(8, 4.6))
    ax, markers = axes[0, 0], itertools.cycle("osD^vPX*")
    outline = [patheffects.withStroke(linewidth=3, foreground="white")]
    for name, (x, y) in series.items():
        (line,) = ax.plot(x, y, next(markers) + "-", label=name, markersize=4, linewidth=1.6)

        # The name is to the right of the last point, or above that if a line runs through there,
        # or else to the left.
        others = [line for other, line in series.items() if other != name]
        heights = {(7, 0): y[-1], (7, 11): y[-1] + 0.04}
        free = [at for at, height in heights.items() if not _is_crossed(x[-1], height, others)]
        offset = free[0] if free else (-7, -8)
        ax.annotate(
            name,
            (x[-1], y[-1]),
            xytext=offset,
            textcoords="offset points",
            ha="left" if offset[0] > 0 else "right",
            va="center",
            color=0.7 * np.array(to_rgb(line.get_color())),  # darker, as thin letters look paler
            path_effects=outline,
        )
    ax.set_xscale("log")
    ax.set(title=title, xlabel=xlabel, ylabel="accuracy")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set_xlim(right=4 * ax.get_xlim()[1])  # room for the last name
    ax.xaxis.set_major_formatter("{x:g}")
    return figure


def _is_crossed(start: float, height: float, lines: Iterable[tuple]) -> bool:
    """Return whether a line passes where a short word would be, on a log axis.

    start: where the word starts. height: of the word, an accuracy. lines: (x, y) for each, with x
    ascending. The word is taken to be 0.3 decades long. A line within 0.02 of it counts.
    """
    places = np.log10(start) + np.linspace(0.04, 0.3, 8)
    passing = [np.interp(places, np.log10(x), y, left=np.nan, right=np.nan) for x, y in lines]
    return bool((np.abs(np.array(passing) - height) < 0.02).any())
