"""A search for the hyperparameters of the report's Table 1, kept in a file or in a database."""

import contextlib
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import optuna
from cifar_lib.data import ImageSet
from cifar_lib.errors import InputError
from cifar_lib.evaluate import accuracy, predict
from cifar_lib.fit import resolve, split
from cifar_lib.hardware import choose_device, prepare
from cifar_lib.recipes import TrainConfig
from cifar_lib.train import State, Step, epoch_plan, train_one_epoch
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FixedTrial, FrozenTrial, Trial, TrialState
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool
from tqdm import tqdm

# Heartbeats and retries have been called experimental for years.
warnings.filterwarnings("ignore", category=ExperimentalWarning)

STUDY = "table-1"
HEARTBEAT = 20  # seconds; a worker is taken for dead after three without one
RETRY = RetryHeartbeatStaleTrialCallback()  # a copy of a trial waits, under a new number
# A trial whose worker died before its first heartbeat, or had no room for it: from now on its
# silence counts.
FIRST_BEATS = """
INSERT INTO trial_heartbeats (trial_id, heartbeat) SELECT trial_id, CURRENT_TIMESTAMP FROM trials
WHERE state = 'RUNNING' AND trial_id NOT IN (SELECT trial_id FROM trial_heartbeats)
"""
# A trial of minutes on two cores: what differs from the recipe. Warm-up is a sixth of the epochs,
# as in the report.
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
# The report's network, and others that the same five million parameters buy: blocks of channels.
SHAPES = (
    "3,4,3 of 66,132,264",
    "2,2,2 of 85,170,340",
    "2,2,4 of 63,126,252",
    "5,6,5 of 50,100,200",
)


def suggest(trial: Trial, base: TrainConfig) -> TrainConfig:
    """`base` with the rows of Table 1 as the trial has them."""
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


