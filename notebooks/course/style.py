"""What all figures share: their look, their axes, and how they become PNG.

Every plotting function of the course takes data and returns a Figure, and is decorated with
`in_style`. The colours are Okabe and Ito's, which colour-blind readers can tell apart. Grey
replaces their yellow, which is hard to see on white. Some of them look alike in a grey print, so
where it matters, lines also differ in marker or dash.
"""

import io
from pathlib import Path

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from cifar_lib.files import write_atomically

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#000000")
BLUE, LIGHT_BLUE, RED, BLACK = COLOURS[0], COLOURS[4], COLOURS[5], COLOURS[7]
SMOOTH = "lanczos"  # how images of 32x32 pixels are enlarged where one must see what they show
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
# This is a decorator, because titles and legends get their look when they are made. The style
# starts from Matplotlib's defaults, because a user's matplotlibrc may ask for LaTeX, which may be
# missing, or for a layout and colours that spoil the figures.
in_style = matplotlib.style.context(STYLE, after_reset=True)


def new_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4)
) -> tuple[Figure, np.ndarray]:
    """Return a Figure of `size` inches that belongs to no global state, and its axes.

    The axes come as an array (rows, columns), even if there is only one.
    """
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def show_image(
    axes: Axes, image: np.ndarray, title: str = "", size: float = 8, smooth: bool = False
) -> None:
    """Fill the axes with an image, uint8 (H, W, 3), without ticks, grid or frame.

    size: the font size of the title.
    smooth: whether the image is enlarged smoothly, which makes its content easier to see. If not,
    each pixel becomes a square.
    """
    axes.imshow(image, interpolation=SMOOTH if smooth else "nearest", vmin=0, vmax=255)
    axes.set_title(title, fontsize=size, loc="center", pad=3)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def show_heat(axes: Axes, heat: np.ndarray) -> None:
    """Lay a heat map, float (H, W) in [0, 1], over the image that the axes show."""
    axes.imshow(heat, cmap="inferno", alpha=0.55, vmin=0, vmax=1, interpolation="bilinear")


@in_style
def to_png(figure: Figure, note: str | None = None, dpi: int = 110) -> bytes:
    """Return the figure as PNG.

    `note` is written below the plots, for figures that must say what they are made from.
    """
    if note:
        figure.supxlabel(note, fontsize=10, color=RED, weight="bold")
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    picture = Image.open(drawn).convert("RGB")

    # A palette halves the bytes of a chart. Photographs keep all their colours.
    if not any(axes.images for axes in figure.axes):
        picture = picture.quantize(
            method=Image.Quantize.MAXCOVERAGE, kmeans=0, dither=Image.Dither.NONE
        )
    picture.save(packed, format="png", optimize=True)
    return packed.getvalue()


def for_notebook(figure: Figure, png: bytes) -> tuple[str, bytes]:
    """Return the format and the bytes in which a notebook stores a figure.

    png: the figure as `to_png` returns it.

    Photographs that are enlarged smoothly take a fifth of the bytes as JPEG, and a notebook has to
    stay small. All other figures stay PNGs, whose pixels are exact.
    """
    photographs = [image for axes in figure.axes for image in axes.images]
    if not any(image.get_interpolation() == SMOOTH for image in photographs):
        return "png", png
    packed = io.BytesIO()
    Image.open(io.BytesIO(png)).save(packed, format="jpeg", quality=70, progressive=True)
    return "jpeg", packed.getvalue()


def save_figure(figure: Figure, path: Path, note: str | None = None) -> bytes:
    """Write the figure as PNG to `path`, whole or not at all, and return the PNG."""
    png = to_png(figure, note)
    write_atomically(path, png)
    return png
