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
from notebooks.course import diagrams, error_plots, plots, sheets, style

PICTURES = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
COLOURS = ("red", "green", "blue")


def lines(figure: Figure, panel: int = 0) -> dict[str, tuple[list, list]]:
    """x and y of each line, by its name in the legend."""
    return {
        line.get_label(): tuple(np.asarray(part).tolist() for part in line.get_data())
        for line in figure.axes[panel].lines
    }


def texts(items) -> list[str]:
    return [item.get_text() for item in items if item.get_text()]


def bars(figure: Figure) -> list[list[float]]:
    return [list(container.datavalues) for container in figure.axes[0].containers]


def shown(figure: Figure) -> list[np.ndarray]:
    """The pictures and heat maps of all axes, in order."""
    return [image.get_array() for ax in figure.axes for image in ax.images]


def test_sheets_show_every_picture_with_its_words():
    figure = sheets.image_grid(PICTURES, 3, [f"t{i}" for i in range(7)], ["a", "b", "c"], "T")
    assert np.array_equal(shown(figure), PICTURES)
    assert [ax.get_title() for ax in figure.axes] == [f"t{i}" for i in range(7)] + ["", ""]
    assert [figure.axes[i].get_ylabel() for i in (0, 3, 6)] == ["a", "b", "c"]
    assert [ax.axison for ax in figure.axes] == 7 * [True] + 2 * [False]

    heat = np.linspace(0, 1, 7 * 1024).reshape(7, 32, 32)
    layers = shown(sheets.gallery(PICTURES, ["a\nb"] * 7, "T", overlays=heat))
    assert np.array_equal(layers[::2], PICTURES) and np.array_equal(layers[1::2], heat)
    assert "no images of this kind" in texts(sheets.gallery(PICTURES[:0], [], "T").texts)

    figure = sheets.image_pairs(PICTURES[:2], PICTURES[2:4], ["a\nb", "c\nd"], "T")
    for i, both in enumerate(shown(figure)):
        assert np.array_equal(both[:, :32], PICTURES[i])
        assert np.array_equal(both[:, -32:], PICTURES[i + 2])
    assert [ax.get_title() for ax in figure.axes[:2]] == ["a\nb", "c\nd"]

    accuracy = pd.DataFrame([[0.1, 0.2], [0.3, 0.4]], index=["noise", "blur"], columns=[1, 2])
    rows = np.stack([PICTURES[:3], PICTURES[3:6]])
    figure = sheets.shift_pictures(PICTURES[6], rows[:, :2], 0.5, accuracy, "T")
    assert np.array_equal(shown(figure), PICTURES[[6, 0, 1, 3, 4]])
    headings = ["unshifted\n50.0%", "severity 1\n10.0%", "severity 2\n20.0%", "30.0%", "40.0%"]
    assert [ax.get_title() for ax in figure.axes] == headings

    named = {"a": np.zeros((40, 30, 3), np.uint8), "b": PICTURES[1]}
    answers = [{"cat": 0.9, "dog": 0.1}, {"frog": 0.7, "ship": 0.2}]
    figure = sheets.own_pictures(named, PICTURES[:2], heat[:2], answers, "T")
    assert np.array_equal(shown(figure)[0], named["a"])
    assert np.array_equal(shown(figure)[1], PICTURES[0])
    assert figure.axes[6].get_title() == "evidence for frog"
    assert texts(figure.axes[7].texts) == ["70.0%", "20.0%"]


def test_a_contact_sheet_shows_every_caption_and_frames_what_is_marked():
    captions = [f"{i}\n99%" for i in range(7)]
    groups = {"a": (PICTURES, captions, np.arange(7) > 4), "b": (PICTURES[:0], [], np.zeros(0))}
    figure = sheets.contact_sheet(groups, "T", columns=3, frame_means="marked")
    full, empty = figure.axes
    assert texts(figure.legends[0].texts) == ["marked"]
    assert texts(full.texts) == captions and texts(empty.texts) == ["no images of this kind"]
    low, high = sorted(full.get_ylim())
    edges = [image.get_extent() for image in full.images]  # left, right, bottom, top
    assert all(low <= edge <= high for extent in edges for edge in extent[2:])
    framed = [patch.get_xy() for patch in full.patches]
    assert framed == [(extent[0], extent[3]) for extent in edges[5:]]
    unmarked = {"a": (PICTURES, captions, np.zeros(7, dtype=bool))}
    assert not sheets.contact_sheet(unmarked, "T", frame_means="marked").legends


