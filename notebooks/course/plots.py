"""Charts of the data, of training and of scores. Charts of mistakes are in error_plots."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cifar_lib.data import CLASSES, ImageSet
from notebooks.course.style import BLACK, BLUE, LIGHT_BLUE, RED, in_style, new_figure, show_image

CHANNEL_COLOURS = {"red": "#D55E00", "green": "#009E73", "blue": "#0072B2"}
CHANNEL_MARKERS = {"red": "o", "green": "s", "blue": "D"}
CHANNEL_STEP = 0.2  # between the heights of two channels' dots, as a share of a row


@in_style
def channel_histograms(histograms: Mapping[str, np.ndarray], title: str) -> Figure:
    """Draw how often each pixel value occurs in each channel, one panel per set.

    histograms: {set: counts (3, 256)}.
    """
    figure, axes = new_figure(1, len(histograms), (max(5.5, 4 * len(histograms)), 3.4))
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


@in_style
def channel_dots(
    statistics: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str
) -> Figure:
    """Draw the channels' means and standard deviations, one row per set, one dot per channel.

    statistics: {set: (means (3,), standard deviations (3,))}. In each row red is drawn a little
    above green, and blue a little below, so that no dot hides another.
    """
    figure, axes = new_figure(1, 2, (8, 1.4 + 0.42 * len(statistics)))
    figure.suptitle(title)
    rows = np.arange(len(statistics))
    for i, xlabel in enumerate(("mean", "standard deviation")):
        ax = axes[0, i]
        for channel, (colour, hexadecimal) in enumerate(CHANNEL_COLOURS.items()):
            dots = [pair[i][channel] for pair in statistics.values()]
            heights = rows + (channel - 1) * CHANNEL_STEP
            ax.plot(dots, heights, CHANNEL_MARKERS[colour], color=hexadecimal, label=colour)
        ax.set_yticks(rows, statistics.keys() if i == 0 else [])
        ax.invert_yaxis()
        ax.margins(x=0.08, y=0.12)
        ax.set_xlabel(xlabel)
    axes[0, 1].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0)
    return figure


@in_style
def frequencies(
    measured: Mapping[str, float], expected: float, deviation: float, title: str
) -> Figure:
    """Draw how often each thing happened, as dots beside what chance allows.

    measured: {name: share of draws}.
    expected, deviation: the mean and the standard deviation of a share if only chance decides. The
    band extends two standard deviations to both sides of the mean.
    """
    figure, axes = new_figure(size=(8, 3.6))
    ax, values = axes[0, 0], list(measured.values())
    low, high = expected - 2 * deviation, expected + 2 * deviation
    ax.axhspan(low, high, color=LIGHT_BLUE, alpha=0.25)
    ax.axhline(expected, color=RED, linestyle="--")
    ax.plot(range(len(measured)), values, "o", label="measured")
    ax.set_xticks(range(len(measured)), measured.keys(), rotation=35, ha="right")
    ax.set_ylim(min(low - deviation, *values), max(high + deviation, *values))
    ax.locator_params(axis="y", nbins=8, steps=[1, 2, 5, 10])
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=2))
    ax.set(title=title, ylabel="share of draws")

    # Name the line and the edges of the band, to the right of them.
    names = {
        high: ("+2 standard\ndeviations", BLUE),
        expected: (f"expected\n{expected:.2%}", RED),
        low: ("−2 standard\ndeviations", BLUE),
    }
    beside = {"xycoords": ax.get_yaxis_transform(), "xytext": (6, 0), "va": "center"}
    for height, (name, colour) in names.items():
        ax.annotate(name, (1, height), textcoords="offset points", color=colour, **beside)
    return figure


@in_style
def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str,
    percent: bool = False,
) -> Figure:
    """Draw one line per series, with markers where its points are few.

    series: {name: (x, y)}. With `percent`, y are fractions and the axis is labelled in percent.
    """
    figure, axes = new_figure(size=(7.5, 4))
    ax = axes[0, 0]
    markers = itertools.cycle("osD^vPX*")
    for name, (x, y) in series.items():
        marker = next(markers) if len(x) < 12 else None
        ax.plot(x, y, label=name, marker=marker, markersize=4, linewidth=1.6)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if len(series) > 1:
        ax.legend()
    return figure


@in_style
def epoch_curves(series: Mapping[str, Sequence[float]], ylabel: str, title: str) -> Figure:
    """Draw one line over the epochs per name, told apart by colour and dashes.

    series: {name: one value per epoch}. If `ylabel` is "accuracy", the values are fractions, and
    are drawn in percent. Epochs are numbered from 1.
    """
    figure, axes = new_figure(size=(7.5, 3.6))
    ax, dashes = axes[0, 0], itertools.cycle(("-", "--", "-.", ":"))
    for name, values in series.items():
        ax.plot(range(1, len(values) + 1), values, next(dashes), label=name, linewidth=1.6)
    ax.set(xlabel="epoch", ylabel=ylabel, title=title)
    if ylabel == "accuracy":
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.legend()
    return figure


@in_style
def reproduction(
    frames: Mapping[str, pd.DataFrame], quantity: str, title: str, last: int = 20
) -> Figure:
    """Draw a published curve through the band of a few runs, for each set of images.

    frames: as `reference.sixty_epochs` returns them.
    quantity: "loss" or "accuracy". Accuracies are fractions, and are drawn in percent.

    The panel on the right shows only the final `last` epochs, and gives the values after the final
    one.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    is_share = quantity == "accuracy"
    colours = dict(zip(frames, (BLUE, RED), strict=True))
    for name, frame in frames.items():
        for ax, rows in ((left, frame), (right, frame.tail(last))):
            band = {"color": colours[name], "alpha": 0.3, "linewidth": 0}
            ax.fill_between(rows.index, rows.lowest, rows.highest, **band)
            ax.plot(rows.index, rows.published, color=colours[name], linewidth=1.3)
    for ax, name in ((left, "All epochs"), (right, f"The last {last} epochs")):
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if is_share:
            ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    left.set_ylabel(quantity)

    # Name the lines where they end.
    form = "{:.2%}" if is_share else "{:.4f}"
    texts, heights = {}, {}
    for name, frame in frames.items():
        published, lowest, highest = map(form.format, frame.iloc[-1])
        texts[name] = f"{name}:\npublished {published}\nours {lowest} to {highest}"
        heights[name] = frame.published.iloc[-1]
    _label_ends(right, heights, texts, colours, apart=0.2)
    return figure


