"""Arrays in, Figure out, in one look. Colours are Okabe and Ito's, told apart by the colour-blind
and in grey print; grey stands in the place of their yellow, which is hard to see on white."""

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from cifar_lib.data import CLASSES
from cifar_lib.files import write_atomically
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

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
_in_style = matplotlib.rc_context(
    STYLE
)  # a decorator: titles and legends take their look when they are made


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
    if not any(axes.images for axes in figure.axes):
        picture = picture.quantize(
            method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
        )  # half the bytes; photographs keep all their colours
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
    lines = max((t.count("\n") + 1 for t in titles), default=0)
    figure, axes = _figure(
        rows, columns, (max(width, 4), rows * (scale + 0.17 * lines) + (0.4 if title else 0))
    )
    figure.suptitle(title)
    for i, ax in enumerate(axes.flat):
        if i < len(images):
            _show(ax, images[i], titles[i] if len(titles) else "")
        else:
            ax.set_axis_off()
    for ax, label in zip(axes[:, 0], row_labels, strict=False):
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    return figure


@_in_style
def class_counts(counts: Mapping[str, Sequence[int]], title: str) -> Figure:
    """Bars of images a class, a colour for each set: {set: (10,)}."""
    figure, axes = _figure(size=(9.5, 3.4))
    ax, width = axes[0, 0], 0.86 / len(counts)
    for i, (name, values) in enumerate(counts.items()):
        places = np.arange(len(CLASSES)) + (i - (len(counts) - 1) / 2) * width
        bars = ax.bar(places, values, width, label=name)
        ax.bar_label(bars, fontsize=7, padding=1)
    ax.set_xticks(range(len(CLASSES)), CLASSES, rotation=30, ha="right")
    ax.set(ylabel="images", title=title)
    ax.grid(axis="x", visible=False)
    ax.margins(y=0.12)
    if len(counts) > 1:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@_in_style
def channel_histograms(histograms: Mapping[str, np.ndarray], title: str) -> Figure:
    """How often each value occurs in each channel, a panel for each set: {set: (3, 256)}."""
    figure, axes = _figure(1, len(histograms), (4.5 * len(histograms), 3.2))
    figure.suptitle(title)
    for ax, (name, counts) in zip(axes[0], histograms.items(), strict=True):
        for channel, (colour, hexadecimal) in zip(counts, CHANNEL_COLOURS.items(), strict=True):
            ax.plot(channel / channel.sum(), color=hexadecimal, label=colour, linewidth=1.2)
        ax.set(xlabel="pixel value", ylabel="share of pixels", title=name)
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    top = max(ax.get_ylim()[1] for ax in axes[0])
    for ax in axes[0]:
        ax.set_ylim(0, top)
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@_in_style
def channel_dots(values: Mapping[str, Sequence[float]], title: str, xlabel: str) -> Figure:
    """A row for each set, a dot for each channel: {set: (3,)}."""
    figure, axes = _figure(size=(7.5, 1.1 + 0.38 * len(values)))
    ax = axes[0, 0]
    for channel, (colour, hexadecimal) in enumerate(CHANNEL_COLOURS.items()):
        marker = "osD"[channel]
        dots = [row[channel] for row in values.values()]
        ax.plot(dots, range(len(values)), marker, color=hexadecimal, label=colour, markersize=7)
    ax.set_yticks(range(len(values)), values.keys())
    ax.invert_yaxis()
    ax.margins(y=0.2)
    ax.set(title=title, xlabel=xlabel)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@_in_style
def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str,
    percent: bool = False,
) -> Figure:
    """A line for each (x, y); a name that ends in "(published)" is dashed and grey, and limits the
    frame's height.

    Before batch norm has its statistics, a validation loss can be hundreds.
    """
    figure, axes = _figure(size=(7.5, 4))
    ax = axes[0, 0]
    greys, markers = iter(("#444444", "#888888", "#bbbbbb")), itertools.cycle("osD^vPX*")
    for name, (x, y) in series.items():
        published = name.endswith("(published)")
        dots = {"marker": next(markers)} if len(x) < 12 else {}
        look = {"color": next(greys), "linestyle": "--"} if published else dots
        ax.plot(x, y, label=name, markersize=4, linewidth=1.6, **look)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    top = 1.3 * max(
        (max(y) for name, (_, y) in series.items() if name.endswith("(published)")), default=np.inf
    )
    if ax.get_ylim()[1] > top:
        low = min(min(y) for _, y in series.values())
        ax.set_ylim(low - 0.05 * (top - low), top)
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if len(series) > 1:
        ax.legend()
    return figure


@_in_style
def frequencies(
    measured: Mapping[str, float], expected: float, deviation: float, title: str
) -> Figure:
    """How often each thing happened, as dots, with the expected share and the band of two standard
    deviations of chance around it."""
    figure, axes = _figure(size=(8, 3.2))
    ax = axes[0, 0]
    low, high = expected - 2 * deviation, expected + 2 * deviation
    ax.axhspan(low, high, color=COLOURS[4], alpha=0.25, label="expected ± 2 standard deviations")
    ax.axhline(expected, color=COLOURS[5], linestyle="--", label=f"expected {expected:.2%}")
    ax.plot(range(len(measured)), list(measured.values()), "o", label="measured")
    ax.set_xticks(range(len(measured)), measured.keys(), rotation=35, ha="right")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=2))
    ax.set(title=title, ylabel="share of draws")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@_in_style