def test_pictures_that_must_be_recognised_are_smooth_and_others_show_their_pixels():
    shifts = pd.DataFrame([[0.5]], ["noise"], [1])
    for figure, smooth in (
        (sheets.gallery(PICTURES, [""] * 7, ""), True),
        (sheets.contact_sheet({"": (PICTURES, [""] * 7, np.zeros(7, dtype=bool))}, ""), True),
        (sheets.shift_pictures(PICTURES[0], PICTURES[None, :1], 0.5, shifts, ""), True),
        (sheets.image_grid(PICTURES, 7, smooth=True), True),
        (sheets.image_grid(PICTURES, 7), False),
    ):
        for image in (image for ax in figure.axes for image in ax.images):
            assert (image.get_interpolation() == style.SMOOTH) == smooth


def test_a_notebook_stores_smooth_photographs_as_jpeg_and_all_else_exactly():
    for figure, kind in (
        (sheets.gallery(PICTURES, ["a"] * 7, "T"), "jpeg"),
        (sheets.image_grid(PICTURES, 7), "png"),
        (plots.intervals({"a": (0.5, 0.4, 0.7)}, "T", "accuracy"), "png"),
    ):
        png = style.to_png(figure)
        stored, content = style.for_notebook(figure, png)
        assert stored == kind and Image.open(io.BytesIO(content)).format.lower() == kind
        assert (content == png) == (kind == "png")


def test_bars_are_as_long_as_the_counts():
    pairs = [("cat", "dog", 5), ("ship", "frog", 4)]
    figure = error_plots.confused_pairs(pairs, [3, 6], "T", "images")
    assert bars(figure) == [[5], [4]] and lines(figure)["published run"] == ([3, 6], [0, 1])
    assert texts(figure.axes[0].get_yticklabels()) == ["cat → dog", "ship → frog"]
    assert texts(figure.axes[0].texts) == ["5 (published: 3)", "4 (published: 6)"]
    colours = [to_hex(bar.get_facecolor()).upper() for bar in figure.axes[0].patches]
    assert colours == [style.RED, style.BLUE]


def test_lines_and_dots_go_through_the_numbers():
    counts = np.arange(768.0).reshape(3, 256)
    drawn = lines(plots.channel_histograms({"a": counts, "b": counts + 1}, "T"), panel=1)
    for name, channel in zip(COLOURS, counts + 1, strict=True):
        assert drawn[name] == (list(range(256)), (channel / channel.sum()).tolist())

    sets = {"a": ((0.1, 0.2, 0.3), (1, 2, 3)), "b": ((0.4, 0.5, 0.6), (4, 5, 6))}
    figure = plots.channel_dots(sets, "T")
    for panel in (0, 1):  # a row's dots have three heights, so that none hides another
        heights = [[row + step for row in (0, 1)] for step in (-0.2, 0, 0.2)]
        dots = zip(COLOURS, sets["a"][panel], sets["b"][panel], heights, strict=True)
        assert lines(figure, panel) == {name: ([a, b], ys) for name, a, b, ys in dots}

    figure = plots.frequencies({"a": 0.5, "b": 0.4}, 0.5, 0.01, "T")
    assert lines(figure)["measured"] == ([0, 1], [0.5, 0.4])
    patch = figure.axes[0].patches[0]  # a Polygon before Matplotlib 3.9, then a Rectangle
    band = patch.get_path().get_extents(patch.get_patch_transform())
    assert (band.y0, band.y1) == pytest.approx((0.48, 0.52))

    series = {"a": [0.1, 0.5, 0.91], "b": [0.2, 0.3, 0.95]}
    figure = plots.epoch_curves(series, "y", "T")
    assert lines(figure) == {name: ([1, 2, 3], values) for name, values in series.items()}


def test_a_published_curve_is_drawn_through_the_band_of_the_runs_and_named_at_its_end():
    frame = pd.DataFrame(
        {"published": [0.1, 0.5, 0.9], "lowest": [0.1, 0.4, 0.8], "highest": [0.2, 0.6, 0.95]},
        index=pd.RangeIndex(1, 4),
    )
    frames = {"training images": frame + 0.01, "test images": frame}
    figure = plots.reproduction(frames, "accuracy", "T", last=2)
    for ax, first in zip(figure.axes, (0, 1), strict=True):
        for line, band, drawn in zip(ax.lines, ax.collections, frames.values(), strict=True):
            rows = drawn.iloc[first:]
            assert [tuple(point) for point in line.get_xydata()] == [*rows.published.items()]
            corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
            assert corners == {*rows.lowest.items(), *rows.highest.items()}

    first, second = figure.axes[1].texts
    assert first.get_text() == "training images:\npublished 91.00%\nours 81.00% to 96.00%"
    assert first.get_position()[1] - second.get_position()[1] == pytest.approx(0.2)


