"""Arrays in, Figure out, in one look. Colours are Okabe and Ito's, told apart by the colour-blind
and in grey print; grey stands in the place of their yellow, which is hard to see on white."""

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.style
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import PercentFormatter
from PIL import Image

from cifar_lib.data import CLASSES
from cifar_lib.evaluate import wilson_interval
from cifar_lib.files import write_atomically

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#000000")
CHANNEL_COLOURS = {"red": "#D55E00", "green": "#009E73", "blue": "#0072B2"}
STYLE = {
    "axes.grid": True,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.dpi": 100,
    "figure.titlesize": 12,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
# A decorator, because titles and legends take their look when they are made. The style starts from
# Matplotlib's defaults: a user's matplotlibrc may ask for LaTeX, which isn't everywhere, or for a
# layout and colours that spoil the figures.
_in_style = matplotlib.style.context(STYLE, after_reset=True)


def _figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4)
) -> tuple[Figure, np.ndarray]:
    """A Figure that belongs to no global state, and its axes (rows, columns)."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


@_in_style
def to_png(figure: Figure, note: str | None = None, dpi: int = 110) -> bytes:
    """The figure as PNG; `note` is written across its foot, for figures that must say what they are
    made from."""
    if note:
        figure.supxlabel(note, fontsize=10, color=COLOURS[5], weight="bold")
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    picture = Image.open(drawn).convert("RGB")
    photographs = sum(len(axes.images) for axes in figure.axes)
    if photographs == 0 or photographs > 100:  # few photographs keep all their colours
        picture = picture.quantize(  # half the bytes of a chart, a third of those of a large sheet
            method=Image.Quantize.MAXCOVERAGE,
            kmeans=2 if photographs else 0,
            dither=Image.Dither.NONE,
        )
    picture.save(packed, format="png", optimize=True)
    return packed.getvalue()


def save_figure(figure: Figure, path: Path, note: str | None = None) -> bytes:
    """Write the figure as PNG to `path`, whole or not at all; returns the picture."""
    png = to_png(figure, note)
    write_atomically(path, png)
    return png


def _show(
    axes: Axes, image: np.ndarray, title: str = "", size: float = 8, colour: str = "black"
) -> None:
    axes.imshow(image, interpolation="nearest", vmin=0, vmax=255)
    axes.set_title(title, fontsize=size, loc="center", pad=3, color=colour)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


@_in_style
def image_grid(
    images: np.ndarray,
    columns: int,
    titles: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    title: str = "",
    scale: float = 0.85,
) -> Figure:
    """Pictures uint8 (n, H, W, 3), row by row, with a title each or a label a row; `scale`: inches
    a picture."""
    rows = -(-len(images) // columns)
    width = columns * scale + (0.9 if len(row_labels) else 0)
    in_rows = [titles[start : start + columns] for start in range(0, len(titles), columns)]
    lines = sum(max(t.count("\n") + 1 if t else 0 for t in row) for row in in_rows)
    height = rows * scale + 0.17 * lines + (0.4 if title else 0)
    figure, axes = _figure(rows, columns, (max(width, 4), height))
    figure.suptitle(title)
    for i, ax in enumerate(axes.flat):
        if i < len(images):
            _show(ax, images[i], titles[i] if len(titles) else "", size=9)
        else:
            ax.set_axis_off()
    for ax, label in zip(axes[:, 0], row_labels, strict=False):
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    return figure


@_in_style
def class_counts(counts: Mapping[str, Sequence[int]], title: str) -> Figure:
    """Bars of images per class, a colour for each set: {set: (10,)}."""
    figure, axes = _figure(size=(8, 3.4))
    ax, width = axes[0, 0], 0.86 / len(counts)
    for i, (name, values) in enumerate(counts.items()):
        places = np.arange(len(CLASSES)) + (i - (len(counts) - 1) / 2) * width
        bars = ax.bar(places, values, width, label=name)
        if len(counts) == 1:  # bars of several sets are too narrow for their numbers
            ax.bar_label(bars, fontsize=9, padding=1)
    ax.set_xticks(range(len(CLASSES)), CLASSES, rotation=30, ha="right")
    ax.set(ylabel="images", title=title)
    ax.grid(axis="x", visible=False)
    ax.margins(y=0.12)
    if len(counts) > 1:
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(counts), borderaxespad=0)
    return figure


@_in_style
def channel_histograms(histograms: Mapping[str, np.ndarray], title: str) -> Figure:
    """How often each value occurs in each channel, a panel for each set: {set: (3, 256)}."""
    figure, axes = _figure(1, len(histograms), (max(5.5, 4 * len(histograms)), 3.4))
    figure.suptitle(title)
    for ax, (name, counts) in zip(axes[0], histograms.items(), strict=True):
        for channel, (colour, hexadecimal) in zip(counts, CHANNEL_COLOURS.items(), strict=True):
            ax.plot(channel / channel.sum(), color=hexadecimal, label=colour, linewidth=1.2)
        ax.set(xlabel="pixel value", title=name)
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    top = max(ax.get_ylim()[1] for ax in axes[0])
    for ax in axes[0]:
        ax.set_ylim(0, top)
    axes[0, 0].set_ylabel("share of pixels")
    axes[0, 0].legend(loc="upper center", ncols=3, columnspacing=1, handlelength=1.2)
    return figure


@_in_style
def channel_dots(
    values: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str
) -> Figure:
    """A row for each set, a dot for each channel: {set: (means (3,), standard deviations (3,))}."""
    figure, axes = _figure(1, 2, (8, 1.2 + 0.38 * len(values)))
    for i, (ax, xlabel) in enumerate(zip(axes[0], ("mean", "standard deviation"), strict=True)):
        for channel, (colour, hexadecimal) in enumerate(CHANNEL_COLOURS.items()):
            dots = [row[i][channel] for row in values.values()]
            ax.plot(dots, range(len(values)), "osD"[channel], color=hexadecimal, label=colour)
        ax.set_yticks(range(len(values)), values.keys() if i == 0 else [])
        ax.invert_yaxis()
        ax.margins(x=0.08, y=0.12)
        ax.set_xlabel(xlabel)
    axes[0, 0].set_title(title)
    axes[0, 1].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0)
    return figure


@_in_style
def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str,
    percent: bool = False,
) -> Figure:
    """A line for each (x, y)."""
    figure, axes = _figure(size=(7.5, 4))
    ax = axes[0, 0]
    markers = itertools.cycle("osD^vPX*")
    for name, (x, y) in series.items():
        dots = {"marker": next(markers)} if len(x) < 12 else {}
        ax.plot(x, y, label=name, markersize=4, linewidth=1.6, **dots)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if len(series) > 1:
        ax.legend()
    return figure


@_in_style
def epoch_curves(
    series: Mapping[str, Sequence[float]],
    ylabel: str,
    title: str,
    zoom: tuple[float, float] | None = None,
) -> Figure:
    """A line over the epochs for each name, told apart by colour and dashes; accuracies in percent.

    `zoom`: an inset shows the second half of the epochs between these two values.
    """
    figure, axes = _figure(size=(7.5, 5 if zoom else 4))
    ax, longest = axes[0, 0], max(len(values) for values in series.values())
    ax.set(xlabel="epoch, counted from 0", ylabel=ylabel, title=title)
    panels = [ax]
    if zoom:
        first, *_, last = next(iter(series.values()))
        place = (0.34, 0.11 if first < last else 0.38, 0.64, 0.54)  # where the lines are not
        inset = ax.inset_axes(place, ylim=zoom, xlim=(longest / 2, longest))
        panels.append(inset)
    for panel in panels:
        dashes = itertools.cycle(("-", "--", "-.", ":"))
        for name, values in series.items():
            panel.plot(range(len(values)), values, next(dashes), label=name, linewidth=1.6)
        if ylabel == "accuracy":
            panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if zoom:
        ax.indicate_inset_zoom(inset, edgecolor="black")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


# The colour of a diagram's box, by what its text names: light, as the text is black.
BOXES = {"conv": "#CCE3F3", "stage": "#CCE3F3", "norm": "#FBE6C0", "": "#EFEFEF"}


@_in_style
def block_diagram(blocks: Mapping[str, tuple[Sequence[int], Sequence[int]]], title: str) -> Figure:
    """BasicBlocks side by side, each from the top down: {name: (shape in, shape out)}, with shapes
    (channels, H, W)."""
    figure, axes = _figure(1, len(blocks), (3.9 * len(blocks), 5.3))
    figure.suptitle(title)
    for ax, (name, (before, after)) in zip(axes[0], blocks.items(), strict=True):
        _canvas(ax, 3.9, 4.75)
        ax.set_title(name, loc="center", fontsize=10)
        stride = before[1] // after[1]
        step = f", stride {stride}" if stride > 1 else ""
        rows = [f"3×3 convolution{step}", "batch norm", "ReLU", "3×3 convolution", "batch norm"]
        rows += ["+", "ReLU"]
        _arrow(ax, (1.2, 4.7), (1.2, 4.23))
        for i, text in enumerate(rows):
            _box(ax, (1.2, 4.05 - 0.6 * i), text, 0.36 if text == "+" else 2.05)
            _arrow(ax, (1.2, 3.87 - 0.6 * i), (1.2, 3.63 - 0.6 * i))
        for y, shape in ((4.55, before), (3.75, after), (1.95, after), (0.15, after)):
            ax.text(1.3, y, _shape(shape), va="center", fontsize=9)
        _arrow(ax, (1.2, 4.4), (3.15, 4.4), (3.15, 1.05), (1.38, 1.05))
        if stride > 1:
            _box(ax, (3.15, 3.45), f"1×1 convolution,\nstride {stride}", 1.35, 0.5)
            _box(ax, (3.15, 2.75), "batch norm", 1.35)
        added = _shape(after) if stride > 1 else "the input itself"
        ax.text(3.1, 0.87, added, ha="right", va="center", fontsize=9)
    return figure


@_in_style
def network_diagram(parts: Mapping[str, Sequence[int]], title: str) -> Figure:
    """A network's parts from left to right: {text of its box: shape that leaves it}."""
    lines = [max(map(len, text.splitlines())) for text in parts]
    widths = [0.07 * characters + 0.2 for characters in lines]
    arrow = 0.55
    size = (sum(widths) + arrow * len(parts) + 0.5, 1.5)
    figure, axes = _figure(size=size)
    figure.suptitle(title)
    ax, x = axes[0, 0], 0.02
    _canvas(ax, size[0], 1.0)
    for (text, shape), width in zip(parts.items(), widths, strict=True):
        _box(ax, (x + width / 2, 0.5), text, width, 0.9)
        x += width
        _arrow(ax, (x, 0.5), (x + arrow, 0.5))
        middle = x + 0.46 * arrow
        ax.text(middle, 0.55, shape[0], ha="center", va="bottom", fontsize=9)
        ax.text(middle, 0.43, "×".join(map(str, shape[1:])), ha="center", va="top", fontsize=8.5)
        x += arrow
    ax.text(x + 0.04, 0.5, "logits", va="center", fontsize=9.5)
    return figure