def confusion(matrices: Mapping[str, np.ndarray], kind: str, title: str) -> Figure:
    """Confusion matrices (10, 10) side by side, rows true, columns predicted.

    kind: `counts`; `rows` (each row a share of its class); `difference` (signed). Colours leave the
    diagonal out, which would drown the mistakes.
    """
    figure, axes = _figure(1, len(matrices), (5.6 * len(matrices) + 0.4, 5.4))
    figure.suptitle(title)
    for ax, (name, matrix) in zip(axes[0], matrices.items(), strict=True):
        shown = matrix / np.maximum(matrix.sum(1, keepdims=True), 1) if kind == "rows" else matrix
        texts = np.vectorize(
            {"counts": str, "rows": _percent, "difference": _signed}[kind], otypes=[object]
        )(shown)
        colours = np.where(np.eye(len(matrix), dtype=bool), np.nan, shown.astype(float))
        limit = max(np.nanmax(np.abs(colours)), 1e-9)
        palette = "PuOr" if kind == "difference" else "Blues"
        span = (-limit, limit) if kind == "difference" else (0, limit)
        look = {
            "annot": texts,
            "fmt": "",
            "square": True,
            "cbar": False,
            "linewidths": 0.5,
            "annot_kws": {"size": 8},
        }
        sns.heatmap(colours, ax=ax, cmap=palette, vmin=span[0], vmax=span[1], **look)
        for i in range(len(matrix)):
            ax.text(
                i + 0.5, i + 0.5, texts[i, i], ha="center", va="center", fontsize=8, weight="bold"
            )
        ax.set_xticks(np.arange(len(CLASSES)) + 0.5, CLASSES, rotation=45, ha="right")
        ax.set_yticks(np.arange(len(CLASSES)) + 0.5, CLASSES, rotation=0)
        ax.set(title=name, xlabel="predicted", ylabel="true")
        ax.grid(False)
    return figure


def _percent(share: float) -> str:
    return f"{100 * share:.1f}" if share else "0"


def _signed(count: float) -> str:
    return f"{count:+.0f}" if count else "0"


@_in_style
def class_scores(scores: Mapping[str, Sequence[float]], title: str, xlabel: str) -> Figure:
    """A score of each class, a marker for each model: {model: (10,)}."""
    figure, axes = _figure(size=(7.5, 4))
    ax = axes[0, 0]
    for i, (name, values) in enumerate(scores.items()):
        ax.plot(values, range(len(CLASSES)), "osD^"[i], label=name, markersize=7)
    ax.set_yticks(range(len(CLASSES)), CLASSES)
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set(title=title, xlabel=xlabel)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@_in_style
def confused_pairs(pairs: Sequence[tuple[str, str, int]], title: str) -> Figure:
    """Bars of (true class, predicted class, images), most first."""
    figure, axes = _figure(size=(7.5, 0.9 + 0.3 * max(len(pairs), 3)))
    ax = axes[0, 0]
    pets = {"cat", "dog"}
    colours = [COLOURS[5] if {true, guess} == pets else COLOURS[0] for true, guess, _ in pairs]
    bars = ax.barh(range(len(pairs)), [n for _, _, n in pairs], color=colours)
    ax.bar_label(bars, padding=2, fontsize=8)
    ax.set_yticks(range(len(pairs)), [f"{true} taken for {guess}" for true, guess, _ in pairs])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(title=title, xlabel="images")
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
        _show(ax, images[i], captions[i])
        if overlays is not None:
            ax.imshow(
                overlays[i], cmap="inferno", alpha=0.55, vmin=0, vmax=1, interpolation="nearest"
            )
    if not len(images):
        figure.text(0.5, 0.4, "no such image", ha="center")
    return figure


@_in_style
def reliability_diagram(bins: Mapping[str, np.ndarray], error: float, title: str) -> Figure:
    """Accuracy against confidence in equal bins (see `evaluate.reliability`), and how many images
    each bin holds."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    edges, width = bins["edges"], np.diff(bins["edges"])
    top.bar(
        edges[:-1],
        np.nan_to_num(bins["accuracy"]),
        width,
        align="edge",
        edgecolor="white",
        label="accuracy",
    )
    top.plot([0, 1], [0, 1], "--", color="#444444", label="as sure as right")
    gap = {"color": COLOURS[5], "linewidth": 2.5, "label": "gap to the mean confidence"}
    top.vlines(bins["confidence"], bins["accuracy"], bins["confidence"], **gap)
    top.set(
        ylabel="accuracy", title=f"{title}\nexpected calibration error {error:.2%}", ylim=(0, 1.02)
    )
    top.legend(loc="upper left")
    bottom.bar(edges[:-1], bins["count"], width, align="edge", edgecolor="white", color="#888888")
    bottom.set(xlabel="confidence (largest probability)", ylabel="images", xlim=(0, 1))
    for ax in (top.xaxis, top.yaxis):
        ax.set_major_formatter(PercentFormatter(1, decimals=0))
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
