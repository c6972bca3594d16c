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
    "confusion": lambda: figures.confusion({"a": MATRIX, "b": MATRIX}, "rows", "T"),
    "class_scores": lambda: figures.class_scores({"a": np.linspace(0, 1, 10)}, "T", "F1"),
    "confused_pairs": lambda: figures.confused_pairs([("cat", "dog", 5), ("dog", "cat", 4)], "T"),
    "gallery": lambda: figures.gallery(PICTURES, ["a\nb"] * 7, "T", overlays=np.zeros((7, 32, 32))),
    "empty gallery": lambda: figures.gallery(PICTURES[:0], [], "T"),
    "reliability_diagram": lambda: figures.reliability_diagram(BINS, 0.1, "T"),
    "intervals": lambda: figures.intervals({"a": (0.5, 0.4, 0.6)}, "T", "accuracy"),
    "severity_maps": lambda: figures.severity_maps(
        {"a": MAP, "b": -MAP}, "T", {"a": MAP > 0, "b": MAP > 1}
    ),
    "shift_pictures": lambda: figures.shift_pictures(np.stack([PICTURES[:3]] * 2), MAP, "T"),
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


@pytest.mark.parametrize(
    "kind, text",
    [("counts", "90"), ("rows", f"{9000 / MATRIX[3].sum():.1f}"), ("difference", "+90")],
)
def test_confusion_prints_every_cell(kind, text):
    figure = figures.confusion({"a": MATRIX}, kind, "T")
    texts = [t.get_text() for t in figure.axes[0].texts if t.get_text()]
    assert len(texts) >= 100 and text in texts
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == list(CLASSES)
    assert figure.axes[0].get_ylabel() == "true" and figure.axes[0].get_xlabel() == "predicted"


def test_confusion_colours_the_mistakes_only():
    (mesh,) = figures.confusion({"a": MATRIX}, "counts", "T").axes[0].collections
    colours = np.ma.filled(mesh.get_array(), np.nan).reshape(10, 10)
    assert np.isnan(colours.diagonal()).all() and np.nanmax(colours) == 6 == mesh.get_clim()[1]


def test_save_figure_writes_what_it_returns(tmp_path):
    png = figures.save_figure(FIGURES["curves"](), tmp_path / "new" / "f.png")
    assert (tmp_path / "new" / "f.png").read_bytes() == png


def test_one_wild_value_doesnt_flatten_the_published_curve():
    series = {"test (published)": ([0, 1], [2.0, 0.5]), "this run": ([0, 1], [600.0, 2.0])}
    low, high = figures.curves(series, "epoch", "loss", "Loss").axes[0].get_ylim()
    assert 0 < low < 0.5 and 2 < high < 3