def own_trial(base: TrainConfig) -> FixedTrial:
    """The trial that is `base` itself, with its warm-up cut to what is allowed.

    Raises InputError where another value is outside the search space.
    """
    shape = " of ".join(",".join(map(str, numbers)) for numbers in (base.blocks, base.channels))
    warm_up = min(base.warmup_epochs, max(1, base.epochs // 2))
    trial = FixedTrial({**asdict(base), "warmup_epochs": warm_up, "shape": shape})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a number out of range Optuna only warns
            suggest(trial, base)
    except (UserWarning, ValueError) as error:
        raise InputError(
            f"tune: the recipe, the first trial, is outside the search space ({error}): --set "
            "other values"
        ) from error
    return trial


def objective(train: ImageSet, base: TrainConfig, device: str = "auto") -> Callable[[Trial], float]:
    """What a trial does: train, report the validation split's accuracy after each epoch, by which
    it may be pruned (so is one that diverges), and return the last.

    Raises InputError where there is no validation split.
    """
    if not base.validation_size:
        raise InputError(
            "tune: expected a validation split to choose by, got none: "
            "use --set validation_size=1000"
        )
    target = choose_device(device)
    part, validation = split(train.to(target), base)
    resolve(base, target, len(part))  # what can't run must not make a study

    def run(trial: Trial) -> float:
        config = resolve(suggest(trial, base), target, len(part))
        prepare(target, config.precision)
        normalisation = (config.test_mean, config.test_std, config.precision)
        state = State(config, target)
        step = Step(state, config)
        score = 0.0
        for state.epoch in range(config.epochs):
            plan = epoch_plan(config, len(part), state.epoch)
            try:
                train_one_epoch(step, part, plan, tqdm(disable=True))
            except InputError as error:
                raise optuna.TrialPruned(str(error)) from error
            logits = predict(state.model, validation.images, *normalisation)
            score = accuracy(logits, validation.labels)
            trial.report(score, state.epoch)
            if state.epoch < config.epochs - 1 and trial.should_prune():
                raise optuna.TrialPruned
        return score

    return run


def open_search(where: str, base: TrainConfig, seed: int | None = None) -> optuna.Study:
    """The study of searches around `base`, in a file or at a database's URL; made, with `base`
    itself as its first trial, if it isn't there yet.

    Raises InputError where it can't be reached or read, or was made with another search space.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    own = own_trial(base)
    space = {name: str(value) for name, value in {**asdict(base), **own.distributions}.items()}
    del space["blocks"], space["channels"]  # one parameter, the shape
    with _told(where, Exception):  # reading what is no study can end in any
        storage = _storage(where)
        try:
            study = optuna.create_study(study_name=STUDY, storage=storage, direction="maximize")
            study.set_user_attr("space", space)
            study.enqueue_trial(own.params)  # by the one worker that makes the study
        except DuplicatedStudyError:
            study = optuna.load_study(study_name=STUDY, storage=storage)
        with storage.engine.begin() as connection:
            connection.exec_driver_sql(FIRST_BEATS)
        stored = study.user_attrs.get("space", space)  # none: another worker is just making it
        differing = [name for name in space if stored.get(name) != space[name]]
        if differing:
            raise InputError(
                "study: it was made with another search space (these differ: "
                f"{', '.join(differing)}): choose another place, or the same settings to go on"
            )
    if seed is not None:  # another one than when the study was opened before
        seed = hash((seed, len(study.trials))) % 2**32
    study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    return study


def _storage(where: str) -> RDBStorage:
    """Optuna's storage in an SQLite file, or at a URL."""
    where, engine = where.removeprefix("sqlite:///"), {}
    url = where if "://" in where else "sqlite://"
    if url.count("@") > 1:
        raise ValueError  # its password would be taken for a host
    if url != where:
        Path(where).parent.mkdir(parents=True, exist_ok=True)
        engine["creator"] = lambda: sqlite3.connect(where, timeout=60, isolation_level=None)
        engine["poolclass"] = NullPool
        with contextlib.closing(engine["creator"]()) as file:
            tables = file.execute("SELECT name FROM sqlite_master").fetchall()
        if tables and ("studies",) not in tables:
            raise ValueError("it holds something else")
    beats = {"heartbeat_interval": HEARTBEAT, "grace_period": 3 * HEARTBEAT}
    for attempt in range(10):
        try:
            storage = _Storage(url, engine, **beats, heartbeat_stale_trial_callback=RETRY)
            break
        except DBAPIError:
            if attempt == 9:
                raise
            time.sleep(0.1)  # another worker is making the same tables
    if engine:
        # SQLite locks no rows, so a transaction has the file to itself from its beginning: else
        # two workers could take the same waiting trial.
        event.listen(storage.engine, "begin", lambda c: c.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


class _Storage(RDBStorage):
    def record_heartbeat(self, trial_id: int) -> None:
        with contextlib.suppress(SQLAlchemyError, StorageInternalError):
            super().record_heartbeat(trial_id)  # what goes wrong here the trial's report will say


@contextlib.contextmanager
def _told(where: str, *errors: type[Exception]) -> Iterator[None]:
    """What goes wrong with the study becomes an InputError that shows nothing of a URL."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        while not isinstance(error, errors):  # Optuna's own handling of one can end in another
            if (error := error.__cause__ or error.__context__) is None:
                raise
        kind, is_url, _ = where.partition("://")
        reason = str(error.__cause__ or error).partition("\n")[0][:200] or type(error).__name__
        if is_url and isinstance(error, (ArgumentError, ValueError)):
            reason = "a URL is kind://user:password@host/name, with %40 for an @ in the password"
        raise InputError(
            "study: expected a search's SQLite file, or a database that can be reached, got "
            f"{kind} ({reason}): mend that, then the same command goes on"
        ) from error


def work(
    study: optuna.Study,
    where: str,
    trials: int,
    objective: Callable[[Trial], float],
    log: Callable[[str], None] = print,
) -> None:
    """Run trials until the study, opened from `where`, has this many that finished or were pruned,
    or others are running the rest.

    No two workers run the same trial, but those that begin the last one at the same moment run one
    too many. A trial that is interrupted waits to be run again with the same parameters; so does
    that of a worker that died, once its heartbeat has stopped. Raises InputError where the database
    goes away or the disk is full; the same command then goes on.
    """

    def run(trial: Trial) -> float:
        try:
            return objective(trial)
        except KeyboardInterrupt:
            RETRY(study, study.trials[trial.number])
            raise

    def tell(_: optuna.Study, trial: FrozenTrial) -> None:
        pruned = trial.state == TrialState.PRUNED
        log(f"trial {trial.number}: {'pruned' if pruned else format(trial.value, '.2%')}")

    with _told(where, SQLAlchemyError, StorageInternalError):
        while _left(study, trials, log):
            try:
                study.optimize(run, n_trials=1, callbacks=[tell])
            except ValueError as error:
                if not str(error).startswith("Cannot tell a"):
                    raise
                log("another worker took this one for dead, and has its trial")


def _left(study: optuna.Study, trials: int, log: Callable[[str], None]) -> bool:
    """Whether there is a trial to begin."""
    optuna.storages.fail_stale_trials(study)
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    running = states.count(TrialState.RUNNING)
    left = trials - states.count(TrialState.COMPLETE) - states.count(TrialState.PRUNED)
    if 0 < left <= running:
        log(f"{left} still running elsewhere: if that worker died, start the same command again")
    return left > running