def _canvas(ax: Axes, width: float, height: float) -> None:
    """Axes to draw a diagram on, in inches or so."""
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.set_axis_off()


def _box(
    ax: Axes, middle: tuple[float, float], text: str, width: float, height: float = 0.36
) -> None:
    corner = (middle[0] - width / 2, middle[1] - height / 2)
    colour = next(colour for word, colour in BOXES.items() if word in text)
    look = {"boxstyle": "round,pad=0,rounding_size=0.06", "facecolor": colour, "zorder": 3}
    ax.add_patch(FancyBboxPatch(corner, width, height, edgecolor="#555555", **look))
    ax.text(*middle, text, ha="center", va="center", fontsize=9.5, zorder=4)


def _arrow(ax: Axes, *points: tuple[float, float]) -> None:
    """A line through all points, with its head at the last."""
    ax.plot(*zip(*points, strict=True), color="#333333", linewidth=1.2)
    head = {"arrowstyle": "-|>", "color": "#333333", "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", points[-1], points[-2], arrowprops=head)


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


@_in_style
def search_trials(trials: pd.DataFrame, names: Mapping[str, str], own: int, title: str) -> Figure:
    """The accuracy of a search's trials against each of some parameters, a panel for each: {column:
    its name}, on a logarithmic axis where the values span more than a factor of ten.

    trials: as `tune.trials_table` gives them; the one with the number `own` is marked.
    """
    figure, axes = _figure(1, len(names), (2.7 * len(names), 3.3))
    figure.suptitle(title)
    others, marked = trials[trials.number != own], trials[trials.number == own]
    for ax, (column, name) in zip(axes[0], names.items(), strict=True):
        ax.plot(others[column], others.accuracy, "o", label="proposed by the search")
        ax.plot(marked[column], marked.accuracy, "D", color=COLOURS[5], label="Table 1's values")
        if trials[column].max() > 10 * trials[column].min():
            ax.set_xscale("log")
        ax.set(xlabel=name)
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.tick_params(labelleft=ax is axes[0, 0])
    axes[0, 0].set_ylabel("validation accuracy")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


