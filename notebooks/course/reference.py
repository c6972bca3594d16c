"""The stored numbers that the notebooks compare with: the report's, and this repository's records.

The report's are in results/reference: its run of sixty epochs is "the published run".
"""

import json
import sqlite3
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
    """Return the report's Table 2 by quantity, with the interval that its test accuracy leaves."""
    last = published_history().iloc[-1]
    correct = int(published_confusion().to_numpy().trace())
    return {
        "parameters": "4,916,284",
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


def sixty_epochs(quantity: str) -> dict[str, pd.Series]:
    """Return `loss` or `accuracy` by epoch, of the published run and of the package's weights.

    There are four series, named by images and run: two runs, on training and on test images.
    """
    published, ours = published_history(), pd.read_csv(SHIPPED_RUN / "history.csv")
    return {
        "training images (published)": published[f"train_{quantity}"],
        "test images (published)": published[f"test_{quantity}"],
        "training images (ours)": ours[f"train_{quantity}"],
        "test images (ours)": ours[f"test_{quantity}"],
    }


def trials_table(path: Path = SEARCH) -> tuple[pd.DataFrame, dict[str, float]]:
    """A search's trials that finished or were pruned, and how much of the differences each
    parameter explains.

    The columns: number, accuracy (on the validation split after the trial's last epoch), duration,
    state (COMPLETE or PRUNED), and the parameters. The shares are PED-ANOVA's (Watanabe et al.
    2023, arXiv:2304.10255), of the finished trials, largest first. Raises InputError where the file
    is missing or holds no search, or where optuna isn't installed.
    """
    environment.require("optuna", "A search's trials")
    import optuna  # here, as it takes a second
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from sqlalchemy.pool import NullPool  # comes with optuna

    try:
        database = f"{Path(path).resolve(strict=True).as_uri()}?mode=ro"  # a look changes nothing
        connect = {"creator": lambda: sqlite3.connect(database, uri=True), "poolclass": NullPool}
        storage = optuna.storages.RDBStorage("sqlite://", connect, skip_table_creation=True)
        study = optuna.load_study(study_name="table-1", storage=storage)
        table = study.trials_dataframe(("number", "value", "duration", "state", "params"))
        table.columns = table.columns.str.removeprefix("params_")
        table = table.rename(columns={"value": "accuracy"}).dropna(subset="accuracy")
        return table, get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    except Exception as error:  # a damaged file can end in nearly any
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"study: expected a search's SQLite file, got {path} ({reason}): get results/ again"
        ) from error


def interval_text(low: float, high: float) -> str:
    """Return an interval of two fractions in percent."""
    return f"{low:.2%} to {high:.2%}"
