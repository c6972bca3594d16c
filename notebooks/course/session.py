"""What the notebooks share: the data, a run, the network they examine, how results are shown."""

import functools
import hashlib
import importlib.util
import inspect
import json
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# Packages that every notebook needs, and that a machine with PyTorch may lack. A section that needs
# another one checks for it with environment.require.
_NEEDED = ("pydantic", "safetensors", "sklearn", "torchinfo", "tqdm")
_MISSING = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
if _MISSING:
    raise ImportError(
        f"missing packages: {', '.join(_MISSING)}: run pip install -r requirements.txt in the "
        "repository's folder, then restart the kernel"
    )

import pandas as pd
import torch
import torchinfo
from IPython.display import Image, display
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from cifar_lib import environment
from cifar_lib.data import FOLDER, STAND_IN, ImageSet, load_cifar10
from cifar_lib.errors import InputError
from cifar_lib.files import write_atomically
from cifar_lib.fit import fit
from cifar_lib.hardware import choose_device, choose_precision, prepare
from cifar_lib.kaggle import read_test_file
from cifar_lib.model import PRETRAINED, ResNet
from cifar_lib.recipes import TrainConfig, recipe
from notebooks.course import WITHOUT_CIFAR10, live_run
from notebooks.course.answers import Network
from notebooks.course.corruptions import generate_test_file
from notebooks.course.reference import (
    PUBLISHED_SYSTEM,
    SHIPPED_RUN,
    interval_text,
    published_table_2,
)
from notebooks.course.stand_in import generate_stand_in
from notebooks.course.style import for_notebook, save_figure

ROOT = Path(__file__).resolve().parents[2]
KAGGLE_OUTPUT = Path("/kaggle/working")  # where results go on Kaggle
GIVE_UP_AFTER = 180.0  # seconds to wait for a download
STAND_IN_TRAINING = 10_000  # notebook 3 trains on this many stand-in images
SYSTEM = {  # {key in environment.json: its name in the table of specifications}
    "cpu": "CPU",
    "cpu_cores": "CPU cores",
    "gpu": "GPU",
    "memory_gb": "memory (GB)",
    "python": "Python",
    "cuda": "CUDA",
    "torch": "torch",
    "torchvision": "torchvision",
    "commit": "commit of this package",
}