@_in_style
def frequencies(
    measured: Mapping[str, float], expected: float, deviation: float, title: str
) -> Figure:
    """How often each thing happened, as dots, with the expected share and the band of two standard
    deviations of chance around it."""
    figure, axes = _figure(size=(8, 3.6))
    ax, values = axes[0, 0], list(measured.values())
    low, high = expected - 2 * deviation, expected + 2 * deviation
    ax.axhspan(low, high, color=COLOURS[4], alpha=0.25, label="± 2 standard deviations")
    ax.axhline(expected, color=COLOURS[5], linestyle="--", label=f"expected {expected:.2%}")
    ax.plot(range(len(measured)), values, "o", label="measured")
    ax.set_xticks(range(len(measured)), measured.keys(), rotation=35, ha="right")
    ax.set_ylim(min(low - 2 * deviation, *values), max(high + 4 * deviation, *values))
    ax.locator_params(axis="y", nbins=8, steps=[1, 2, 5, 10])
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=2))
    ax.set(title=title, ylabel="share of draws")
    ax.legend(loc="upper center", ncols=3)
    return figure


@_in_style
def confusion(
    matrices: Mapping[str, np.ndarray], title: str, unit: str, signed: bool = False
) -> Figure:
    """Confusion matrices (10, 10) of whole numbers side by side, rows true, columns predicted.

    One colour scale for all, in `unit`; around 0 where `signed`. Colours leave the diagonal out,
    which would drown the mistakes.
    """
    figure, axes = _figure(1, len(matrices), (3.4 * len(matrices) + 1.5, 4.8))
    figure.set_layout_engine("compressed")  # no gaps around axes of a fixed shape
    figure.suptitle(title)
    diagonal = np.eye(len(CLASSES), dtype=bool)
    limit = max(np.abs(matrix[~diagonal]).max() for matrix in matrices.values())
    palette, low = ("PuOr", -limit) if signed else ("Blues", 0)
    for i, (ax, (name, matrix)) in enumerate(zip(axes[0], matrices.items(), strict=True)):
        colours = np.where(diagonal, np.nan, matrix)
        texts = np.vectorize(_signed if signed else str, otypes=[object])(matrix)
        look = {"annot": texts, "fmt": "", "annot_kws": {"size": 9}, "cbar": False}
        sns.heatmap(
            colours, ax=ax, cmap=palette, vmin=low, vmax=limit, square=True, linewidths=0.5, **look
        )
        for k in range(len(CLASSES)):  # nan has no text
            ax.text(k + 0.5, k + 0.5, texts[k, k], ha="center", va="center", size=9, weight="bold")
        ax.set_xticks(np.arange(len(CLASSES)) + 0.5, CLASSES, rotation=45, ha="right")
        ax.set_yticks(np.arange(len(CLASSES)) + 0.5, CLASSES, rotation=0)
        ax.tick_params(length=0, labelleft=i == 0)
        ax.set(title=name, xlabel="predicted", ylabel="" if i else "true")
        ax.grid(False)
    figure.colorbar(axes[0, 0].collections[0], ax=axes, label=unit, shrink=0.75, pad=0.02)
    return figure


