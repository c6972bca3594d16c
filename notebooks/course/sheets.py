"""Sheets of CIFAR-10's pictures: grids, galleries, contact sheets, and one image in detail."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from notebooks.course.style import RED, SMOOTH, in_style, new_figure, show_heat, show_image


@in_style
def image_grid(
    images: np.ndarray,
    columns: int,
    titles: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    title: str = "",
    scale: float = 0.85,
    smooth: bool = False,
) -> Figure:
    """Draw pictures, uint8 (n, H, W, 3), row by row, `scale` inches each.

    titles: one per picture, or none. row_labels: one per row, or none.
    smooth: whether pictures are enlarged smoothly. If not, their pixels can be seen.
    """
    rows = _rows_of(len(images), columns)
    titles = list(titles) or [""] * len(images)

    # A row is as high as a picture and the lines of its longest title.
    title_rows = [titles[start : start + columns] for start in range(0, len(titles), columns)]
    lines = sum(max(_line_count(text) for text in row) for row in title_rows)
    height = rows * scale + 0.17 * lines + (0.4 if title else 0)
    width = columns * scale + (0.9 if len(row_labels) else 0)

    figure, axes = new_figure(rows, columns, (max(width, 4), height))
    figure.suptitle(title)
    _show_in_turn(axes, images, titles, smooth)
    for ax, label in zip(axes[:, 0], row_labels, strict=False):
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    return figure


def _show_in_turn(
    axes: np.ndarray, images: np.ndarray, titles: Sequence[str], smooth: bool
) -> None:
    """Show one picture per axes, with its title; axes that are left over stay empty.

    axes: (rows, columns). images: uint8 (n, height, width, 3).
    """
    for ax, image, title in zip(axes.flat, images, titles, strict=False):
        show_image(ax, image, title, size=9, smooth=smooth)
    for ax in axes.flat[len(images) :]:
        ax.set_axis_off()


@in_style
def gallery(
    images: np.ndarray,
    captions: Sequence[str],
    title: str,
    columns: int = 6,
    overlays: np.ndarray | None = None,
) -> Figure:
    """Draw pictures, uint8 (n, 32, 32, 3), with captions of any number of lines.

    overlays: heat maps to lay over the pictures, float (n, 32, 32) in [0, 1].
    Where there is no picture at all, the figure says so.
    """
    rows = max(_rows_of(len(images), columns), 1)
    lines = max([_line_count(caption) for caption in captions], default=1)
    size = (1.26 * columns, rows * (1.06 + 0.19 * lines) + 0.5)
    figure, axes = new_figure(rows, columns, size)
    figure.suptitle(title)
    for i, ax in enumerate(axes.flat):
        if i >= len(images):
            ax.set_axis_off()
            continue
        show_image(ax, images[i], captions[i], size=9, smooth=True)
        if overlays is not None:
            show_heat(ax, overlays[i])
    if len(images) == 0:
        figure.text(0.5, 0.4, "no images of this kind", ha="center")
    return figure


@in_style
def image_pairs(
    left: np.ndarray, right: np.ndarray, captions: Sequence[str], title: str, columns: int = 4
) -> Figure:
    """Draw pairs of pictures, uint8 (n, 32, 32, 3) each, side by side.

    captions: one per pair, of two lines.
    """
    rows = max(_rows_of(len(left), columns), 1)
    gap = np.full((len(left), 32, 2, 3), 255, dtype=np.uint8)
    both = np.concatenate([left, gap, right], axis=2)  # (n, 32, 66, 3)
    figure, axes = new_figure(rows, columns, (1.75 * columns, 1.25 * rows + 0.4))
    figure.suptitle(title)
    _show_in_turn(axes, both, captions, smooth=True)
    return figure


def _rows_of(pictures: int, columns: int) -> int:
    """Return how many rows hold the pictures."""
    return -(-pictures // columns)


def _line_count(text: str) -> int:
    return text.count("\n") + 1 if text else 0


@in_style
def contact_sheet(
    groups: Mapping[str, tuple[np.ndarray, Sequence[str], np.ndarray]],
    title: str,
    columns: int = 16,
    side: float = 64 / 110,
    frame_means: str = "",
) -> Figure:
    """Draw many pictures, group below group.

    groups: {heading: (pictures uint8 (n, 32, 32, 3), n captions, framed bool (n,))}; those that are
    `framed` get a frame. A group without pictures says so.
    side: of a picture, in inches. The default is two pixels of the PNG for each of CIFAR-10's.
    frame_means: what a frame says about a picture. This text stands at the top, beside a frame.
    """
    captions = [caption for _, of_group, _ in groups.values() for caption in of_group]
    cell_width = side + 0.12
    cell_height = side + 0.1 + 0.15 * max(map(_line_count, captions), default=1)
    rows = [max(_rows_of(len(of_group), columns), 1) for _, of_group, _ in groups.values()]
    height = sum(rows) * cell_height + 0.35 * len(rows) + 0.3
    figure = Figure(figsize=(columns * cell_width, height), layout="constrained")
    figure.suptitle(title, x=0.005, ha="left")  # what a frame means stands to the right
    if frame_means and any(framed.any() for _, _, framed in groups.values()):
        figure.legend([_frame((0, 0), side)], [frame_means], loc="upper right", borderaxespad=0)

    axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
    for ax, row_count, heading in zip(axes, rows, groups, strict=True):
        pictures, captions, framed = groups[heading]
        ax.set_title(heading)
        ax.set_axis_off()
        for i, caption in enumerate(captions):
            corner = (i % columns * cell_width + 0.06, i // columns * cell_height + 0.03)
            _place_picture(ax, corner, side, pictures[i], caption)
            if framed[i]:
                ax.add_patch(_frame(corner, side))
        width, height = columns * cell_width, row_count * cell_height
        ax.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
        if not captions:
            ax.text(0.04, 0.4, "no images of this kind")
    return figure


def _place_picture(
    ax: Axes, corner: tuple[float, float], side: float, picture: np.ndarray, caption: str
) -> None:
    """Draw a picture of a contact sheet with this upper left corner, and its caption below it."""
    left, top = corner
    right, bottom = left + side, top + side  # y grows downwards
    place = (left, right, bottom, top)
    ax.imshow(picture, extent=place, interpolation=SMOOTH, vmin=0, vmax=255)
    look = {"size": 8, "ha": "center", "va": "top", "linespacing": 1.05}
    ax.text(left + side / 2, bottom + 0.04, caption, **look)


def _frame(corner: tuple[float, float], side: float) -> Rectangle:
    """Return a frame for the picture of a contact sheet that has this upper left corner."""
    return Rectangle(corner, side, side, fill=False, edgecolor=RED, linewidth=2.5)


@in_style
def inspection(
    picture: np.ndarray,
    probabilities: Mapping[str, float],
    maps: Mapping[str, np.ndarray],
    neighbours: np.ndarray,
    captions: Sequence[str],
    among: int,
    title: str,
) -> Figure:
    """Draw one image in detail: heat maps over it, probabilities, and its neighbours below.

    picture: uint8 (32, 32, 3). probabilities: {class: probability}, drawn as bars.
    maps: {name: heat float (32, 32) in [0, 1]}, two of them.
    neighbours: uint8 (5, 32, 32, 3), with five captions.
    among: the number of training images that were searched for neighbours.
    """
    figure = Figure(figsize=(6.8, 3.7), layout="constrained")
    figure.suptitle(title)
    upper, lower = figure.subfigures(2, 1)

    # Above: the picture, the heat maps, the probabilities.
    *shown, bars = upper.subplots(1, 4, width_ratios=(1, 1, 1, 1.4))
    show_image(shown[0], picture, "Test image", size=9, smooth=True)
    for ax, (name, heat) in zip(shown[1:], maps.items(), strict=True):
        show_image(ax, picture, name, size=9, smooth=True)
        show_heat(ax, heat)
    shares = list(probabilities.values())
    drawn = bars.barh(list(probabilities), shares)
    bars.bar_label(drawn, [f"{share:.0%}" for share in shares], padding=2)
    bars.set(xlim=(0, 1.25), xticks=[], title="Probability")
    bars.invert_yaxis()
    bars.grid(False)

    # Below: the neighbours.
    lower.suptitle(f"Nearest of {among:,} training images, with their cosine", size=10)
    places = lower.subplots(1, 5)
    for ax, neighbour, caption in zip(places, neighbours, captions, strict=True):
        show_image(ax, neighbour, caption, size=9, smooth=True)
    return figure


@in_style
def shift_pictures(
    unshifted: np.ndarray,
    shifted: np.ndarray,
    unshifted_accuracy: float,
    accuracy: pd.DataFrame,
    title: str,
) -> Figure:
    """Draw one picture unshifted, and beside it at every severity, one row per family of shifts.

    unshifted: uint8 (H, W, 3). shifted: uint8 (families, severities, H, W, 3).
    accuracy: families by severities, fractions, printed above the pictures in percent.
    """
    rows, columns = accuracy.shape
    figure = Figure(figsize=(2.6 + 1.05 * columns, 0.8 + 1.2 * rows), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subfigures(1, 2, width_ratios=(1.3, 1.2 + 1.05 * columns))
    place = left.subplots()
    place.set_anchor("N")  # level with the first row
    show_image(place, unshifted, f"unshifted\n{unshifted_accuracy:.1%}", 9, smooth=True)

    axes = right.subplots(rows, columns, squeeze=False)
    for i, (family, shares) in enumerate(accuracy.iterrows()):
        for ax, picture, (severity, share) in zip(axes[i], shifted[i], shares.items(), strict=True):
            heading = f"severity {severity}\n" if i == 0 else ""
            show_image(ax, picture, f"{heading}{share:.1%}", size=9, smooth=True)
        axes[i, 0].set_ylabel(family, rotation=0, ha="right", va="center")
    return figure


@in_style
def own_pictures(
    pictures: Mapping[str, np.ndarray],
    seen: np.ndarray,
    heat: np.ndarray,
    probabilities: Sequence[Mapping[str, float]],
    title: str,
) -> Figure:
    """Draw pictures as they are, as the network sees them, and with its answers, one row for each.

    pictures: {name: uint8 (H, W, 3)}, n of any size.
    seen: the pictures as the network sees them, uint8 (n, 32, 32, 3).
    heat: the evidence for the network's answer, float (n, 32, 32) in [0, 1].
    probabilities: for each its likeliest classes, {class: probability}, the likeliest first.
    """
    shape = {"width_ratios": (1.4, 1, 1, 1.3), "squeeze": False}
    figure = Figure(figsize=(8.5, 0.5 + 1.9 * len(pictures)), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(pictures), 4, **shape)
    for row, (name, picture), small, hot, shares in zip(
        grid, pictures.items(), seen, heat, probabilities, strict=True
    ):
        show_image(row[0], picture, name, size=9, smooth=len(picture) > 32)
        show_image(row[1], small, "as 32×32 pixels", size=9)
        show_image(row[2], small, f"evidence for {next(iter(shares))}", size=9)
        show_heat(row[2], hot)
        drawn = row[3].barh(list(shares), list(shares.values()))
        row[3].bar_label(drawn, [f"{share:.1%}" for share in shares.values()], padding=2)
        row[3].set(xlim=(0, 1.3), xticks=[])
        row[3].set_title("probability", fontsize=9, loc="center")
        row[3].invert_yaxis()
        row[3].grid(False)
    return figure
