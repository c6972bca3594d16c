"""Figures show the numbers they were given, and say when these are of generated data."""

import io

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from cifar_lib.data import CLASSES
from notebooks.course import plots

MATRIX = np.diag(np.full(10, 90)) + np.arange(100).reshape(10, 10) % 7 * (1 - np.eye(10, dtype=int))
PICTURES = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)


def lines(figure: Figure, panel: int = 0) -> dict[str, tuple[list, list]]:
    """x and y of each line, by its name in the legend."""
    return {
        line.get_label(): tuple(np.asarray(part).tolist() for part in line.get_data())
        for line in figure.axes[panel].lines
    }


def labels(axis) -> list[str]:
    return [text.get_text() for text in axis.get_ticklabels()]


def bars(figure: Figure, panel: int = 0) -> list[list[float]]:
    return [list(container.datavalues) for container in figure.axes[panel].containers]


def test_pictures_come_row_by_row_with_their_titles():
    figure = plots.image_grid(PICTURES, 3, [f"t{i}" for i in range(7)], ["a", "b", "c"], "T")
    assert len(figure.axes) == 9 and [ax.axison for ax in figure.axes] == 7 * [True] + 2 * [False]
    for i, ax in enumerate(figure.axes[:7]):
        assert np.array_equal(ax.images[0].get_array(), PICTURES[i]) and ax.get_title() == f"t{i}"
    assert [figure.axes[i].get_ylabel() for i in (0, 3, 6)] == ["a", "b", "c"]


def test_a_gallery_lays_heat_over_pictures_and_says_when_it_is_empty():
    heat = np.linspace(0, 1, 7 * 1024).reshape(7, 32, 32)
    figure = plots.gallery(PICTURES, ["a\nb"] * 7, "T", overlays=heat)
    for i, ax in enumerate(figure.axes[:7]):
        picture, overlay = (image.get_array() for image in ax.images)
        assert np.array_equal(picture, PICTURES[i]) and np.array_equal(overlay, heat[i])
        assert ax.get_title() == "a\nb"
    assert plots.gallery(PICTURES[:0], [], "T").texts[-1].get_text() == "no such image"


def test_bars_are_as_long_as_the_counts():
    counts = {"train": list(range(10)), "test": list(range(10, 20))}
    figure = plots.class_counts(counts, "T")
    assert bars(figure) == list(counts.values())
    assert labels(figure.axes[0].xaxis) == list(CLASSES)
    figure = plots.confused_pairs([("cat", "dog", 5), ("ship", "frog", 4)], [3, 6], "T", "images")
    assert bars(figure) == [[5, 4]] and lines(figure)["published run"] == ([3, 6], [0, 1])
    assert labels(figure.axes[0].yaxis) == ["cat taken for dog", "ship taken for frog"]
    colours = [to_hex(bar.get_facecolor()).upper() for bar in figure.axes[0].patches]
    assert colours == [plots.COLOURS[5], plots.COLOURS[0]]


def test_lines_and_dots_go_through_the_numbers():
    counts = np.arange(768.0).reshape(3, 256)
    drawn = lines(plots.channel_histograms({"a": counts, "b": counts + 1}, "T"), panel=1)
    for name, channel in zip(("red", "green", "blue"), counts + 1, strict=True):
        assert drawn[name] == (list(range(256)), (channel / channel.sum()).tolist())
    sets = {"a": ((0.1, 0.2, 0.3), (1, 2, 3)), "b": ((0.4, 0.5, 0.6), (4, 5, 6))}
    figure = plots.channel_dots(sets, "T")
    for panel in (0, 1):
        dots = zip(("red", "green", "blue"), sets["a"][panel], sets["b"][panel], strict=True)
        assert lines(figure, panel) == {name: ([a, b], [0, 1]) for name, a, b in dots}
    figure = plots.frequencies({"a": 0.5, "b": 0.4}, 0.5, 0.01, "T")
    assert lines(figure)["measured"] == ([0, 1], [0.5, 0.4])
    patch = figure.axes[0].patches[0]  # a Polygon before Matplotlib 3.9, then a Rectangle
    band = patch.get_path().get_extents(patch.get_patch_transform())
    assert (band.y0, band.y1) == pytest.approx((0.48, 0.52))


