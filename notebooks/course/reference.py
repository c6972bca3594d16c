"""The stored numbers that the notebooks compare with: the report's, and this repository's records.

The report's are in results/reference: its run of sixty epochs is "the published run".
"""

import json
import sqlite3
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from cifar_lib import environment
from cifar_lib.data import REAL
from cifar_lib.errors import InputError
from cifar_lib.evaluate import wilson_interval

RESULTS = Path(__file__).resolve().parents[2] / "results"
REFERENCE = RESULTS / "reference"
SHIPPED_RUN = RESULTS / "report-seed42"  # the records of the package's weights
SEEDS = (42, 0, 1)  # of the runs of the recipe `report`, results/report-seed*
SEARCH = RESULTS / "tuning" / "study.db"  # a search's trials
SHIFT = RESULTS / "shift"  # every adaptation on every shift, with the package's weights
LABEL_CHECKS = RESULTS / "label-errors" / "cifar10.csv"  # people's votes on test labels
CATS_BY_EYE = RESULTS / "cats-by-eye" / "stripes.csv"  # which of 144 test cats are striped

# The machine of the published run, in the words of the report; the keys are environment.json's.
PUBLISHED_SYSTEM = {
    "cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz",
    "gpu": "NVIDIA A100-SXM4-40GB",
    "memory_gb": "82.9648",
    "python": "3.9.18",
    "cuda": "12.4",
    "torch": "2.6.0+cu124",
}


def published_history() -> pd.DataFrame:
    """Return the published run's 60 epochs, one row per epoch, accuracies as fractions.

    What the report calls validation is the test set.
    """
    history = pd.read_csv(REFERENCE / "history.csv")
    return history.assign(
        train_accuracy=history.train_accuracy / 100, test_accuracy=history.test_accuracy / 100
    )


def published_confusion() -> pd.DataFrame:
    """Return the published confusion matrix: rows true, columns predicted, 1,000 images per row."""
    return pd.read_csv(REFERENCE / "confusion_matrix.csv", index_col=0)


def recorded_confusion(run: str) -> np.ndarray:
    """Return the test confusion matrix of a run under results/, such as `report-seed0`.

    Rows are true, columns predicted classes: counts, int64 (10, 10).
    """
    metrics = json.loads((RESULTS / run / "metrics.json").read_text(encoding="utf-8"))
    return np.array(metrics["test"]["confusion_matrix"])


def published_table_2() -> dict[str, str]:
    """Return the report's Table 2 as {quantity: value}, with the test accuracy's interval added."""
    last = published_history().iloc[-1]
    correct = int(published_confusion().to_numpy().trace())
    return {
        "parameters": "4,916,284",
        "trainable parameters": "4,916,284",
        "multiply-adds (M)": "769.05",
        "estimated size (MB)": "34.01",
        "epochs": "60",
        "training images": "50,000",
        "last train accuracy": f"{last.train_accuracy:.2%}",
        "test accuracy": f"{last.test_accuracy:.2%}",
        "its 95 % interval": interval_text(*wilson_interval(correct, 10_000)),
        "test images": "10,000",
        "test data": REAL,
    }


def our_histories() -> dict[int, pd.DataFrame]:
    """Return the 60 epochs of each run of the recipe `report`, as {seed: rows of history.csv}.

    Accuracies are fractions.
    """
    return {seed: pd.read_csv(RESULTS / f"report-seed{seed}" / "history.csv") for seed in SEEDS}


def sixty_epochs(quantity: str) -> dict[str, pd.DataFrame]:
    """Return `loss` or `accuracy` by epoch, on training and on test images.

    There is one frame for each of the two sets of images. Its rows are the epochs, numbered from 1.
    Its columns are the value of the published run, and the lowest and the highest value of this
    repository's runs.
    """
    published, epochs = published_history(), pd.RangeIndex(1, 61, name="epoch")
    frames = {}
    for name, part in (("training images", "train"), ("test images", "test")):
        column = f"{part}_{quantity}"
        ours = pd.DataFrame({seed: run[column] for seed, run in our_histories().items()})
        columns = {"published": published[column], "lowest": ours.min(1), "highest": ours.max(1)}
        frames[name] = pd.DataFrame(columns).set_index(epochs)
    return frames


def trials_table(path: Path = SEARCH) -> tuple[pd.DataFrame, dict[str, float]]:
    """Return a search's trials, and the share of their differences that each parameter explains.

    There is one row for each trial that finished or was pruned. The columns are number, accuracy
    (on the validation split after the trial's last epoch), duration, state (COMPLETE or PRUNED),
    and the parameters. PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255) computes the shares from
    the finished trials. The largest share comes first.

    Raises InputError if the file is missing or holds no search, or if optuna isn't installed.
    """
    environment.require("optuna", "A search's trials")
    import optuna  # here, because it takes a second
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from sqlalchemy.pool import NullPool  # comes with optuna

    try:
        database = f"{Path(path).resolve(strict=True).as_uri()}?mode=ro"  # reading changes nothing
        connect = {"creator": lambda: sqlite3.connect(database, uri=True), "poolclass": NullPool}
        storage = optuna.storages.RDBStorage("sqlite://", connect, skip_table_creation=True)
        study = optuna.load_study(study_name="table-1", storage=storage)
        table = study.trials_dataframe(("number", "value", "duration", "state", "params"))
        table.columns = table.columns.str.removeprefix("params_")
        table = table.rename(columns={"value": "accuracy"}).dropna(subset="accuracy")
        with warnings.catch_warnings():  # older versions call PED-ANOVA experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            evaluator = PedAnovaImportanceEvaluator()
        return table, get_param_importances(study, evaluator=evaluator)
    except Exception as error:  # a damaged file can raise nearly any exception
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"study: expected optuna's SQLite file, got {path} ({reason}): get results/ again"
        ) from error


def interval_text(low: float, high: float) -> str:
    """Return an interval between two fractions as text, in percent."""
    return f"{low:.2%} to {high:.2%}"