def _signed(count: int) -> str:
    return f"{count:+d}" if count else "0"


@_in_style
def confused_pairs(
    pairs: Sequence[tuple[str, str, int]], published: Sequence[int], title: str, xlabel: str
) -> Figure:
    """Bars of (true class, predicted class, images), most first, and the published run's numbers
    of the same mistakes."""
    figure, axes = _figure(size=(7.5, 1.2 + 0.3 * max(len(pairs), 3)))
    ax = axes[0, 0]
    pets = {"cat", "dog"}
    colours = [COLOURS[5] if {true, guess} == pets else COLOURS[0] for true, guess, _ in pairs]
    ax.barh(range(len(pairs)), [n for _, _, n in pairs], color=colours, label="this network")
    look = {"color": "white", "va": "center", "fontsize": 9, "transform": ax.get_yaxis_transform()}
    for i, (_, _, n) in enumerate(pairs):
        ax.text(0.008, i, str(n), **look)  # at the foot: at the tip the diamond may be
    ax.plot(published, range(len(pairs)), "D", color=COLOURS[7], label="published run")
    ax.set_yticks(range(len(pairs)), [f"{true} taken for {guess}" for true, guess, _ in pairs])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(title=title, xlabel=xlabel)
    ax.legend(loc="lower right")
    return figure