def _label_ends(
    ax: Axes,
    heights: Mapping[str, float],
    texts: Mapping[str, str],
    colours: Mapping[str, str],
    apart: float,
) -> None:
    """Write texts to the right of the axes, at the heights of two lines' ends.

    heights: in the units of the y axis. If they are closer than `apart`, a fraction of the axes'
    height, the texts move away from each other.
    """
    low, high = ax.get_ylim()
    at = {name: (height - low) / (high - low) for name, height in heights.items()}
    upper, lower = sorted(at, key=lambda name: -at[name])
    missing = max(apart - (at[upper] - at[lower]), 0)
    at[upper] += missing / 2
    at[lower] -= missing / 2
    for name, height in at.items():
        place = {"xycoords": "axes fraction", "va": "center", "annotation_clip": False}
        ax.annotate(texts[name], (1.02, height), fontsize=9, color=colours[name], **place)


@in_style
def smoothing_losses(p: np.ndarray, losses: Mapping[str, np.ndarray], title: str) -> Figure:
    """Draw the loss against the probability `p` of the true class, and mark where it is lowest.

    p: (n,), rising. losses: {name: (n,)}; the name is written at the line's right end.
    """
    figure, axes = new_figure(size=(7.5, 3.8))
    ax = axes[0, 0]
    for (name, loss), colour in zip(losses.items(), (BLACK, BLUE, RED), strict=True):
        ax.plot(p, loss, color=colour, linewidth=1.6)
        look = {"textcoords": "offset points", "color": colour, "fontsize": 9}
        ax.annotate(name, (p[-1], loss[-1]), xytext=(5, 0), va="center", **look)
        i = loss.argmin()
        if i < len(p) - 1:  # else the loss falls to the end
            ax.plot(p[i], loss[i], "o", color=colour, markersize=5)
            text = f"{loss[i]:.3f} at {p[i]:.0%}"
            ax.annotate(text, (p[i], loss[i]), xytext=(0, -6), ha="center", va="top", **look)
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set(xlabel="probability of the true class", ylabel="loss of one image", title=title)
    return figure