def test_smoothed_losses_are_marked_where_they_are_lowest():
    p = np.array([0.5, 0.7, 0.9])
    losses = {"none": np.array([3.0, 2, 1]), "some": np.array([3.0, 2, 2.5])}
    losses["more"] = losses["some"] + 1
    figure = plots.smoothing_losses(p, losses, "T")
    assert texts(figure.axes[0].texts) == ["none", "some", "2.000 at 70%", "more", "3.000 at 70%"]
    marks = [
        line.get_xydata().tolist() for line in figure.axes[0].lines if len(line.get_xdata()) == 1
    ]
    assert marks == [[[0.7, 2]], [[0.7, 3]]]


def test_diagrams_name_parts_and_shapes_and_project_only_what_changes_its_shape():
    blocks = {"stays": ((16, 8, 8), (16, 8, 8)), "changes": ((16, 8, 8), (32, 4, 4))}
    stays, changes = (texts(ax.texts) for ax in diagrams.block_diagram(blocks, "T").axes)
    projection = "1×1 convolution,\nstride 2"
    assert projection in changes and projection not in stays
    assert "the input itself" in stays and "32 × 4 × 4" in changes
    figure = diagrams.network_diagram({"image": (3, 32, 32), "mean": (264,)}, "T")
    assert texts(figure.axes[0].texts) == ["image", "3", "32×32", "mean", "264", "logits"]


def test_a_search_marks_its_own_trial_and_widens_a_wide_axis():
    trials = pd.DataFrame({"number": [0, 3], "accuracy": [0.3, 0.5], "rate": [0.1, 0.001]})
    figure = plots.search_trials(trials, {"rate": "learning rate"}, marked=0, title="T")
    proposed, own = ([0.001], [0.5]), ([0.1], [0.3])
    assert lines(figure) == {"proposed by the search": proposed, "Table 1's values": own}
    assert figure.axes[0].get_xscale() == "log"


@pytest.mark.parametrize("signed", [False, True])
def test_confusion_prints_every_cell_and_colours_the_mistakes_in_one_scale(signed):
    matrix = np.arange(100).reshape(10, 10) % 7 * (1 - np.eye(10, dtype=int))
    matrix += np.diag(np.full(10, 90))
    figure = error_plots.confusion({"a": matrix, "2": 2 * matrix}, "T", "images", signed)
    ax, other = figure.axes[:2]
    cells = {text.get_position(): text.get_text() for text in ax.texts if text.get_text()}
    assert len(cells) == 100 and cells[0.5, 0.5] == ("+90" if signed else "90")
    for (true, guess), count in np.ndenumerate(matrix):
        assert int(cells[guess + 0.5, true + 0.5]) == count
    assert texts(ax.get_yticklabels()) == list(CLASSES) == texts(ax.get_xticklabels())
    assert ax.get_ylabel() == "true" and ax.get_xlabel() == "predicted"

    first, second = ax.collections[0], other.collections[0]
    colours = np.ma.filled(first.get_array(), np.nan).reshape(10, 10)
    assert np.isnan(colours.diagonal()).all() and np.nanmax(colours) == 6
    assert first.get_clim() == second.get_clim() == (-12 if signed else 0, 12)


def test_intervals_reach_from_low_to_high():
    figure = plots.intervals({"a": (0.5, 0.4, 0.7), "b": (0.2, 0.1, 0.3)}, "T", "accuracy")
    reach = [bar.lines[2][0].get_segments()[0].tolist() for bar in figure.axes[0].containers]
    assert np.allclose(reach, [[[0.4, 0], [0.7, 0]], [[0.1, 1], [0.3, 1]]])
    assert texts(figure.axes[0].texts) == ["50.00%", "20.00%"]

    # Of a reliability diagram: Wilson's, of 10 in 20 and of 100 in 200; a bin of 19 has none.
    bins = {
        "edges": np.linspace(0, 1, 4),
        "count": np.array([19, 20, 200]),
        "confidence": np.array([0.2, 0.5, 0.9]),
        "accuracy": np.array([0.0, 0.5, 0.5]),
    }
    _, _, (drawn,) = error_plots.reliability_diagram({"a": bins}, "T").axes[0].containers[0]
    lengths = [high - low for (_, low), (_, high) in drawn.get_segments()]
    assert lengths == pytest.approx([0.401, 0.137], abs=0.001)


