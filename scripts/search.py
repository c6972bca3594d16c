"""Search for the hyperparameters of the report's Table 1, by accuracy on a validation split.

    python -m scripts.search --study runs/study.db --trials 40

Each process that runs this command is a worker. Start as many as you like; to resume after a stop,
start the same command again. The workers share one study, which is an SQLite file, or a database
(given by its URL) if they are on several hosts.
"""

import argparse
import functools
import signal
import sqlite3
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import optuna
import sqlalchemy
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from cifar_lib.data import ImageSet, load_cifar10
from cifar_lib.errors import InputError, explained
from cifar_lib.evaluate import accuracy, predict
from cifar_lib.fit import resolve, split
from cifar_lib.hardware import choose_device, prepare
from cifar_lib.recipes import TrainConfig, recipe
from cifar_lib.train import State, Step, train_one_epoch

# Heartbeats and retries have been called experimental for years.
warnings.filterwarnings("ignore", category=ExperimentalWarning)

STUDY = "table-1"  # the study's name in its database
DONE = (TrialState.COMPLETE, TrialState.PRUNED)  # the trials that count as run
HEARTBEAT = 20  # seconds between a worker's signs of life; after three missing ones it is dead
RETRY = RetryHeartbeatStaleTrialCallback()  # queues a copy of a trial that was broken off

# One trial is the recipe `report`, made so short that two cores need minutes for it. A sixth of the
# epochs is warm-up, as in the report. To search with other trials, change this and begin a new
# study: a study remembers what its trials are.
SHORT = {
    "schedule": "cosine",
    "epochs": 6,
    "warmup_epochs": 1,
    "half_size_epochs": 5,
    "train_size": 4000,
    "validation_size": 1000,
    "watch_test": False,
    "policy.ops": "none",
    "policy.erasing": 0.0,
}

# The report's network, and others with as many parameters, about five million. Each is the number
# of blocks per stage "of" the number of channels per stage.
SHAPES = (
    "3,4,3 of 66,132,264",
    "2,2,2 of 85,170,340",
    "2,2,4 of 63,126,252",
    "5,6,5 of 50,100,200",
)