@dataclass(frozen=True)
class Session:
    """The data, the device, the network and the files that one notebook works with.

    If there is no CIFAR-10, stand-in data is generated. Then everything is smaller, and every
    figure and table says so.
    """

    train: ImageSet
    test: ImageSet  # all test images, whose ids are their positions

    @classmethod
    def open(cls) -> "Session":
        """Return a session on CIFAR-10, or on stand-in data if there is no CIFAR-10.

        CIFAR-10 is downloaded if it isn't found.

        Raises InputError if a variable is wrong, if results can't be written, or if CIFAR-10 isn't
        available although `CIFAR10_ROOT` or `CIFAR_FIGURES` is set.
        """
        must_be_real = _variable("CIFAR10_ROOT") or _variable("CIFAR_FIGURES")
        places = {"home": _data_folder(), "archives": _results_folder()}
        prepare(_device(), "auto")
        try:
            train, test = load_cifar10(give_up_after=GIVE_UP_AFTER, **places)
        except InputError as error:
            if must_be_real:  # a wrong folder is a mistake, and figures/ is for real data
                raise
            print(error)
            print(f"{WITHOUT_CIFAR10}; every figure and table says so.")
            train, test = generate_stand_in()
        return cls(train, replace(test, ids=tuple(range(len(test)))))

    @property
    def stand_in(self) -> bool:
        """Return whether the data is generated, because there is no CIFAR-10."""
        return self.train.source == STAND_IN

    @property
    def note(self) -> str | None:
        """Return the note on every figure and table made from generated data; None on real data."""
        return "stand-in data: generated images, not CIFAR-10" if self.stand_in else None

    @property
    def folder(self) -> Path:
        """Return the folder that this session writes to.

        It is runs/notebooks, or runs/stand-in on stand-in data; `runs_folder` says where runs/ is.
        Figures go to the folder that `CIFAR_FIGURES` names, if it is set.
        """
        return runs_folder() / ("stand-in" if self.stand_in else "notebooks")

    @property
    def device(self) -> torch.device:
        """Return the device that `CIFAR_DEVICE` names, or else the best one of this machine."""
        return _device()

    @property
    def precision(self) -> str:
        """Return the precision that suits the device."""
        return choose_precision("auto", self.device)

    # What notebook 3 trains.

    @functools.cached_property
    def choice(self) -> live_run.Choice:
        """Return the training that this session runs, and about how long it takes.

        `CIFAR_RECIPE` names the recipe. The default is the recipe that suits this machine, and on
        stand-in data `small`. On stand-in data, any recipe trains on some of the images, which is
        enough to learn the classes. `CIFAR_EPOCHS` sets the number of epochs; the recipe is chosen
        by its own number of epochs all the same.
        """
        choice = self._choose()
        epochs = _variable("CIFAR_EPOCHS")
        if epochs is None:
            return choice
        config = replace(choice.config, epochs=int(epochs))
        seconds = live_run.estimate_seconds(config, self.device, self.train)
        return live_run.Choice(config, seconds, choice.why)

    def _choose(self) -> live_run.Choice:
        """Return the choice with the recipe's own number of epochs."""
        asked = _variable("CIFAR_RECIPE") or live_run.AUTO
        if not self.stand_in:
            return live_run.choose(self.device, self.train, asked, self._is_begun)
        name = "small" if asked == live_run.AUTO else asked
        config = recipe(name, train_size=min(STAND_IN_TRAINING, len(self.train)))
        seconds = live_run.estimate_seconds(config, self.device, self.train)
        why = "enough for stand-in data" if asked == live_run.AUTO else "asked for"
        return live_run.Choice(config, seconds, why)

    @property
    def config(self) -> TrainConfig:
        """Return the configuration of this session's training."""
        return self.choice.config

    @property
    def run(self) -> Path:
        """Return the run directory of this session's training."""
        return self._run_of(self.config)

    def _run_of(self, config: TrainConfig) -> Path:
        """Return the run directory of a configuration. No two configurations share one."""
        if config == recipe("report") and not self.stand_in:
            return runs_folder() / "report-seed42"  # where `make full` trains it
        settings = json.dumps(asdict(config), sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()
        return self.folder / f"{config.recipe}-seed{config.seed}-{digest[:8]}"

    def _is_begun(self, config: TrainConfig) -> bool:
        return (self._run_of(config) / "config.json").exists()

    def fit(self, show: Callable[[Figure], None] | None = None) -> dict:
        """Train what `choice` says, and return its metrics.

        An interrupted run is resumed. A finished run isn't trained again. `show` is called after
        each epoch with a figure of the run so far.
        """
        after_epoch = self.watch(show) if show else None
        device = str(self.device)
        return fit(
            self.config, self.run, self.train, self.test, device=device, after_epoch=after_epoch
        )

    def watch(self, show: Callable[[Figure], None]) -> live_run.Watch:
        """Return a `Watch` for this session's run, which classifies the first eight test images."""
        how = {
            "normalization": self.config.test_normalization,
            "precision": choose_precision(self.config.precision, self.device),
        }
        return live_run.Watch(self.run, self.config.epochs, self.test[:8], show, **how)

    # The network that is examined, and the competition's images.

    def network(self) -> Network:
        """Return the network that is examined, on this session's device.

        `CIFAR_WEIGHTS` is the path of a file of weights, or one of two words. `pretrained` means
        the package's weights, trained on CIFAR-10. `trained` means the weights of this session's
        own run, which is trained now if it isn't finished. The default is `pretrained`, and on
        stand-in data `trained`.

        Raises InputError if the file doesn't hold weights of this package.
        """
        default = "trained" if self.stand_in else PRETRAINED
        weights = _variable("CIFAR_WEIGHTS") or default
        if weights == "trained":
            weights = self.run / "model.safetensors"
            if not (self.run / "metrics.json").exists():
                print("No trained network yet: training one as in notebook 3.")
                self.fit()
        return Network(weights, self.device, self.precision)

    @property
    def test_file(self) -> Path:
        """Return the path of the Kaggle competition's test file.

        `CIFAR_TEST_FILE` names it. If that variable isn't set, it is the path of the synthetic copy
        that `custom_test` makes from the test images.
        """
        named = _variable("CIFAR_TEST_FILE")
        return Path(named) if named else self.folder / "custom_test.pkl"

    def custom_test(self) -> ImageSet:
        """Return the images of `test_file`, a pickle that isn't trusted.

        If `CIFAR_TEST_FILE` isn't set, the file is made from the test images. Only then do the
        images have labels.

        Raises InputError if the file isn't in the competition's format.
        """
        if _variable("CIFAR_TEST_FILE"):
            return read_test_file(self.test_file)
        known = generate_test_file(self.test_file, self.test)
        return replace(read_test_file(self.test_file), labels=known.labels)

    # How this session's run compares.

    def comparison(self) -> pd.DataFrame:
        """Return the report's Table 2 beside the package's weights and this session's finished run.

        The last column says why the numbers differ. The table is also saved as comparison.csv.
        """
        published = published_table_2()
        ours = _complexity(ResNet(self.config.blocks, self.config.channels))
        columns = {
            "published": published,
            "the package's weights": {**_complexity(ResNet()), **_outcome(SHIPPED_RUN)},
            "this run": {**ours, **_outcome(self.run)},
            "why they differ": self._why_they_differ(),
        }
        table = pd.DataFrame(columns, index=pd.Index(published, name="quantity")).fillna("")
        write_atomically(self.folder / "comparison.csv", table.to_csv().encode())
        return table

    def _why_they_differ(self) -> dict[str, str]:
        """Return, for each quantity of Table 2 that may differ, the reason why."""
        accuracy = "the package's weights: other random numbers, another GPU"
        if self.config != recipe("report") or self.stand_in:
            accuracy = f"{accuracy}; this run: {self._what_it_trained()}"
        outcomes = "last train accuracy", "test accuracy", "its 95 % interval"
        reasons = dict.fromkeys(outcomes, accuracy)
        if (self.config.blocks, self.config.channels) != ((3, 4, 3), (66, 132, 264)):
            smaller = "this run: a smaller network, for this machine"
            reasons |= dict.fromkeys(_complexity(ResNet()), smaller)
        if self.config.epochs != recipe("report").epochs:
            reasons["epochs"] = "this run: another number of epochs"
        if self.config.train_size:
            reasons["training images"] = "this run: fewer training images"
        if self.note:
            reasons["test data"] = self.note
        return reasons

    def _what_it_trained(self) -> str:
        """Return in a few words what distinguishes this session's training."""
        parts = [f"recipe {self.config.recipe}", f"{self.config.epochs} epochs"]
        return ", ".join(parts + ["stand-in data"] * self.stand_in)

    def specifications(self) -> pd.DataFrame:
        """Return the specifications of the machines that trained the compared networks.

        There is one column for the published network, one for the package's weights, and one for
        this run. Commits are shortened to seven digits.
        """
        columns = {"published": PUBLISHED_SYSTEM}
        for name, run in {"the package's weights": SHIPPED_RUN, "this run": self.run}.items():
            system = json.loads((run / "environment.json").read_text(encoding="utf-8"))
            commit, *changes = (system["commit"] or "").split("+")
            columns[name] = system | {"commit": "+".join([commit[:7], *changes])}
        cells = {
            name: [str(system.get(key) or "–") for key in SYSTEM]
            for name, system in columns.items()
        }
        return pd.DataFrame(cells, index=list(SYSTEM.values()))

    # How results are shown.

    def show(self, figure: Figure, name: str, alt: str) -> None:
        """Save the figure as `name`.png and show it. `alt` describes it in words."""
        display(self._picture(figure, name, alt))

    def show_in_place(self, name: str, alt: str) -> Callable[[Figure], None]:
        """Return a function like `show` that shows each figure in place of the one before it."""
        handle = None

        def show(figure: Figure) -> None:
            nonlocal handle
            picture = self._picture(figure, name, alt)
            if handle is None:
                handle = display(picture, display_id=True)
            else:
                handle.update(picture)

        return show

    def _picture(self, figure: Figure, name: str, alt: str) -> Image:
        folder = Path(_variable("CIFAR_FIGURES") or self.folder / "figures")
        png = save_figure(figure, folder / f"{name}.png", self.note)
        kind, content = for_notebook(figure, png)
        # Not `alt=`, which Colab's IPython 7 lacks.
        return Image(content, format=kind, metadata={"alt": alt})

    def table(self, frame: pd.DataFrame, caption: str, formats: str | dict | None = None) -> Styler:
        """Return the frame with its caption, which says so if the data isn't CIFAR-10."""
        note = f" ({self.note})" if self.note else ""
        look = "caption-side: top; text-align: left; font-weight: bold; white-space: nowrap"
        styles = [{"selector": "caption", "props": look}]
        return frame.style.format(formats).set_caption(caption + note).set_table_styles(styles)


def _variable(name: str) -> str | None:
    """Return the value of an environment variable, or None if it isn't set.

    Kernels start in notebooks/. Nobody means that folder by a relative path, so relative paths
    start at the repository's root, unless `make run` has already made them absolute.

    Raises InputError if any of this program's variables is wrong.
    """
    environment.make_absolute(ROOT)
    return environment.read(name)


def _device() -> torch.device:
    name = _variable("CIFAR_DEVICE") or "auto"
    try:
        return choose_device(name)
    except InputError as error:
        raise InputError(f"CIFAR_DEVICE: {error}") from error


def _results_folder() -> Path | None:
    """Return the folder for results, or None if they go into the repository's runs/.

    It is the one that `CIFAR_RUNS` names, or Kaggle's output folder.

    The folder may be on a mounted Drive, so that results outlive this machine. On Kaggle an
    attached repository can't be written to, so results go to Kaggle's own output folder.

    Raises InputError if there is no folder that can be written to.
    """
    named = _variable("CIFAR_RUNS")
    folder = Path(named) if named else ROOT / "runs"
    if not named and not folder.exists():
        folder = ROOT
    try:
        _writable(folder)
        return folder if named else None
    except OSError as error:
        if not named and KAGGLE_OUTPUT.is_dir():
            return KAGGLE_OUTPUT
        remedy = "name another one" if named else "set CIFAR_RUNS to one, and start again"
        raise InputError(
            f"CIFAR_RUNS: expected a folder that can be written to, got {named or folder} "
            f"({error.strerror}): {remedy}"
        ) from error


@functools.cache  # an error isn't cached: a folder that can't be written to is tried again
def _writable(folder: Path) -> Path:
    """Return the folder, made if need be.

    Raises OSError if no file can be written in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # permission bits alone don't settle it
    return folder


def _data_folder() -> Path:
    """Return the folder in which CIFAR-10 is looked for, and to which it is downloaded.

    It is data/ in the repository, or in the runs' folder if the repository can't be written to.
    """
    data = ROOT / "data"
    try:
        if not (data / FOLDER).is_dir():
            _writable(data if data.exists() else ROOT)
        return data
    except OSError:
        return runs_folder() / "data"


def runs_folder() -> Path:
    """Return the folder of all runs: runs/, unless `_results_folder` names another one."""
    return _results_folder() or ROOT / "runs"


def _complexity(network: ResNet) -> dict[str, str]:
    """Return a network's size as {quantity of Table 2: value}."""
    size = torchinfo.summary(network, (1, 3, 32, 32), verbose=0)
    megabytes = (size.total_input + size.total_output_bytes + size.total_param_bytes) / 1e6
    return {
        "parameters": f"{size.total_params:,}",
        "trainable parameters": f"{size.trainable_params:,}",
        "multiply-adds (M)": f"{size.total_mult_adds / 1e6:.2f}",
        "estimated size (MB)": f"{megabytes:.2f}",
    }


def _outcome(run: Path) -> dict[str, str]:
    """Return the results of a finished run as {quantity of Table 2: value}."""
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    last = pd.read_csv(run / "history.csv").iloc[-1]
    test = metrics["test"]
    return {
        "epochs": str(metrics["epochs"]),
        "training images": f"{metrics['train_images']:,}",
        "last train accuracy": f"{last.train_accuracy:.2%}",
        "test accuracy": f"{test['accuracy']:.2%}",
        "its 95 % interval": interval_text(*test["interval"]),
        "test images": f"{test['n']:,}",
        "test data": metrics["data"],
    }


def show_source(*parts: object) -> None:
    """Display the source of functions and classes, as highlighted Python.

    Where HTML isn't shown, it is plain text.
    """
    sources = [textwrap.dedent(inspect.getsource(part)).rstrip() for part in parts]
    text = "\n\n".join(sources)
    # The colours suit light and dark pages. Styles are in the tags, because the pages' style sheets
    # differ.
    formatter = HtmlFormatter(
        noclasses=True,
        cssstyles="padding: 0.4em 0.8em",
        prestyles="color: #222222; background: none; font-family: monospace",
    )
    page = highlight(text, PythonLexer(), formatter)
    display({"text/html": page, "text/plain": text}, raw=True)
