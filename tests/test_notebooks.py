"""The notebooks as files: one skeleton, small cells, clean outputs; and what they share.

nbmake runs them.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import pandas as pd
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from nbclient import NotebookClient

from cifar_lib.data import CAT, CLASSES, DOG, REAL, STAND_IN
from cifar_lib.errors import InputError
from cifar_lib.model import ResNet, WeightsInfo, save_model
from cifar_lib.recipes import recipe
from notebooks import conftest
from notebooks.course import WITHOUT_CIFAR10, live_run, plots
from notebooks.course.answers import Network, StoredAnswers
from notebooks.course.duplicates import nearest_by_pixels
from notebooks.course.inspector import Inspector
from notebooks.course.reference import (
    CATS_BY_EYE,
    LABEL_CHECKS,
    SHIPPED_RUN,
    published_confusion,
    published_history,
)
from notebooks.course.session import Session, show_source
from notebooks.course.stand_in import generate_stand_in
from scripts import build_pages

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("0*.ipynb"))
SOLUTIONS = "solutions"
SESSION = "notebooks.course.session"
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
ADDRESS = re.search(r'Repository = "https://github\.com/(.+)"', PROJECT)[1]


def cells(name, kind):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == kind]


@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_has_the_same_skeleton(name):
    text = [cell.source for cell in cells(name, "markdown")]
    code = [cell.source for cell in cells(name, "code")]
    assert text[0].startswith(f"# {int(name[:2])} · ")
    assert all(part in text[0] for part in ("**You will learn**", "**Reads**", "**Writes**"))
    whole = "\n\n".join(text)
    numbers = re.findall(r"^## (?!Takeaways|Exercises)(.*?)\.", whole, re.M)
    assert numbers == [str(i + 1) for i in range(len(numbers))] and len(numbers) > 4
    assert "## Takeaways" in whole and "## Exercises" in whole
    at = NAMES.index(name)
    before = f"[previous]({NAMES[at - 1]}.ipynb)" if at else "previous"
    after = f"[next]({NAMES[at + 1]}.ipynb)" if at < 4 else "next"
    assert text[-1].endswith(f"{before} | [contents](../README.md#notebooks) | {after}")
    assert max(len(source.splitlines()) for source in code[1:]) <= 20
    assert len(whole) >= sum(map(len, code)), "less prose than code"
    assert any("session.show(" in source for source in code)


@pytest.mark.parametrize("name", [*NAMES, SOLUTIONS])
def test_set_up_is_the_same_and_names_the_one_address(name):
    place = f"{ADDRESS}/blob/main/notebooks/{name}.ipynb"
    assert f"https://colab.research.google.com/github/{place}" in cells(name, "markdown")[0].source
    assert name == SOLUTIONS or place in (ROOT / "README.md").read_text(encoding="utf-8")
    set_up = [cells(each, "code")[0].source for each in (name, NAMES[0])]
    assert set_up[0] == set_up[1] and f"https://github.com/{ADDRESS}" in set_up[0]
    assert "torch" not in re.search(r"pip install (.*)", set_up[0])[1].replace("torchinfo", "")


def test_every_exercise_has_its_solution():
    asked = []
    for number, name in enumerate(NAMES, 1):
        text = "\n".join(cell.source for cell in cells(name, "markdown")).split("## Exercises")[1]
        assert "[notebooks/solutions.ipynb](solutions.ipynb)" in text
        exercises = re.findall(r"^(\d+)\. ", text, re.M)
        asked += [f"{number}.{exercise}" for exercise in exercises]
    whole = "\n".join(cell.source for cell in cells(SOLUTIONS, "markdown"))
    assert re.findall(r"^### (\d\.\d) ", whole, re.M) == asked
    assert max(len(cell.source.splitlines()) for cell in cells(SOLUTIONS, "code")[1:]) <= 20


@pytest.fixture
def set_up(tmp_path, monkeypatch) -> Callable[[], Path]:
    """Run the first cell in an empty folder, without pip; returns the repository that it finds."""
    source = cells(NAMES[0], "code")[0].source.replace("    %pip", "    pass  # %pip")
    source = source.replace("/kaggle/input", (tmp_path / "kaggle").as_posix())
    (tmp_path / "content").mkdir()
    monkeypatch.chdir(tmp_path / "content")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(address: str = f"https://github.com/{ADDRESS}") -> Path:
        found = {}
        exec(source.replace(f"https://github.com/{ADDRESS}", address), found)
        return found["home"]

    return run


@pytest.fixture
def colab(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))


def test_without_a_repository_set_up_is_one_line_with_the_address(set_up):
    with pytest.raises(AssertionError, match=f"^no cifar_lib here: .*{ADDRESS}[^\n]*$"):
        set_up()


def test_set_up_finds_a_repository_attached_on_kaggle_at_any_depth(set_up, tmp_path):
    attached = tmp_path / "kaggle" / "datasets" / "somebody" / "some-name" / "cifar-lib-main"
    (attached / "cifar_lib").mkdir(parents=True)
    (tmp_path / "kaggle" / "another-data-set").mkdir()
    assert set_up() == attached.resolve()


def test_set_up_clones_on_colab_also_where_a_clone_broke_off(set_up, colab, tmp_path):
    origin = tmp_path / "origin"
    (origin / "cifar_lib").mkdir(parents=True)
    (origin / "cifar_lib" / "__init__.py").touch()
    git = ["git", "-C", str(origin), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    broken = tmp_path / "content" / "cifar-lib" / ".git"
    broken.mkdir(parents=True)
    home = set_up(origin.as_uri())
    assert home == broken.parent.resolve() and (home / "cifar_lib" / "__init__.py").exists()
    (home / "kept").touch()
    assert set_up("file:///nowhere") == home and (home / "kept").exists()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("fatal: could not read Username for 'https://...'", "no repository is there"),
        ("fatal: repository 'https://...' not found", "no repository is there"),
        ("fatal: unable to access: Could not resolve host", "it can't be reached"),
    ],
)
def test_set_up_tells_a_missing_address_from_an_unreachable_one(
    set_up, colab, monkeypatch, said, message
):
    def git(command, env, **_):
        assert command[0] == "git" and env["GIT_TERMINAL_PROMPT"] == "0"
        return SimpleNamespace(stderr=f"{said}\n")

    monkeypatch.setattr(subprocess, "run", git)
    with pytest.raises(AssertionError, match=f"{ADDRESS}: {message}.* \\({said}\\)$"):
        set_up()


@pytest.mark.parametrize(
    ("package", "code", "words"),
    [
        (
            "torchinfo",
            f"import {SESSION}",
            "missing packages: torchinfo: run pip install -r requirements.txt",
        ),
        (
            "optuna",
            "from notebooks.course.reference import trials_table; trials_table()",
            "the package optuna isn't installed",
        ),
    ],
)
def test_a_missing_package_is_one_line_where_it_is_needed(package, code, words):
    missing = f"import importlib.util as u; real = u.find_spec; missing = {package!r}\n"
    missing += "u.find_spec = lambda name, *rest: None if name == missing else real(name, *rest)\n"
    command = [sys.executable, "-c", missing + code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    last = done.stderr.splitlines()[-1]
    assert words in last and "pip install" in last


def test_a_session_loads_no_package_of_one_section():
    code = f"import sys; from {SESSION} import environment\n"
    code += "print(set(sys.modules) & set(environment.OPTIONAL))"
    done = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, encoding="utf-8")
    assert done.strip() == "set()"
    (section,) = [c.source for c in cells(NAMES[3], "code") if "import find_label" in c.source]
    asked, imported, *_ = section.splitlines()
    assert asked.startswith('environment.require("cleanlab"') and "cleanlab" in imported


@pytest.mark.parametrize("name", [*NAMES, SOLUTIONS])
def test_committed_outputs_are_clean(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    outputs = [output for cell in cells(name, "code") for output in cell.outputs]
    assert path.stat().st_size <= 1e6
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert str(ROOT) not in json.dumps(outputs)
    counts = [cell.execution_count for cell in cells(name, "code")]
    if outputs:
        assert counts == list(range(1, len(counts) + 1)), "not one run from top to bottom"
        assert any(kind.startswith("image/") for o in outputs for kind in o.get("data", {}))


def notebook_that_prints(text: str, tags: tuple[str, ...] = ()) -> nbformat.NotebookNode:
    """A notebook of one cell, as it is after the cell has printed `text` and shown a table."""
    page = f"<table><td class='x'>{text}</td></table>"
    outputs = [
        nbformat.v4.new_output("stream", text=text),
        nbformat.v4.new_output("display_data", data={"text/html": page}),
    ]
    cell = nbformat.v4.new_code_cell(id="one", outputs=outputs, metadata={"tags": [*tags]})
    return nbformat.v4.new_notebook(cells=[cell])


def test_a_notebook_that_prints_other_numbers_than_it_stores_fails(monkeypatch, tmp_path):
    for name in conftest.OTHER_OUTPUTS:
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "stored.ipynb"
    nbformat.write(notebook_that_prints("accuracy 95.35%, n = 10,000"), path)
    conftest._check_numbers(notebook_that_prints("accuracy: 95.35% of 10,000"), path)
    with pytest.raises(AssertionError, match="cell one: it prints .*94.30%.*, stored is .*95.35%"):
        conftest._check_numbers(notebook_that_prints("accuracy 94.30%, n = 10,000"), path)

    # Not where they may differ: in a cell that says so, on stand-in data, with other weights.
    conftest._check_numbers(notebook_that_prints("94.30%", tags=("varies",)), path)
    elsewhere = notebook_that_prints(f"{WITHOUT_CIFAR10}; 12.00%")
    conftest._check_numbers(elsewhere, path)
    monkeypatch.setenv("CIFAR_WEIGHTS", "trained")
    conftest._check_numbers(notebook_that_prints("94.30%"), path)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_links_to_what_is_there(name, tmp_path, monkeypatch):
    pages = tmp_path / "runs" / "html"
    monkeypatch.setattr(build_pages, "PAGES", pages)
    build_pages._write_page(name, nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4))
    page = (pages / f"{name}.html").read_text(encoding="utf-8")
    for link in re.findall(r'href="([^"#:]+)["#]', page):
        if link.startswith("../../"):
            assert (ROOT / link.removeprefix("../../")).exists()
        else:
            assert link == "index.html" or link.removesuffix(".html") in [*NAMES, SOLUTIONS]


def test_the_kernel_is_this_environments_and_figures_come_out_even_under_agg(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("JUPYTER_PATH", str(Path(sys.prefix) / "share" / "jupyter"))
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from types import SimpleNamespace\nfrom pathlib import Path\n"
        "from notebooks.course import plots\nfrom notebooks.course.session import Session\n"
        f"place = SimpleNamespace(folder=Path({str(tmp_path)!r}), note=None)\n"
        "place._picture = lambda *given: Session._picture(place, *given)\n"
        "figure = plots.curves({'a': ([0, 1], [0, 1])}, 'x', 'y', 'T')\n"
        "Session.show(place, figure, 'f', 'a line')\n"
        "print(sys.executable)"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=tmp_path)
    outputs = notebook.cells[0].outputs
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 1 and pictures[0].metadata["image/png"]["alt"] == "a line"
    assert (tmp_path / "figures" / "f.png").exists()
    printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    assert os.path.realpath(printed.strip()) == os.path.realpath(sys.executable)


@pytest.fixture
def opened(monkeypatch, tmp_path) -> dict:
    """An empty repository and small stand-in data for sessions; what they ask of the loader.

    `missing` in it makes the loader find no CIFAR-10.
    """
    asked = {}

    def load(**places):
        if asked.get("missing"):
            raise InputError("no CIFAR-10 here")
        asked.update(places)
        return generate_stand_in(1200, 1100)

    for name in ("CIFAR10_ROOT", "CIFAR_RECIPE", "CIFAR_RUNS", "CIFAR_FIGURES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(f"{SESSION}.load_cifar10", load)
    monkeypatch.setattr(f"{SESSION}.generate_stand_in", lambda: generate_stand_in(1200, 1100))
    monkeypatch.setattr(f"{SESSION}.ROOT", tmp_path)
    return asked


def test_without_data_a_session_continues_and_says_so_on_everything(opened, capsys):
    opened["missing"] = True
    session = Session.open()
    assert "stand-in data" in capsys.readouterr().out and session.train.source == STAND_IN
    marked = (session.note, str(session.folder), session.test.source)
    assert all("stand-in" in mark for mark in marked)
    assert "stand-in data" in session.table(published_confusion(), "counts").to_html()


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("CIFAR_FIGURES", "drawn", "no CIFAR-10 here"),  # figures/ aren't drawn from stand-in data
        ("CIFAR10_ROOT", ".", "no CIFAR-10 here"),  # a place was named
        ("CIFAR_RECIPE", "fast", "one of auto, small, short"),
        ("CIFAR_PROFILE", "full", "this variable no longer exists: unset it"),
        ("CIFAR_RUNS", "file/below", "^CIFAR_RUNS: expected a folder"),
        ("CIFAR_DEVICE", "abacus", "^CIFAR_DEVICE: "),
    ],
)
def test_a_wrong_variable_stops_a_session(opened, monkeypatch, tmp_path, variable, value, words):
    opened["missing"] = True
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=words):
        Session.open()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_runs_archive_and_figures_go_to_the_folder_that_is_named(opened, monkeypatch, tmp_path):
    drive = tmp_path / "drive" / "cifar"
    monkeypatch.setenv("CIFAR_RUNS", str(drive))
    place = Session.open()
    assert opened["archives"] == drive
    assert drive in place.folder.parents and drive in place.run.parents
    line = plots.curves({"a": ([0, 1], [0, 1])}, "x", "y", "T")
    place.show(line, "f", "a line")
    monkeypatch.setenv("CIFAR_FIGURES", str(tmp_path / "drawn"))
    place.show(line, "g", "a line")
    assert (place.folder / "figures" / "f.png").is_file()
    assert (tmp_path / "drawn" / "g.png").is_file()


def test_a_read_only_repository_needs_one_line_or_kaggles_folder(opened, monkeypatch, tmp_path):
    def writable(folder: Path) -> Path:
        if folder == tmp_path:
            raise OSError(30, "Read-only file system")
        return folder

    kaggle = tmp_path / "working"
    monkeypatch.setattr(f"{SESSION}._writable", writable)
    monkeypatch.setattr(f"{SESSION}.KAGGLE_OUTPUT", kaggle)
    with pytest.raises(InputError, match="^CIFAR_RUNS: expected .*Read-only[^\n]*set CIFAR_RUNS"):
        Session.open()
    kaggle.mkdir()
    assert kaggle in Session.open().folder.parents and opened["home"] == kaggle / "data"
    monkeypatch.setenv("CIFAR_RUNS", str(tmp_path / "named"))
    assert tmp_path / "named" in Session.open().folder.parents
    # The repository's folder can't be written, but its runs/ can.
    monkeypatch.delenv("CIFAR_RUNS")
    (tmp_path / "runs").mkdir()
    assert tmp_path / "runs" in Session.open().folder.parents
    assert opened["home"] == tmp_path / "runs" / "data"


def test_relative_paths_mean_the_repository_in_a_kernel(opened, monkeypatch, tmp_path):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    (tmp_path / "own.pkl").touch()
    monkeypatch.setenv("CIFAR_TEST_FILE", "own.pkl")
    monkeypatch.setenv("CIFAR_RUNS", "myruns")
    session = Session.open()
    assert session.test_file == tmp_path / "own.pkl"
    assert tmp_path / "myruns" in session.folder.parents
    assert not list((tmp_path / "notebooks").iterdir())


def test_the_device_that_is_named_is_used(opened, monkeypatch):
    monkeypatch.setattr(f"{SESSION}.choose_device", lambda name: torch.device("meta", len(name)))
    monkeypatch.setattr(f"{SESSION}.prepare", lambda device, _: None)
    monkeypatch.setenv("CIFAR_DEVICE", "cpu")
    assert Session.open().device == torch.device("meta", 3)
    monkeypatch.delenv("CIFAR_DEVICE")
    assert Session.open().device == torch.device("meta", 4)  # auto


def test_source_is_shown_as_python_and_as_text(monkeypatch):
    shown = []
    monkeypatch.setattr(f"{SESSION}.display", lambda data, raw: shown.append(data))
    show_source(published_history, Session.fit)
    (data,) = shown
    text = data["text/plain"]
    assert text.startswith("def published_history(") and "\n\ndef fit(self" in text
    assert re.search(r"<span style=.*>def</span>", data["text/html"])


def test_stored_numbers_are_the_reports_and_the_surveys():
    history, matrix = published_history(), published_confusion().to_numpy()
    assert len(history) == 60 and history.test_accuracy.iloc[-1] == pytest.approx(0.9556)
    assert matrix.sum() == 10_000 and matrix.trace() == 9556
    assert (matrix[CAT, DOG], matrix[DOG, CAT]) == (45, 55)
    checks = pd.read_csv(LABEL_CHECKS, index_col="index")
    votes = checks.filter(like="votes_")
    assert len(checks) == checks.index.nunique() == 275 and (votes.sum(axis=1) == 5).all()
    assert (checks.votes_label < 3).sum() == 54  # arXiv:2103.14749, Table 1


def test_the_cats_looked_at_are_all_those_misclassified_as_dogs_and_a_hundred_others():
    cats = pd.read_csv(CATS_BY_EYE)
    assert set(cats.striped) == {"yes", "no", "unclear"} and cats["index"].is_unique
    mistakes = safetensors.torch.load_file(SHIPPED_RUN / "answers.safetensors")["mistakes"]
    as_dogs = cats.group == "misclassified as dog"
    assert cats["index"].isin(mistakes.tolist()).equals(as_dogs)
    matrix = json.loads((SHIPPED_RUN / "metrics.json").read_text(encoding="utf-8"))["test"]
    assert as_dogs.sum() == matrix["confusion_matrix"][CAT][DOG] and (~as_dogs).sum() == 100


def test_the_nearest_image_by_pixels_is_found_mirrored_and_at_another_brightness(stand_in):
    known = stand_in[0].images
    changed = known[[5, 17, 30]]
    changed[1] = changed[1].flip(2)
    changed[2] = changed[2] // 2
    positions, correlations = nearest_by_pixels(changed, known)
    assert positions.tolist() == [5, 17, 30]
    assert correlations.tolist() == pytest.approx([1, 1, 1], abs=0.001)


@pytest.fixture
def tiny_session(monkeypatch, tmp_path, stand_in) -> Session:
    """A session on a few images that call themselves real, which trains a tiny network."""
    monkeypatch.setattr(f"{SESSION}.ROOT", tmp_path)
    train, test = (replace(images, source=REAL) for images in generate_stand_in(200, 100))
    config = recipe("small", blocks="1,1", channels="16,32", epochs=3, train_size=100)
    choice = live_run.Choice(config, seconds=1.0, why="to be quick")
    monkeypatch.setattr(live_run, "choose", lambda *_: choice)
    return Session(train, replace(test, ids=tuple(range(len(test)))))


def test_a_session_trains_and_puts_its_run_beside_the_published_one(
    tiny_session, monkeypatch, tmp_path
):
    monkeypatch.setenv("CIFAR_WEIGHTS", "trained")
    metrics = tiny_session.fit()
    tiny_session.show(plots.epoch_curves({"a": [0.1, 0.2]}, "accuracy", "T"), "curves", "a line")
    table = tiny_session.comparison()
    ours, theirs = table["this run"], table["published"]
    assert ours["test accuracy"] == f"{metrics['test']['accuracy']:.2%}" and ours["epochs"] == "3"
    assert theirs["test accuracy"] == "95.56%" and theirs["parameters"] == "4,916,284"
    assert table["the package's weights"]["parameters"] == "4,916,284" != ours["parameters"]
    reasons = table["why they differ"]
    assert "recipe small, 3 epochs" in reasons["test accuracy"]
    assert "another number" in reasons["epochs"] and "fewer" in reasons["training images"]
    assert "smaller network" in reasons["parameters"] and reasons["test data"] == ""
    assert tiny_session.specifications().loc["GPU", "published"] == "NVIDIA A100-SXM4-40GB"
    network = tiny_session.network()
    assert network.info.seed == 42 and not network.model.training and network.stored is None
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.parts[:2] for path in written} == {("runs", "notebooks")}


def test_the_number_of_epochs_can_be_asked_for(tiny_session, monkeypatch):
    monkeypatch.setenv("CIFAR_EPOCHS", "2")
    assert tiny_session.config.epochs == 2 and tiny_session.config.channels == (16, 32)
    assert ", 2 epochs of 100 images" in tiny_session.choice.summary(tiny_session.device, 200)


def test_a_run_is_drawn_as_it_grows_and_whole_when_it_is_finished(tiny_session):
    drawn = []
    tiny_session.fit(drawn.append)
    assert len(drawn) == 3
    history = pd.read_csv(tiny_session.run / "history.csv")
    whole = tiny_session.watch(drawn.append).figure(history)  # by another session, say
    texts = [[text.get_text() for text in ax.texts] for ax in whole.axes]
    first_image = next(row for row in range(len(texts)) if texts[row + 1])
    answers = [cell[0].split() for cell in texts[first_image + 1 : first_image + 4]]
    assert len(answers) == 3 and all(name in CLASSES for name, _ in answers)
    curve = whole.axes[0].lines[1]
    assert list(curve.get_ydata()) == pytest.approx(list(history.test_accuracy))
    # In half-size epochs the network is asked about images of half size, as it is evaluated then.
    assert len(json.loads((tiny_session.run / "watched.json").read_text(encoding="utf-8"))) == 3


@pytest.fixture
def network(tmp_path) -> Network:
    """A tiny random network, as a notebook looks at it."""
    half, one = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    info = WeightsInfo(recipe="report", epochs=1, data=STAND_IN, mean=half, std=one)
    save_model(tmp_path / "tiny.safetensors", ResNet((1, 1), (16, 32)).eval(), info)
    return Network(tmp_path / "tiny.safetensors", torch.device("cpu"), "fp32")


def test_any_test_image_can_be_inspected(stand_in, network):
    train, test = stand_in
    logits = network.predict(test.images)
    inspector = Inspector(Session(train, test), network, (logits / 2).softmax(1))
    shares, classes = (logits[9] / 2).softmax(0).topk(5)
    figure = inspector.figure(9)
    bars = figure.axes[3]
    assert [text.get_text() for text in bars.texts] == [f"{share:.0%}" for share in shares]
    assert [text.get_text() for text in bars.get_yticklabels()] == [CLASSES[c] for c in classes]
    asked = {CLASSES[classes[0]], CLASSES[test.labels[9]]}
    asked |= {CLASSES[classes[1]]} if len(asked) == 1 else set()
    assert {ax.get_title() for ax in figure.axes[1:3]} == {f"Evidence for {name}" for name in asked}
    assert f"labelled {CLASSES[test.labels[9]]}" in figure.get_suptitle()
    with pytest.raises(InputError, match="expected 0 to"):
        inspector.figure(len(test))


def test_neighbours_are_found_among_training_images_and_stored_ones_are_taken(stand_in, network):
    train, test = stand_in
    test = replace(test, images=torch.cat([train.images[7:8], test.images[1:]]))
    inspector = Inspector(Session(train, test), network, torch.full((len(test), 10), 0.1))
    positions, cosines, among = inspector.nearest(0)  # training image 7 itself
    assert positions[0] == 7 and cosines[0] == pytest.approx(1) and among == len(train)
    assert (cosines.diff() <= 0).all()
    stored = {"mistakes": torch.tensor([0, 4]), "nearest": torch.arange(10).view(2, 5)}
    network.stored = StoredAnswers({}, stored | {"cosines": torch.ones(2, 5)})
    assert inspector.nearest(4)[0].tolist() != [5, 6, 7, 8, 9]  # stored about other images
    inspector.train, inspector.test = (replace(images, source=REAL) for images in (train, test))
    assert inspector.nearest(4)[0].tolist() == [5, 6, 7, 8, 9]
    assert inspector.nearest(3)[0].tolist() != [5, 6, 7, 8, 9]


@pytest.mark.parametrize("mistakes", [(1, 0), (0, 1), (0, 0)])
def test_notebook_4_shows_one_mistake_of_a_kind_and_none(mistakes, stand_in, network, monkeypatch):
    """A NumPy array takes a tensor of one index for a number, and loses an axis."""
    train, test = stand_in
    test = replace(test, ids=tuple(range(len(test))))
    session = Session(train, test)
    # Sure and correct about every image but the first cats or dogs.
    answers = test.labels.clone()
    for true, guess, count in ((CAT, DOG, mistakes[0]), (DOG, CAT, mistakes[1])):
        answers[(test.labels == true).nonzero()[:count, 0]] = guess
    answers[(test.labels == 0).nonzero()[:1, 0]] = 8
    logits = 4 * F.one_hot(answers, 10) + test.labels[:, None] / 100

    shown = []
    monkeypatch.setattr(Session, "show", lambda self, figure, name, alt: shown.append(name))
    monkeypatch.setattr(Session, "network", lambda self: network)
    monkeypatch.setattr(Network, "predict", lambda *_: logits)
    monkeypatch.setattr(Network, "compute", lambda self, images: logits[: len(images)])
    names = {"session": session}
    for cell in cells(NAMES[3], "code")[1:]:
        if cell.source.startswith("show("):
            continue  # of test images that this set doesn't have
        source = cell.source.replace("session = Session.open()", "")
        exec(compile(source, "notebook 4", "exec"), names)
    assert names["mistaken"].shape == (sum(mistakes),)
    assert len(names["worst"]) == 1 + sum(mistakes)
    assert {"04_cats_and_dogs", "04_most_confident", "04_label_issues"} <= set(shown)


def test_the_report_on_a_gpu_shares_the_run_of_make_full(stand_in, monkeypatch):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "--run runs/$$recipe-seed$$seed" in makefile
    report = live_run.Choice(recipe("report"), seconds=300.0, why="what suits this device")
    monkeypatch.setattr(live_run, "choose", lambda *_: report)
    session = Session(*(replace(images, source=REAL) for images in stand_in))
    assert session.run == ROOT / "runs" / "report-seed42"