def test_two_histograms_count_every_image_on_both_sides_of_the_threshold():
    sets = {"a": np.arange(-3, 9), "b": np.arange(-5, 4)}
    ax = error_plots.two_histograms(sets, "T", "x", ("left", "right")).axes[0]
    for patch, values in zip(ax.patches, sets.values(), strict=True):
        x, y = patch.get_xy().T
        area = abs(np.sum(x * np.roll(y, 1) - y * np.roll(x, 1))) / 2
        assert area == pytest.approx(len(values) * 13 / 60)  # 60 bins from -5 to 8
    assert [(text.get_text(), text.get_ha()) for text in ax.texts] == [
        ("a (12)", "center"),
        ("b (9)", "center"),
        ("left", "right"),
        ("right", "left"),
    ]


def test_a_coverage_curve_names_the_accuracy_at_some_shares():
    coverage, accuracy = np.array([0.5, 0.75, 1]), np.array([1, 0.98, 0.9])
    ax = error_plots.coverage_curve(coverage, accuracy, (0.75, 1), "T").axes[0]
    assert [line.get_xdata()[0] for line in ax.lines] == [0.5, 0.75, 1]
    assert texts(ax.texts) == ["98.00% at 75%", "90.00% at 100%"]


def test_severity_maps_print_points_signed_and_bold_where_sure():
    rows = [("noise", 1, 0.1), ("noise", 2, 0.2), ("blur", 1, 0.3), ("blur", 2, -0.4)]
    frame = pd.DataFrame(rows, columns=["family", "severity", "gain"])
    table = error_plots.by_severity(frame, "gain")
    signed = error_plots.severity_maps({"a": -table}, {"a": table > 0}, "T").axes[0]
    assert texts(signed.texts) == ["−10.0", "−20.0", "−30.0", "+40.0"]
    assert [text.get_weight() for text in signed.texts] == 3 * ["bold"] + ["normal"]
    assert signed.collections[0].get_array().ravel().tolist() == [-0.1, -0.2, -0.3, 0.4]
    assert texts(signed.get_yticklabels()) == ["noise", "blur"]
    assert signed.collections[0].get_clim() == (-0.4, 0.4)
    assert [error_plots.points(gain) for gain in (-0.04, 0.04, -0.06)] == ["0.0", "0.0", "-0.1"]


def test_names_stand_at_the_ends_of_their_lines_and_not_on_each_other():
    series = {"a": ([0.01, 1], [0.9, 0.5]), "b": ([0.01, 2], [0.9, 0.5]), "c": ([0.1, 2], [1, 0])}
    ax = error_plots.accuracy_by_distance(series, "T", "distance").axes[0]
    assert ax.get_xscale() == "log"
    drawn = {line.get_label(): line.get_xydata().T.tolist() for line in ax.lines}
    assert drawn == {name: [x, y] for name, (x, y) in series.items()}
    sides = {text.get_text(): (text.xy, text.get_ha()) for text in ax.texts}
    assert sides == {"a": ((1, 0.5), "right"), "b": ((2, 0.5), "left"), "c": ((2, 0), "left")}


def test_a_saved_figure_is_what_is_returned_and_the_note_stands_at_its_foot(tmp_path):
    figure = plots.intervals({"a": (0.5, 0.4, 0.7)}, "T", "accuracy")
    path = tmp_path / "new" / "f.png"
    png = style.save_figure(figure, path, note="stand-in data")
    assert path.read_bytes() == png
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    note = np.abs(pixels - [213, 94, 0]).sum(axis=2) < 30  # the note's colour
    assert note[-40:].sum() > 100 and not note[:-40].any()


def test_a_users_matplotlibrc_changes_no_figure(tmp_path):
    matplotlibrc = tmp_path / "matplotlibrc"
    settings = (
        "text.usetex: True",  # a traceback where there is no LaTeX
        "font.size: 20",
        "axes.facecolor: black",
        "figure.autolayout: True",
        "image.origin: lower",
        "savefig.bbox: tight",
        "savefig.facecolor: black",
    )
    matplotlibrc.write_text("\n".join(settings), encoding="utf-8")

    def drawn() -> list[bytes]:
        figures = sheets.image_grid(PICTURES[:1], 1), plots.curves({"a": ([0], [0])}, "x", "y", "T")
        return [style.to_png(figure) for figure in figures]

    expected = drawn()
    with matplotlib.rc_context(fname=matplotlibrc):
        assert drawn() == expected
