"""Figures: every function draws what it was given, and a figure says when it is made from generated
data."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import figures
from cifar_lib.data import CLASSES

MATRIX = np.diag(np.full(10, 90)) + np.arange(100).reshape(10, 10) % 7 * (1 - np.eye(10, dtype=int))
PICTURES = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
BINS = {
    "edges": np.linspace(0, 1, 6),
    "count": np.array([0, 3, 5, 8, 4]),
    "confidence": np.array([np.nan, 0.3, 0.5, 0.7, 0.9]),
    "accuracy": np.array([np.nan, 0.4, 0.4, 0.8, 1.0]),
}
HEAT = {"cat": np.zeros((32, 32)), "dog": np.ones((32, 32))}
MAP = pd.DataFrame([[0.1, 0.2], [0.3, -0.4]], index=["noise", "blur"])
FIGURES = {
    "image_grid": lambda: figures.image_grid(
        PICTURES, 3, titles=[f"t{i}" for i in range(7)], title="T"
    ),
    "class_counts": lambda: figures.class_counts({"train": range(10), "test": range(10)}, "T"),
    "channel_histograms": lambda: figures.channel_histograms(
        {"a": np.ones((3, 256)), "b": np.ones((3, 256))}, "T"
    ),
    "channel_dots": lambda: figures.channel_dots({"a": (0.1, 0.2, 0.3)}, "T", "x"),
    "curves": lambda: figures.curves(
        {"a (published)": ([0, 1], [1, 2]), "b": ([0, 1], [2, 1])}, "x", "y", "T", True
    ),
    "frequencies": lambda: figures.frequencies({"a": 0.5, "b": 0.5}, 0.5, 0.01, "T"),
    "confusion": lambda: figures.confusion({"a": MATRIX, "b": MATRIX}, "T", "images"),
    "confused_pairs": lambda: figures.confused_pairs(
        [("cat", "dog", 5), ("dog", "cat", 4)], [4, 5], "T", "images"
    ),
    "gallery": lambda: figures.gallery(PICTURES, ["a\nb"] * 7, "T", overlays=np.zeros((7, 32, 32))),
    "empty gallery": lambda: figures.gallery(PICTURES[:0], [], "T"),
    "contact_sheet": lambda: figures.contact_sheet(
        {
            "a": (PICTURES, ["1\na"] * 7, np.arange(7) == 2),
            "none": (PICTURES[:0], [], np.array([])),
        },
        "T",
        columns=4,
    ),
    "two_histograms": lambda: figures.two_histograms(
        {"a": np.arange(-3, 9), "b": np.arange(-5, 4)}, "T", "x", ("left", "right")
    ),
    "inspection": lambda: figures.inspection(
        PICTURES[0], {"cat": 0.9, "dog": 0.1}, HEAT, PICTURES[:5], list("abcde"), "T"
    ),
    "reliability_diagram": lambda: figures.reliability_diagram({"a": BINS, "b": BINS}, "T"),
    "intervals": lambda: figures.intervals({"a": (0.5, 0.4, 0.6)}, "T", "accuracy"),
    "severity_maps": lambda: figures.severity_maps(
        {"a": MAP, "b": -MAP}, "T", {"a": MAP > 0, "b": MAP > 1}
    ),
}


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_ink_and_the_note_adds_some(name):
    plain, noted = (
        pixels(figures.to_png(FIGURES[name]())),
        pixels(figures.to_png(FIGURES[name](), note="stand-in data")),
    )
    assert (plain != 255).any(axis=2).mean() > 0.002
    note = np.abs(noted.astype(int) - [213, 94, 0]).sum(axis=2) < 30  # the note's colour
    assert note[-40:].sum() > 100, "the note is not at the foot of the figure"


@pytest.mark.parametrize("signed, text", [(False, "90"), (True, "+90")])
def test_confusion_prints_every_cell(signed, text):
    figure = figures.confusion({"a": MATRIX}, "T", "images", signed)
    texts = [t.get_text() for t in figure.axes[0].texts if t.get_text()]
    assert len(texts) == 100 and texts.count(text) == 10
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == list(CLASSES)
    assert figure.axes[0].get_ylabel() == "true" and figure.axes[0].get_xlabel() == "predicted"


def test_confusion_colours_the_mistakes_only_and_in_one_scale():
    figure = figures.confusion({"a": MATRIX, "twice": 2 * MATRIX}, "T", "images")
    first, second = (ax.collections[0] for ax in figure.axes[:2])
    colours = np.ma.filled(first.get_array(), np.nan).reshape(10, 10)
    assert np.isnan(colours.diagonal()).all() and np.nanmax(colours) == 6
    assert first.get_clim() == second.get_clim() == (0, 12)


def test_a_bin_of_few_images_has_a_long_interval():
    bins = {
        "edges": np.linspace(0, 1, 4),
        "count": np.array([0, 2, 200]),
        "confidence": np.array([np.nan, 0.5, 0.9]),
        "accuracy": np.array([np.nan, 0.5, 0.5]),
    }
    figure = figures.reliability_diagram({"a": bins}, "T")
    _, _, (bars,) = figure.axes[0].containers[0]
    lengths = [high - low for (_, low), (_, high) in bars.get_segments()]
    assert lengths == pytest.approx([0.811, 0.137], abs=0.001)  # Wilson's, of 1 in 2 and 100 in 200


def test_a_contact_sheet_shows_every_caption_and_frames_what_is_marked():
    captions = [f"{i}\n99%" for i in range(7)]
    figure = figures.contact_sheet({"a": (PICTURES, captions, np.arange(7) > 4)}, "T", columns=3)
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.texts] == captions
    assert len(ax.images) == 7 and len(ax.patches) == 2
    low, high = sorted(ax.get_ylim())
    assert all(low <= edge <= high for image in ax.images for edge in image.get_extent()[2:])


def test_save_figure_writes_what_it_returns(tmp_path):
    png = figures.save_figure(FIGURES["curves"](), tmp_path / "new" / "f.png")
    assert (tmp_path / "new" / "f.png").read_bytes() == png


def test_one_wild_value_doesnt_flatten_the_published_curve():
    series = {"test (published)": ([0, 1], [2.0, 0.5]), "this run": ([0, 1], [600.0, 2.0])}
    low, high = figures.curves(series, "epoch", "loss", "Loss").axes[0].get_ylim()
    assert 0 < low < 0.5 and 2 < high < 3