def suggest(trial: Trial, base: TrainConfig) -> TrainConfig:
    """Return `base` with the rows of Table 1 replaced by the values that the trial suggests."""
    blocks, channels = trial.suggest_categorical("shape", SHAPES).split(" of ")
    return replace(
        base,
        learning_rate=trial.suggest_float("learning_rate", 0.01, 0.4, log=True),
        momentum=trial.suggest_float("momentum", 0.8, 0.98),
        weight_decay=trial.suggest_float("weight_decay", 1e-5, 2e-3, log=True),
        label_smoothing=trial.suggest_float("label_smoothing", 0.0, 0.2),
        warmup_epochs=trial.suggest_int("warmup_epochs", 0, max(1, base.epochs // 2)),
        batch_size=trial.suggest_categorical("batch_size", [64, 128, 256]),
        blocks=blocks,
        channels=channels,
    )


def table_1(base: TrainConfig) -> dict[str, object]:
    """Return the values of Table 1 itself, taken from `base`, as the parameters of a trial."""
    rows = ("learning_rate", "momentum", "weight_decay", "label_smoothing")
    rows += ("warmup_epochs", "batch_size")
    return {"shape": SHAPES[0]} | {row: getattr(base, row) for row in rows}


def objective(train: ImageSet, base: TrainConfig, device: str = "auto") -> Callable[[Trial], float]:
    """Return the function that runs one trial.

    That function trains, and returns the validation accuracy after the last epoch. It prunes the
    trial if its accuracy falls behind the other trials', or if the training diverges.

    Raises InputError if `base` can't be trained on these images or this device.
    """
    device = choose_device(device)
    part, validation = split(train.to(device), base)
    resolve(base, device, len(part))  # fail here if nothing can run, before a study is created

    def run(trial: Trial) -> float:
        config = resolve(suggest(trial, base), device, len(part))
        prepare(device, config.precision)
        state = State(config, device)
        step = Step(state)
        for epoch in range(config.epochs):
            # Train for one epoch.
            try:
                train_one_epoch(step, part, epoch)
            except InputError as error:  # it diverged
                raise optuna.TrialPruned(str(error)) from error

            # Score it, and stop a trial that falls behind. After the last epoch there is nothing
            # left to save.
            images, how = validation.images, (config.test_normalization, config.precision)
            score = accuracy(predict(state.model, images, *how), validation.labels.cpu())
            trial.report(score, epoch)
            if epoch < config.epochs - 1 and trial.should_prune():
                raise optuna.TrialPruned
        return score

    return run


def open_study(where: str, first: dict[str, object]) -> optuna.Study:
    """Return the study at `where`, an SQLite file or a database's URL.

    If there is none it is created, and its first trial will have the parameters `first`.

    Raises InputError if the file or the database can't be used.
    """
    what = "study: expected an SQLite file, or a database that can be reached"
    remedy = "mend that, then repeat the same command"
    with explained(what, remedy, ImportError, OSError, SQLAlchemyError, StorageInternalError):
        how = {
            "study_name": STUDY,
            "storage": _storage(where),
            # Take the trials that other workers are running into account, so that no two workers
            # try nearly the same.
            "sampler": optuna.samplers.TPESampler(constant_liar=True),
            "pruner": optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
        }
        try:
            study = optuna.create_study(direction="maximize", **how)
        except DuplicatedStudyError:
            study = optuna.load_study(**how)
            _refuse_other_trials(study)
            return study
        study.set_user_attr("short", SHORT)
        study.enqueue_trial(first)  # only the worker that created the study gets here
        return study


def _refuse_other_trials(study: optuna.Study) -> None:
    """Raise InputError if the study's trials are longer or shorter than those of today."""
    # A worker that comes right after the first one may find the study before its attribute.
    for _ in range(20):
        if "short" in study.user_attrs or study.trials:
            break
        time.sleep(0.1)
    if study.user_attrs.get("short") != SHORT:
        what = "study: expected one with trials like those of SHORT in scripts/search.py"
        raise InputError(f"{what}, got another one: begin a new study")


def _storage(where: str) -> RDBStorage:
    """Return Optuna's storage at `where`.

    If a worker's heartbeat stops, its trial is run again by another worker.
    """
    if "://" in where:
        url, engine = _checked_url(where), {}
    else:
        # SQLAlchemy gets a function that connects, because not every path can be put in a URL.
        Path(where).parent.mkdir(parents=True, exist_ok=True)
        connect = functools.partial(sqlite3.connect, where, timeout=60, isolation_level=None)
        url, engine = "sqlite://", {"creator": connect, "poolclass": NullPool}

    # Create or open the database's tables. If another worker is creating them at this moment, that
    # fails, and works a little later.
    for attempts_left in range(9, -1, -1):
        try:
            storage = RDBStorage(
                url,
                engine,
                heartbeat_interval=HEARTBEAT,
                grace_period=3 * HEARTBEAT,
                heartbeat_stale_trial_callback=RETRY,
            )
            break
        except DBAPIError:
            if not attempts_left:
                raise
            time.sleep(0.1)

    # SQLite has no locks on rows. Therefore each transaction locks the whole file from its
    # beginning; otherwise two workers could take the same waiting trial.
    if engine:
        begin = "BEGIN IMMEDIATE"
        sqlalchemy.event.listen(storage.engine, "begin", lambda c: c.exec_driver_sql(begin))
    return storage


def _checked_url(url: str) -> str:
    """Return `url` as it is, if it is well-formed.

    Raises InputError if it isn't. The message doesn't show it, because it may hold a password.
    """
    try:
        host = sqlalchemy.make_url(url).host or ""
    except (ArgumentError, ValueError):
        host = "@"
    if "@" in host:  # the password has an @, and a part of the password became the host
        form = "kind://user:password@host/name, with %40 for an @ in the password"
        raise InputError(f"study: expected a URL, {form}; got another one: correct it")
    return url


def work(study: optuna.Study, trials: int, objective: Callable[[Trial], float]) -> None:
    """Run trials until the study has as many as `trials` that finished or were pruned.

    Each worker finishes its current trial, so in the end there may be a few more. A trial that is
    interrupted is put back in the queue, with the same parameters.

    Raises InputError if the database can't be reached any more.
    """

    def run(trial: Trial) -> float:
        try:
            return objective(trial)
        except KeyboardInterrupt:
            RETRY(study, study.trials[trial.number])
            raise

    def tell(_: optuna.Study, trial: FrozenTrial) -> None:
        pruned = trial.state == TrialState.PRUNED
        print(f"trial {trial.number}: {'pruned' if pruned else format(trial.value, '.2%')}")

    what, remedy = "study: its database went away", "mend that, then repeat the same command"
    with explained(what, remedy, SQLAlchemyError, StorageInternalError):
        while len(study.get_trials(deepcopy=False, states=DONE)) < trials:
            try:
                study.optimize(run, n_trials=1, callbacks=[tell])
            except ValueError as error:
                # Optuna can't store the result if this process was suspended for over a minute.
                if not str(error).startswith("Cannot tell a"):
                    raise
                print("another worker took this one for dead, and has its trial")


def main(arguments: Sequence[str] | None = None) -> int:
    """Work as one worker and return the exit code.

    The code is 0 for success, 2 for a wrong input, and 130 for an interrupt.
    """
    parser = argparse.ArgumentParser("python -m scripts.search", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--study", required=True, metavar="WHERE", help="an SQLite file, or a database's URL")
    add("--trials", required=True, type=int, metavar="N", help="of all workers together")
    add("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:N or mps")
    add("--data", metavar="ROOT", help="the folder that holds cifar-10-batches-py")
    options = parser.parse_args(arguments)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers send it; same as Ctrl-C
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    base = recipe("report", **SHORT)
    try:
        run = objective(load_cifar10(options.data)[0], base, options.device)
        study = open_study(options.study, table_1(base))
        work(study, options.trials, run)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command continues, with this trial", file=sys.stderr)
        return 130
    for best in study.best_trials[:1]:  # empty if all trials were pruned
        print(f"best on the validation split: {best.value:.2%} with {best.params}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
