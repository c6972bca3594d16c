"""Diagrams of a network: its blocks, and its parts with the shapes between them."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from notebooks.course.style import in_style, new_figure

# The first of these words that a box's text contains decides the box's colour. Colours are light,
# because text is black.
BOXES = {"conv": "#CCE3F3", "stage": "#CCE3F3", "norm": "#FBE6C0", "": "#EFEFEF"}


@in_style
def block_diagram(blocks: Mapping[str, tuple[Sequence[int], Sequence[int]]], title: str) -> Figure:
    """Draw BasicBlocks side by side, each from the top down.

    blocks: {name: (shape in, shape out)}, with shapes (channels, H, W).
    """
    figure, axes = new_figure(1, len(blocks), (3.9 * len(blocks), 5.3))
    figure.suptitle(title)
    for ax, (name, (before, after)) in zip(axes[0], blocks.items(), strict=True):
        _prepare(ax, 3.9, 4.75)
        ax.set_title(name, loc="center", fontsize=10)
        _draw_block(ax, before, after)
    return figure


def _draw_block(ax: Axes, before: Sequence[int], after: Sequence[int]) -> None:
    """Draw one block, whose input has the shape `before` and whose output the shape `after`."""
    stride = before[1] // after[1]
    changes_shape = stride > 1

    # The layers, from the top down.
    first = f"3×3 convolution, stride {stride}" if changes_shape else "3×3 convolution"
    layers = [first, "batch norm", "ReLU", "3×3 convolution", "batch norm", "+", "ReLU"]
    _draw_arrow(ax, (1.2, 4.7), (1.2, 4.23))
    for i, text in enumerate(layers):
        _draw_box(ax, (1.2, 4.05 - 0.6 * i), text, 0.36 if text == "+" else 2.05)
        _draw_arrow(ax, (1.2, 3.87 - 0.6 * i), (1.2, 3.63 - 0.6 * i))
    for y, shape in ((4.55, before), (3.75, after), (1.95, after), (0.15, after)):
        ax.text(1.3, y, _shape_text(shape), va="center", fontsize=9)

    # The shortcut past these layers, to the sum.
    _draw_arrow(ax, (1.2, 4.4), (3.15, 4.4), (3.15, 1.05), (1.38, 1.05))
    if changes_shape:
        _draw_box(ax, (3.15, 3.45), f"1×1 convolution,\nstride {stride}", 1.35, 0.5)
        _draw_box(ax, (3.15, 2.75), "batch norm", 1.35)
    added = _shape_text(after) if changes_shape else "the input itself"
    ax.text(3.1, 0.87, added, ha="right", va="center", fontsize=9)


@in_style
def network_diagram(parts: Mapping[str, Sequence[int]], title: str) -> Figure:
    """Draw a network's parts from left to right.

    parts: {text of its box: shape that leaves it}, with shapes (channels, H, W) or (features,).
    """
    lines = [max(map(len, text.splitlines())) for text in parts]
    widths = [0.07 * characters + 0.2 for characters in lines]
    arrow = 0.55
    size = (sum(widths) + arrow * len(parts) + 0.5, 1.5)
    figure, axes = new_figure(size=size)
    figure.suptitle(title)
    ax, x = axes[0, 0], 0.02
    _prepare(ax, size[0], 1.0)
    for (text, shape), width in zip(parts.items(), widths, strict=True):
        _draw_box(ax, (x + width / 2, 0.5), text, width, 0.9)
        x += width
        _draw_arrow(ax, (x, 0.5), (x + arrow, 0.5))
        middle = x + 0.46 * arrow
        ax.text(middle, 0.55, shape[0], ha="center", va="bottom", fontsize=9)
        ax.text(middle, 0.43, "×".join(map(str, shape[1:])), ha="center", va="top", fontsize=8.5)
        x += arrow
    ax.text(x + 0.04, 0.5, "logits", va="center", fontsize=9.5)
    return figure


def _prepare(ax: Axes, width: float, height: float) -> None:
    """Make the axes an empty sheet to draw on, in units of about an inch."""
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.set_axis_off()


def _draw_box(
    ax: Axes, middle: tuple[float, float], text: str, width: float, height: float = 0.36
) -> None:
    corner = (middle[0] - width / 2, middle[1] - height / 2)
    box = FancyBboxPatch(
        corner,
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.06",
        facecolor=next(colour for word, colour in BOXES.items() if word in text),
        edgecolor="#555555",
        zorder=3,
    )
    ax.add_patch(box)
    ax.text(*middle, text, ha="center", va="center", fontsize=9.5, zorder=4)


def _draw_arrow(ax: Axes, *points: tuple[float, float]) -> None:
    """Draw a line through all points, with an arrowhead at the last one."""
    x = [point[0] for point in points]
    y = [point[1] for point in points]
    ax.plot(x, y, color="#333333", linewidth=1.2)
    head = {"arrowstyle": "-|>", "color": "#333333", "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", points[-1], points[-2], arrowprops=head)


def _shape_text(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))
