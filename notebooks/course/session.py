"""What the notebooks share: the data, a run, the network they look at, how results are shown."""

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

# What every notebook needs. What only one section needs is asked for there (environment.require).
_NEEDED = ("pydantic", "safetensors", "sklearn", "torchinfo", "tqdm")
_MISSING = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
if _MISSING:
    raise ImportError(f"missing: {', '.join(_MISSING)}: pip install -r requirements.txt, restart")

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
from notebooks.course import live_run
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
STAND_IN_TRAINING = 10_000  # so many stand-in images are trained on
SYSTEM = {  # each key of environment.json that the table has, and its name there
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
    """What one notebook works with: the data, the device, the network that it looks at, its files.

    On stand-in data, which is generated where there is no CIFAR-10, everything is smaller, and
    every figure and table says so.
    """

    train: ImageSet
    test: ImageSet  # all test images; its ids are their numbers

    @classmethod
    def open(cls) -> "Session":
        """Return a session on CIFAR-10, or on stand-in data where it can't be had.

        Raises InputError if a variable is wrong, if results can't be written, or if a place that a
        variable names holds no CIFAR-10. Figures for `CIFAR_FIGURES` take CIFAR-10, too.
        """
        named = _variable("CIFAR10_ROOT") or _variable("CIFAR_FIGURES")
        places = {"home": _data_folder(), "archives": _results_folder()}
        prepare(_device(), "auto")
        try:
            train, test = load_cifar10(give_up_after=GIVE_UP_AFTER, **places)
        except InputError as error:
            if named:
                raise  # going on without it would hide the mistake
            print(error)
            print("Going on with generated stand-in data; every figure and table says so.")
            train, test = generate_stand_in()
        return cls(train, replace(test, ids=tuple(range(len(test)))))

    @property
    def stand_in(self) -> bool:
        """Whether the data is generated, for want of CIFAR-10."""
        return self.train.source == STAND_IN

    @property
    def note(self) -> str | None:
        """What every figure and table made from generated data says; None on real data."""
        return "stand-in data: generated images, not CIFAR-10" if self.stand_in else None

    @property
    def folder(self) -> Path:
        """Where this session writes: notebooks or stand-in, under runs/ or where `CIFAR_RUNS` says.

        Figures go to the folder that `CIFAR_FIGURES` names, if it is set.
        """
        return runs_folder() / ("stand-in" if self.stand_in else "notebooks")

    @property
    def device(self) -> torch.device:
        """The device that `CIFAR_DEVICE` names, else the best one here."""
        return _device()

    @property
    def precision(self) -> str:
        """The precision that suits the device."""
        return choose_precision("auto", self.device)

    # What notebook 3 trains.

    @functools.cached_property
    def choice(self) -> live_run.Choice:
        """What is trained here: the recipe of `CIFAR_RECIPE`, else what suits this machine.

        The stand-in data's classes are learnt from fewer images: there it is `small` on some.
        `CIFAR_EPOCHS` sets the number of epochs.
        """
        choice = self._choose()
        epochs = _variable("CIFAR_EPOCHS")
        if epochs is None:
            return choice
        config = replace(choice.config, epochs=int(epochs))
        seconds = live_run.estimate_seconds(config, self.device, self.train)
        return live_run.Choice(config, seconds, choice.why)

    def _choose(self) -> live_run.Choice:
        """Choose what is trained, with the recipe's own number of epochs."""
        asked = _variable("CIFAR_RECIPE") or live_run.AUTO
        if not self.stand_in:
            return live_run.choose(self.device, self.train, asked, self._is_begun)
        name = "small" if asked == live_run.AUTO else asked
        config = recipe(name, train_size=min(STAND_IN_TRAINING, len(self.train)))
        seconds = live_run.estimate_seconds(config, self.device, self.train)
        return live_run.Choice(config, seconds, "enough for stand-in data")

    @property
    def config(self) -> TrainConfig:
        """The configuration of what is trained."""
        return self.choice.config

    @property
    def run(self) -> Path:
        """The run directory of what is trained."""
        return self._run_of(self.config)

    def _run_of(self, config: TrainConfig) -> Path:
        """Return the run directory of a configuration, and of no other configuration."""
        if config == recipe("report") and not self.stand_in:
            return runs_folder() / "report-seed42"  # where `make full` trains it
        settings = json.dumps(asdict(config), sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()
        return self.folder / f"{config.recipe}-seed{config.seed}-{digest[:8]}"

    def _is_begun(self, config: TrainConfig) -> bool:
        return (self._run_of(config) / "config.json").exists()

    def fit(self, show: Callable[[Figure], None] | None = None) -> dict:
        """Train what `choice` says, and return its metrics.

        A run that was interrupted goes on, and of a finished one the metrics are read. `show` is
        called after each epoch with a figure of the run up to now.
        """
        after_epoch = self.watch(show) if show else None
        device = str(self.device)
        return fit(
            self.config, self.run, self.train, self.test, device=device, after_epoch=after_epoch
        )

    def watch(self, show: Callable[[Figure], None]) -> live_run.Watch:
        """Return what watches this session's run, by its answers to the first eight test images."""
        how = {
            "normalization": self.config.test_normalization,
            "precision": choose_precision(self.config.precision, self.device),
        }
        return live_run.Watch(self.run, self.config.epochs, self.test[:8], show, **how)

    # What notebooks 4 and 5 look at.

    def network(self) -> Network:
        """Return the network that is looked at, on this session's device.

        `CIFAR_WEIGHTS` names its file, or `pretrained`: the package's weights, trained on CIFAR-10;
        or `trained`: this session's own run, trained now if it isn't yet. The default is
        `pretrained`, and on stand-in data `trained`.

        Raises InputError if the file isn't weights of this package.
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
        """The competition's file: what `CIFAR_TEST_FILE` names, else what `custom_test` makes."""
        named = _variable("CIFAR_TEST_FILE")
        return Path(named) if named else self.folder / "custom_test.pkl"

    def custom_test(self) -> ImageSet:
        """Return the images of `test_file`, read as what it is: a stranger's pickle.

        Where none is named, it is generated from the test images; only then it has labels.

        Raises InputError if the file isn't the competition's.
        """
        if _variable("CIFAR_TEST_FILE"):
            return read_test_file(self.test_file)
        known = generate_test_file(self.test_file, self.test)
        return replace(read_test_file(self.test_file), labels=known.labels)

    def comparison(self) -> pd.DataFrame:
        """Return the report's Table 2 beside the package's weights and this session's finished run.

        The last column says why they differ. The table is also written, as comparison.csv.
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
        """Return the reasons by the quantities of Table 2 that may differ."""
        chance = "the weights: other random numbers, another GPU"
        reasons = {"last train accuracy": chance, "test accuracy": chance}
        if (self.config.blocks, self.config.channels) != ((3, 4, 3), (66, 132, 264)):
            smaller = "this run: a smaller network, for this machine"
            reasons |= dict.fromkeys(_complexity(ResNet()), smaller)
        if self.config != recipe("report") or self.stand_in:
            reasons["epochs"] = "this run: a shorter training, for this machine"
        if self.config.train_size:
            reasons["training images"] = "this run: fewer training images"
        if self.note:
            reasons["test data"] = self.note
        return reasons

    def specifications(self) -> pd.DataFrame:
        """Return the system specifications of the report, of the package's weights and of this run.

        They are those of the machines that each was trained on. Commits have seven digits.
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

    def show(self, figure: Figure, name: str, alt: str) -> None:
        """Save the figure as `name`.png and show it; `alt` says what it shows."""
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
    """Return an environment variable, or None.

    Kernels start in notebooks/, which nobody means by a relative path: paths are taken as relative
    to the repository, unless `make run` has made them absolute before.
    """
    environment.make_absolute(ROOT)
    return environment.read(name)


def _device() -> torch.device:
    try:
        return choose_device(_variable("CIFAR_DEVICE") or "auto")
    except InputError as error:
        raise InputError(f"CIFAR_DEVICE: {error}") from error


def _results_folder() -> Path | None:
    """Return the folder that `CIFAR_RUNS` names, or None: results go into the repository.

    It may be on a mounted Drive: what must outlive this machine goes there. On Kaggle an attached
    repository can't be written, so results go to Kaggle's folder for them.

    Raises InputError if there is no folder that can be written.
    """
    named = _variable("CIFAR_RUNS")
    try:
        if named:
            return _writable(Path(named))
        runs = ROOT / "runs"
        _writable(runs if runs.exists() else ROOT)
        return None
    except OSError as error:
        if not named and KAGGLE_OUTPUT.is_dir():
            return KAGGLE_OUTPUT
        remedy = "name another one" if named else "set CIFAR_RUNS to one, and start again"
        raise InputError(
            f"CIFAR_RUNS: expected a folder that can be written to, got {named or ROOT} "
            f"({error.strerror}): {remedy}"
        ) from error


@functools.cache  # an error isn't cached: a folder that can't be written is tried again
def _writable(folder: Path) -> Path:
    """Return the folder, made if need be.

    Raises OSError if no file can be written in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # permissions alone don't tell
    return folder


def _data_folder() -> Path:
    """Return where CIFAR-10 is, or is downloaded to.

    It is data/ of the repository, or of the results' folder if the repository can't be written.
    """
    data = ROOT / "data"
    try:
        if not (data / FOLDER).is_dir():
            _writable(ROOT)
        return data
    except OSError:
        return _results_folder() / "data"


def runs_folder() -> Path:
    """Return the folder of all runs: runs/, or the one that `CIFAR_RUNS` names."""
    return _results_folder() or ROOT / "runs"


def _complexity(network: ResNet) -> dict[str, str]:
    """Return a network's size by the quantities of Table 2."""
    size = torchinfo.summary(network, (1, 3, 32, 32), verbose=0)
    megabytes = (size.total_input + size.total_output_bytes + size.total_param_bytes) / 1e6
    return {
        "parameters": f"{size.total_params:,}",
        "trainable parameters": f"{size.trainable_params:,}",
        "multiply-adds (M)": f"{size.total_mult_adds / 1e6:.2f}",
        "estimated size (MB)": f"{megabytes:.2f}",
    }


def _outcome(run: Path) -> dict[str, str]:
    """Return what a finished run came to, by the quantities of Table 2."""
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
    """Display functions and classes as the package has them, as highlighted Python.

    Where no HTML is shown, they are plain text.
    """
    sources = [textwrap.dedent(inspect.getsource(part)).rstrip() for part in parts]
    text = "\n\n".join(sources)
    # Colours for light and dark pages alike; styles stand in the tags, as pages differ in classes.
    formatter = HtmlFormatter(
        noclasses=True,
        cssstyles="padding: 0.4em 0.8em",
        prestyles="color: #222222; background: none; font-family: monospace",
    )
    page = highlight(text, PythonLexer(), formatter)
    display({"text/html": page, "text/plain": text}, raw=True)
