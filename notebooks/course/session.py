"""What the five notebooks share: a profile, its data, its run, and how its results are shown."""

import functools
import hashlib
import importlib.util
import inspect
import json
import tempfile
import textwrap
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
from cifar_lib.data import FOLDER, STAND_IN, ImageSet, load_cifar10, stratified_split
from cifar_lib.errors import InputError
from cifar_lib.files import write_atomically
from cifar_lib.fit import fit
from cifar_lib.hardware import choose_device, choose_precision, memory_format, prepare
from cifar_lib.kaggle import read_test_file
from cifar_lib.model import PRETRAINED, ResNet, WeightsInfo, load_model
from cifar_lib.recipes import TrainConfig, recipe
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
GIVE_UP_AFTER = 180.0  # seconds a quick run waits for a download
QUICK_TEST_IMAGES = 1000
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
    """One notebook's profile and data.

    `quick` trains a little, evaluates a stratified part of the test set, writes under runs/, and
    goes on with generated stand-in data where there is no CIFAR-10.
    `full` takes real data only, evaluates all test images, and writes figures/. On a GPU it trains
    the report's recipe, in the run directory of `make full`; without one it trains as `quick` does.
    """

    profile: str
    train: ImageSet
    test: ImageSet
    scored: ImageSet  # the part of `test` that this profile evaluates; its ids count in `test`
    config: TrainConfig

    @classmethod
    def open(cls) -> "Session":
        """Return the session of the profile in `CIFAR_PROFILE`: quick, the default, or full.

        Raises InputError if a variable is wrong, results can't be written, or data is missing.
        """
        profile = _variable("CIFAR_PROFILE") or "quick"
        prepare(_device(), "auto")
        places = {"home": _data_folder(), "archives": _results_folder()}

        if profile == "full":
            train, test = load_cifar10(**places)
            test = replace(test, ids=tuple(range(len(test))))
            name = "quick" if _device().type == "cpu" else "report"
            return cls(profile, train, test, test, recipe(name))

        try:
            train, test = load_cifar10(give_up_after=GIVE_UP_AFTER, **places)
        except InputError as error:
            if _variable("CIFAR10_ROOT"):
                raise  # a place was named: going on without it would hide the mistake
            print(error)
            print("Going on with generated stand-in data; every figure and table says so.")
            train, test = generate_stand_in()
        test = replace(test, ids=tuple(range(len(test))))
        _, part = stratified_split(test.labels, QUICK_TEST_IMAGES, seed=0)
        return cls(profile, train, test, test[part], recipe("quick"))

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
        """Where this session writes everything but the figures of the full profile.

        It is <profile> or <profile>-stand-in, under runs/ or in the folder that `CIFAR_RUNS` names.
        """
        name = f"{self.profile}-stand-in" if self.stand_in else self.profile
        return runs_folder() / name

    @property
    def run(self) -> Path:
        """The run directory of this session's configuration, and of no other configuration."""
        if self.profile == "full" and self.config == recipe("report"):
            return runs_folder() / "report-seed42"
        settings = json.dumps(asdict(self.config), sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()
        return self.folder / f"{self.config.recipe}-seed{self.config.seed}-{digest[:8]}"

    def fit(self) -> dict:
        """Train this session's configuration and return its metrics.

        A run that was interrupted goes on, and of a finished one the metrics are read.
        """
        return fit(self.config, self.run, self.train, self.scored, device=str(self.device))

    def trained_model(self) -> tuple[ResNet, WeightsInfo]:
        """Return the network that is looked at, on this session's device, and what is known of it.

        `CIFAR_WEIGHTS` names its file, or `pretrained`: the package's weights, trained on CIFAR-10;
        or `trained`: this session's own run, trained now if it isn't yet. The default is
        `pretrained`, and on stand-in data `trained`.

        Raises InputError if the file isn't weights of this package.
        """
        default = "trained" if self.stand_in else PRETRAINED
        weights = _variable("CIFAR_WEIGHTS") or default
        if weights == "trained":
            if not (self.run / "metrics.json").exists():
                print("No trained network yet: training one as in notebook 3.")
            self.fit()
            weights = self.run / "model.safetensors"
        model, info = load_model(weights)
        device = self.device
        return model.to(device, memory_format=memory_format(device)), info

    @property
    def device(self) -> torch.device:
        """The device that `CIFAR_DEVICE` names, else the best one here."""
        return _device()

    @property
    def precision(self) -> str:
        """The precision that suits the device."""
        return choose_precision("auto", self.device)

    @property
    def test_file(self) -> Path:
        """The competition's file: what `CIFAR_TEST_FILE` names, else what `custom_test` makes."""
        named = _variable("CIFAR_TEST_FILE")
        return Path(named) if named else self.folder / "custom_test.pkl"

    def custom_test(self) -> ImageSet:
        """Return the images of `test_file`, read as what it is: a stranger's pickle.

        Where none is named, it is generated from the scored test images; only then it has labels.

        Raises InputError if the file isn't the competition's.
        """
        if _variable("CIFAR_TEST_FILE"):
            return read_test_file(self.test_file)
        known = generate_test_file(self.test_file, self.scored)
        return replace(read_test_file(self.test_file), labels=known.labels)

    def comparison(self) -> pd.DataFrame:
        """Return the report's Table 2 beside the package's weights and this session's finished run.

        The last column says why they differ. The table is also written, as comparison.csv.
        """
        network = _complexity(ResNet(self.config.blocks, self.config.channels))
        published = published_table_2()
        columns = {
            "published": published,
            "the package's weights": {**network, **_outcome(SHIPPED_RUN)},
            "this run": {**network, **_outcome(self.run)},
            "why they differ": self._why_they_differ(),
        }
        table = pd.DataFrame(columns, index=pd.Index(published, name="quantity")).fillna("")
        write_atomically(self.folder / "comparison.csv", table.to_csv().encode())
        return table

    def _why_they_differ(self) -> dict[str, str]:
        """Return the reasons by the quantities of Table 2 that may differ."""
        chance = "the weights: other random numbers, another GPU"
        reasons = {"last train accuracy": chance, "test accuracy": chance}
        if self.config != recipe("report") or self.stand_in:
            shorter = "this run: what two processor cores train in minutes"
            reasons["epochs"] = reasons["training images"] = shorter
        if len(self.scored) < 10_000:
            reasons["its 95 % interval"] = "this run: fewer test images, a wider interval"
        if self.note:
            reasons["test data"] = self.note
        return reasons

    def specifications(self) -> pd.DataFrame:
        """Return the system specifications of the report, of the package's weights and of this run.

        They are those of the machines that each was trained on.
        """
        columns = {"published": PUBLISHED_SYSTEM}
        for name, run in {"the package's weights": SHIPPED_RUN, "this run": self.run}.items():
            columns[name] = json.loads((run / "environment.json").read_text(encoding="utf-8"))
        cells = {
            name: [str(system.get(key) or "–") for key in SYSTEM]
            for name, system in columns.items()
        }
        return pd.DataFrame(cells, index=list(SYSTEM.values()))

    def show(self, figure: Figure, name: str, alt: str) -> None:
        """Save the figure as `name`.png and show it; `alt` says what it shows.

        In the full profile it goes to figures/, of the repository or of the folder that
        `CIFAR_RUNS` names; else it goes beside the other files of this session.
        """
        folder = self.folder / "figures"
        if self.profile == "full":
            folder = (_results_folder() or ROOT) / "figures"
        png = save_figure(figure, folder / f"{name}.png", self.note)
        kind, content = for_notebook(figure, png)
        # Not `alt=`, which Colab's IPython 7 lacks.
        display(Image(content, format=kind, metadata={"alt": alt}))

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