@_in_style
def contact_sheet(
    groups: Mapping[str, tuple[np.ndarray, Sequence[str], np.ndarray]],
    title: str,
    columns: int = 12,
) -> Figure:
    """Many small pictures: {heading: (uint8 (n, 32, 32, 3), a caption each, bool (n,): framed)}."""
    rows = [max(-(-len(captions) // columns), 1) for _, captions, _ in groups.values()]
    width, height, side = 0.7, 1.0, 64 / 110  # inches; side: two pixels of the PNG a pixel
    size = (columns * width, sum(rows) * height + 0.35 * len(rows) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
    for ax, n, (heading, (pictures, captions, framed)) in zip(
        axes, rows, groups.items(), strict=True
    ):
        ax.set_title(heading)
        ax.set_axis_off()
        for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            x, y = i % columns * width + 0.06, i // columns * height + 0.03
            place = (x, x + side, y + side, y)  # left, right, bottom, top
            ax.imshow(picture, extent=place, interpolation="nearest", vmin=0, vmax=255)
            look = {"size": 9, "ha": "center", "va": "top", "linespacing": 1.05}
            ax.text(x + side / 2, y + side + 0.04, caption, **look)
            if framed[i]:
                frame = {"fill": False, "edgecolor": COLOURS[5], "linewidth": 2.5}
                ax.add_patch(Rectangle((x, y), side, side, **frame))
        ax.set(xlim=(0, columns * width), ylim=(n * height, 0), aspect="equal")
        if not captions:
            ax.text(0.04, 0.4, "no such image")
    return figure


@_in_style
def two_histograms(
    values: Mapping[str, np.ndarray], title: str, xlabel: str, sides: tuple[str, str]
) -> Figure:
    """Two histograms over each other: {name: (n,)}; `sides`: what is answered left and right of the
    threshold at 0."""
    figure, axes = _figure(size=(8, 3.8))
    ax = axes[0, 0]
    everything = np.concatenate(list(values.values()))
    low, high, width = everything.min(), everything.max(), np.ptp(everything) / 60
    # multiples of the width: the threshold is an edge, no bin lies on both sides
    edges = width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)
    for (name, numbers), colour in zip(values.items(), (COLOURS[0], COLOURS[5]), strict=True):
        look = {"histtype": "stepfilled", "alpha": 0.5, "edgecolor": colour}
        ax.hist(numbers, edges, color=colour, label=f"{name} ({len(numbers):,})", **look)
    ax.axvline(0, color="black", linestyle="--", linewidth=1)
    for side, x, align in zip(sides, (-8, 8), ("right", "left"), strict=True):
        ax.annotate(
            side,
            (0, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(x, 0),
            textcoords="offset points",
            ha=align,
            va="top",
        )
    ax.set(title=title, xlabel=xlabel, ylabel="images")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@_in_style
def inspection(
    picture: np.ndarray,
    probabilities: Mapping[str, float],
    maps: Mapping[str, np.ndarray],
    neighbours: np.ndarray,
    captions: Sequence[str],
    title: str,
) -> Figure:
    """One image: the picture uint8 (32, 32, 3), two heat maps (32, 32) in [0, 1] over it, bars of
    probabilities, and below them its five neighbours uint8 (5, 32, 32, 3)."""
    figure = Figure(figsize=(8, 4.3), layout="constrained")
    figure.suptitle(title)
    upper, lower = figure.subfigures(2, 1)
    lower.suptitle("nearest training images, and their cosine", size=10)
    *shown, bars = upper.subplots(1, 4, width_ratios=(1, 1, 1, 1.4))
    _show(shown[0], picture, "test image", size=9)
    for ax, (name, heat) in zip(shown[1:], maps.items(), strict=True):
        _show(ax, picture, name, size=9)
        ax.imshow(heat, cmap="inferno", alpha=0.55, vmin=0, vmax=1, interpolation="nearest")
    for ax, neighbour, caption in zip(lower.subplots(1, 5), neighbours, captions, strict=True):
        _show(ax, neighbour, caption, size=9)
    names, values = list(probabilities), list(probabilities.values())
    bars.bar_label(bars.barh(names, values), [f"{p:.0%}" for p in values], padding=2)
    bars.set(xlim=(0, 1.25), xticks=[], title="probability")
    bars.invert_yaxis()
    bars.grid(False)
    return figure


@_in_style
def gallery(
    images: np.ndarray,
    captions: Sequence[str],
    title: str,
    columns: int = 6,
    overlays: np.ndarray | None = None,
) -> Figure:
    """Pictures uint8 (n, 32, 32, 3) with captions of two or three lines; `overlays` float (n, 32,
    32) in [0, 1]: heat.

    With no picture at all, the figure says so.
    """
    rows = max(-(-len(images) // columns), 1)
    lines = max((c.count("\n") + 1 for c in captions), default=1)
    figure, axes = _figure(rows, columns, (1.45 * columns, rows * (1.25 + 0.17 * lines) + 0.5))
    figure.suptitle(title)
    for i, ax in enumerate(axes.flat):
        if i >= len(images):
            ax.set_axis_off()
            continue
        _show(ax, images[i], captions[i], size=9)
        if overlays is not None:
            ax.imshow(
                overlays[i], cmap="inferno", alpha=0.55, vmin=0, vmax=1, interpolation="nearest"
            )
    if not len(images):
        figure.text(0.5, 0.4, "no such image", ha="center")
    return figure


@_in_style
def reliability_diagram(series: Mapping[str, Mapping[str, np.ndarray]], title: str) -> Figure:
    """Accuracy against confidence, {name: the bins of `evaluate.reliability`}, with Wilson's 95 %
    interval of each bin, and how many images each bin holds."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], "--", color="#444444", label="perfectly calibrated")
    looks = ((COLOURS[5], "o"), (COLOURS[0], "s"))  # two series at most
    for (name, bins), (colour, marker) in zip(series.items(), looks, strict=False):
        filled = bins["count"] > 0
        n, x, y = bins["count"][filled], bins["confidence"][filled], bins["accuracy"][filled]
        ends = np.array([wilson_interval(round(a * k), int(k)) for a, k in zip(y, n, strict=True)])
        reach = np.abs(ends.T - y)
        look = {"color": colour, "marker": marker, "capsize": 3, "linewidth": 1.2}
        top.errorbar(x, y, reach, label=name, **look)
        bottom.stairs(bins["count"], bins["edges"], color=colour, linewidth=1.6)
    top.set(ylabel="accuracy, 95 % interval", title=title, ylim=(0, 1.02))
    top.legend(loc="lower right")
    bottom.set(xlabel="confidence (largest probability)", ylabel="images", xlim=(0, 1))
    for axis in (top.xaxis, top.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


@_in_style
def intervals(values: Mapping[str, tuple[float, float, float]], title: str, xlabel: str) -> Figure:
    """A dot and its interval a row: {name: (value, low, high)}."""
    figure, axes = _figure(size=(7.5, 1.1 + 0.42 * len(values)))
    ax = axes[0, 0]
    for i, (value, low, high) in enumerate(values.values()):
        ax.errorbar(
            value, i, xerr=[[value - low], [high - value]], fmt="o", color=COLOURS[0], capsize=3
        )
        ax.annotate(
            f"{value:.2%}",
            (value, i),
            textcoords="offset points",
            xytext=(0, 7),
            ha="center",
            fontsize=9,
        )
    ax.set_yticks(range(len(values)), values.keys())
    ax.invert_yaxis()
    ax.margins(y=0.25)
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.set(title=title, xlabel=xlabel)
    return figure


def by_severity(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """A column of an ablation's rows as families (in their order) by severities."""
    table = rows.pivot(index="family", columns="severity", values=column)
    return table.loc[list(dict.fromkeys(rows.family))]


@_in_style
def severity_maps(
    tables: Mapping[str, pd.DataFrame], title: str, sure: Mapping[str, pd.DataFrame] | None = None
) -> Figure:
    """Families by severities, a panel for each table of fractions, two in a row; in percent.

    With `sure` (bool, same shape) the tables are differences: signed, one colour scale around 0,
    bold where sure.
    """
    families = len(next(iter(tables.values())))
    columns = min(len(tables), 2)
    rows = -(-len(tables) // columns)
    size = (1.4 + 3.2 * columns, 0.5 + rows * (0.7 + 0.34 * families))
    figure, axes = _figure(rows, columns, size)
    figure.suptitle(title)
    limit = max(table.abs().to_numpy().max() for table in tables.values())
    look = (
        {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit}
        if sure
        else {"cmap": "Blues", "vmin": 0, "vmax": 1}
    )
    for ax, (name, table) in zip(axes.flat, tables.items(), strict=False):
        texts = (100 * table).map(lambda value: f"{value:+.1f}" if sure else f"{value:.1f}")
        sns.heatmap(
            table,
            ax=ax,
            annot=texts,
            fmt="",
            cbar=False,
            linewidths=0.5,
            annot_kws={"size": 9},
            **look,
        )
        if sure:
            for text, bold in zip(ax.texts, sure[name].to_numpy().flat, strict=True):
                text.set_weight("bold" if bold else "normal")
        ax.set(title=name, xlabel="severity", ylabel="")
        ax.tick_params(length=0, labelleft=ax in axes[:, 0], labelrotation=0)
        ax.grid(False)
    for ax in axes.flat[len(tables) :]:
        ax.set_axis_off()
    return figure


@_in_style
def shift_pictures(pictures: np.ndarray, accuracy: pd.DataFrame, title: str) -> Figure:
    """One picture unshifted and at every severity, a row for each family: uint8 (families, 1 +
    severities, H, W, 3).

    `accuracy`: families by severities, fractions, printed above the pictures in percent.
    """
    rows, columns = pictures.shape[:2]
    figure, axes = _figure(rows, columns, (1 + 1.05 * columns, 0.7 + 1.2 * rows))
    figure.suptitle(title)
    for line, family, images, shares in zip(
        axes, accuracy.index, pictures, accuracy.to_numpy(), strict=True
    ):
        _show(line[0], images[0], "unshifted", size=9)
        line[0].set_ylabel(family, rotation=0, ha="right", va="center")
        for ax, image, severity, share in zip(
            line[1:], images[1:], accuracy.columns, shares, strict=True
        ):
            _show(ax, image, f"{severity}: {share:.1%}", size=9)
    return figure