@in_style
def live_run(history: pd.DataFrame, epochs: int, images: ImageSet, answers: np.ndarray) -> Figure:
    """Draw a training run so far: its accuracy, and the network's answers to a few images.

    history: one row per finished epoch. epochs: their number at the end of the run.
    images: n labelled images. answers: the predicted probabilities, float (epochs so far, n, 10);
    NaN for epochs whose probabilities weren't kept.
    """
    figure = Figure(figsize=(10.5, 0.5 * len(images) + 0.9), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.35))
    _draw_progress(left.subplots(), history, epochs)

    # A table: a row per image, with its picture, and a column for each of at most five epochs.
    shown = np.unique(np.linspace(0, epochs - 1, min(epochs, 5)).round().astype(int))
    right.suptitle(f"Answers to {len(images)} test images (bold: correct)", size=11)
    axes = right.subplots(len(images), 1 + len(shown), width_ratios=(0.55, *[1] * len(shown)))
    pictures = images.images.permute(0, 2, 3, 1).cpu().numpy()  # (n, 32, 32, 3)
    for i, row in enumerate(axes):
        show_image(row[0], pictures[i])
        label = int(images.labels[i])
        row[0].set_ylabel(CLASSES[label], rotation=0, ha="right", va="center", fontsize=9)
        for ax, epoch in zip(row[1:], shown, strict=True):
            _draw_answer(ax, answers[epoch, i] if epoch < len(answers) else None, label)
    for ax, epoch in zip(axes[0, 1:], shown, strict=True):
        ax.set_title(f"epoch {epoch + 1}", size=9, loc="center", pad=3)
    return figure


def _draw_progress(ax: Axes, history: pd.DataFrame, epochs: int) -> None:
    """Draw the accuracy by epoch, on axes that already have room for all epochs."""
    names = {"train_accuracy": "training images", "test_accuracy": "test images"}
    for (column, name), look in zip(names.items(), ("o-", "s--"), strict=True):
        ax.plot(history.epoch + 1, history[column], look, label=name, markersize=4)
    ax.set(xlim=(0.5, epochs + 0.5), ylim=(0, 1), xlabel="epoch", title="Accuracy after each epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.axhline(0.1, color=RED, linestyle=":", label="guessing")
    ax.legend(loc="upper left")


def _draw_answer(ax: Axes, probabilities: np.ndarray | None, label: int) -> None:
    """Write an answer with its probability into a cell of the table.

    The cell stays empty if there are no probabilities yet (None), or if they weren't kept (NaN).
    """
    ax.set_axis_off()
    if probabilities is None or np.isnan(probabilities).any():
        return
    answer = int(probabilities.argmax())
    is_correct = answer == label
    text = f"{CLASSES[answer]}\n{probabilities[answer]:.0%}"
    look = {"weight": "bold", "color": BLUE} if is_correct else {"color": RED}
    ax.text(0.5, 0.5, text, ha="center", va="center", size=9, linespacing=1.1, **look)


@in_style
def search_trials(
    trials: pd.DataFrame, names: Mapping[str, str], marked: int, title: str
) -> Figure:
    """Draw the accuracy of a search's trials against some hyperparameters, one panel for each.

    trials: as `reference.trials_table` gives them. The trial with the number `marked`,
    which has Table 1's values, is drawn in red.
    names: {column: what its axis is called}. An axis is logarithmic where the values are above 0
    and span more than a factor of ten.
    """
    figure, axes = new_figure(1, len(names), (2.7 * len(names), 3.3))
    figure.suptitle(title)
    is_marked = trials.number == marked
    for ax, (column, name) in zip(axes[0], names.items(), strict=True):
        for rows, look, label in (
            (trials[~is_marked], {"marker": "o"}, "proposed by the search"),
            (trials[is_marked], {"marker": "D", "color": RED}, "Table 1's values"),
        ):
            ax.plot(rows[column], rows.accuracy, linestyle="", label=label, **look)
        if 0 < 10 * trials[column].min() < trials[column].max():
            ax.set_xscale("log")
        ax.set(xlabel=name)
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.tick_params(labelleft=ax is axes[0, 0])
    axes[0, 0].set_ylabel("validation accuracy")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


@in_style
def intervals(values: Mapping[str, tuple[float, float, float]], title: str, xlabel: str) -> Figure:
    """Draw one dot and its interval per row.

    values: {name: (value, low, high)}, fractions, drawn in percent.
    """
    figure, axes = new_figure(size=(7.5, 1.1 + 0.42 * len(values)))
    ax = axes[0, 0]
    above = {"textcoords": "offset points", "xytext": (0, 7), "ha": "center", "fontsize": 9}
    for i, (value, low, high) in enumerate(values.values()):
        reach = [[value - low], [high - value]]
        ax.errorbar(value, i, xerr=reach, fmt="o", color=BLUE, capsize=3)
        ax.annotate(f"{value:.2%}", (value, i), **above)
    ax.set_yticks(range(len(values)), values.keys())
    ax.invert_yaxis()
    ax.margins(y=0.25)
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.set(title=title, xlabel=xlabel)
    return figure