def test_an_inset_repeats_the_lines_between_its_limits():
    series = {"a": [0.1, 0.5, 0.91], "b": [0.2, 0.3, 0.95]}
    (ax,) = plots.epoch_curves(series, "y", "T", (0.9, 0.96)).axes
    (inset,) = ax.child_axes
    assert inset.get_ylim() == (0.9, 0.96)
    for panel in (ax, inset):
        assert [line.get_ydata().tolist() for line in panel.lines] == list(series.values())


def test_only_a_block_that_changes_the_shape_projects_its_input():
    blocks = {"stays": ((16, 8, 8), (16, 8, 8)), "changes": ((16, 8, 8), (32, 4, 4))}
    axes = plots.block_diagram(blocks, "T").axes
    stays, changes = ([text.get_text() for text in ax.texts] for ax in axes)
    projection = "1×1 convolution,\nstride 2"
    assert projection in changes and projection not in stays
    assert "the input itself" in stays and "32 × 4 × 4" in changes


def test_a_network_names_its_parts_and_the_shapes_between_them():
    figure = plots.network_diagram({"image": (3, 32, 32), "mean": (264,)}, "T")
    texts = [text.get_text() for text in figure.axes[0].texts if text.get_text()]
    assert texts == ["image", "3", "32×32", "mean", "264", "logits"]


def test_a_search_marks_its_own_trial_and_widens_a_wide_axis():
    trials = pd.DataFrame({"number": [0, 3], "accuracy": [0.3, 0.5], "rate": [0.1, 0.001]})
    figure = plots.search_trials(trials, {"rate": "learning rate"}, 0, "T")
    drawn = {"proposed by the search": ([0.001], [0.5]), "Table 1's values": ([0.1], [0.3])}
    assert lines(figure) == drawn
    assert figure.axes[0].get_xscale() == "log"


@pytest.mark.parametrize("signed, text", [(False, "90"), (True, "+90")])
def test_confusion_prints_every_cell(signed, text):
    ax = plots.confusion({"a": MATRIX}, "T", "images", signed).axes[0]
    cells = {text.get_position(): text.get_text() for text in ax.texts if text.get_text()}
    assert len(cells) == 100 and all(cells[i + 0.5, i + 0.5] == text for i in range(10))
    for true, guess in np.argwhere(MATRIX * (1 - np.eye(10, dtype=int))):
        assert int(cells[guess + 0.5, true + 0.5]) == MATRIX[true, guess]
    assert labels(ax.yaxis) == list(CLASSES)
    assert ax.get_ylabel() == "true" and ax.get_xlabel() == "predicted"


def test_confusion_colours_the_mistakes_only_and_in_one_scale():
    figure = plots.confusion({"a": MATRIX, "twice": 2 * MATRIX}, "T", "images")
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
    figure = plots.reliability_diagram({"a": bins}, "T")
    _, _, (drawn,) = figure.axes[0].containers[0]
    lengths = [high - low for (_, low), (_, high) in drawn.get_segments()]
    assert lengths == pytest.approx([0.811, 0.137], abs=0.001)  # Wilson's, of 1 in 2 and 100 in 200


def test_a_contact_sheet_shows_every_caption_and_frames_what_is_marked():
    captions = [f"{i}\n99%" for i in range(7)]
    figure = plots.contact_sheet({"a": (PICTURES, captions, np.arange(7) > 4)}, "T", columns=3)
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.texts] == captions
    assert len(ax.images) == 7 and len(ax.patches) == 2
    low, high = sorted(ax.get_ylim())
    assert all(low <= edge <= high for image in ax.images for edge in image.get_extent()[2:])


def test_two_histograms_count_every_image_on_both_sides_of_the_threshold():
    sets = {"a": np.arange(-3, 9), "b": np.arange(-5, 4)}
    ax = plots.two_histograms(sets, "T", "x", ("left", "right")).axes[0]
    for patch, (name, values) in zip(ax.patches, sets.items(), strict=True):
        assert patch.get_label() == f"{name} ({len(values)})"
        x, y = patch.get_xy().T
        area = abs(np.sum(x * np.roll(y, 1) - y * np.roll(x, 1))) / 2
        assert area == pytest.approx(len(values) * 13 / 60)  # 60 bins from -5 to 8


def test_shifts_stand_a_row_each_at_every_severity():
    pictures = np.stack([PICTURES[:3], PICTURES[3:6]])
    accuracy = pd.DataFrame([[0.1, 0.2], [0.3, 0.4]], index=["noise", "blur"])
    axes = plots.shift_pictures(pictures, accuracy, "T").axes
    shown = [ax.images[0].get_array() for ax in axes if ax.images]
    assert np.array_equal(shown, PICTURES[:6])


def test_intervals_reach_from_low_to_high():
    figure = plots.intervals({"a": (0.5, 0.4, 0.7), "b": (0.2, 0.1, 0.3)}, "T", "accuracy")
    reach = [bar.lines[2][0].get_segments()[0].tolist() for bar in figure.axes[0].containers]
    assert np.allclose(reach, [[[0.4, 0], [0.7, 0]], [[0.1, 1], [0.3, 1]]])
    assert [text.get_text() for text in figure.axes[0].texts] == ["50.00%", "20.00%"]


def test_severity_maps_print_percent_signed_and_bold_where_sure():
    rows = [("noise", 1, 0.1), ("noise", 2, 0.2), ("blur", 1, 0.3), ("blur", 2, -0.4)]
    frame = pd.DataFrame(rows, columns=["family", "severity", "gain"])
    table = plots.by_severity(frame, "gain")
    plain = plots.severity_maps({"a": table}, "T").axes[0]
    assert [text.get_text() for text in plain.texts] == ["10.0", "20.0", "30.0", "-40.0"]
    signed = plots.severity_maps({"a": -table}, "T", {"a": table > 0}).axes[0]
    assert [text.get_text() for text in signed.texts] == ["-10.0", "-20.0", "-30.0", "+40.0"]
    assert [text.get_weight() for text in signed.texts] == 3 * ["bold"] + ["normal"]
    assert signed.collections[0].get_array().ravel().tolist() == [-0.1, -0.2, -0.3, 0.4]
    assert labels(signed.yaxis) == ["noise", "blur"] and signed.collections[0].get_clim() == (
        -0.4,
        0.4,
    )


def test_a_saved_figure_is_what_is_returned_and_the_note_stands_at_its_foot(tmp_path):
    figure = plots.intervals({"a": (0.5, 0.4, 0.7)}, "T", "accuracy")
    path = tmp_path / "new" / "f.png"
    png = plots.save_figure(figure, path, note="stand-in data")
    assert path.read_bytes() == png
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    note = np.abs(pixels - [213, 94, 0]).sum(axis=2) < 30  # the note's colour
    assert note[-40:].sum() > 100 and not note[:-40].any()


def test_a_users_matplotlibrc_changes_no_figure(tmp_path):
    matplotlibrc = tmp_path / "matplotlibrc"
    matplotlibrc.write_text(
        "text.usetex: True\n"  # a traceback where there is no LaTeX
        "font.size: 20\n"
        "axes.facecolor: black\n"
        "figure.autolayout: True\n"
        "image.origin: lower\n"
        "savefig.bbox: tight\n"
        "savefig.facecolor: black\n",
        encoding="utf-8",
    )

    def drawn() -> list[bytes]:
        made = plots.image_grid(PICTURES[:1], 1), plots.curves({"a": ([0], [0])}, "x", "y", "T")
        return [plots.to_png(figure) for figure in made]

    expected = drawn()
    with matplotlib.rc_context(fname=matplotlibrc):
        assert drawn() == expected
