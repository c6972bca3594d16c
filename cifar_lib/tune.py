"""Search for the hyperparameters of the report's Table 1, by several workers on one study, with
Optuna."""

import json
import platform
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import optuna
import pandas as pd
import psutil
import sqlalchemy.exc
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.storages import (
    BaseStorage,
    JournalStorage,
    RDBStorage,
    RetryHeartbeatStaleTrialCallback,
    fail_stale_trials,
)
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from tqdm import tqdm

from cifar_lib.data import ImageSet
from cifar_lib.errors import InputError
from cifar_lib.evaluate import accuracy, predict
from cifar_lib.hardware import choose_device, choose_precision
from cifar_lib.recipes import TrainConfig
from cifar_lib.step import State, Step, choose_step
from cifar_lib.train import epoch_plan, split, train_one_epoch

STUDY = "table-1"
HEARTBEAT = 10  # seconds; a database takes a worker for dead after three without one
# The report's network, and others that the same five million parameters buy.
SHAPES = {
    "3,4,3 of 66,132,264": ((3, 4, 3), (66, 132, 264)),
    "2,2,2 of 85,170,340": ((2, 2, 2), (85, 170, 340)),
    "2,2,4 of 63,126,252": ((2, 2, 4), (63, 126, 252)),
    "5,6,5 of 50,100,200": ((5, 6, 5), (50, 100, 200)),
}

Objective = Callable[[Trial], float]


def suggest(trial: Trial, base: TrainConfig) -> TrainConfig:
    """`base` with the rows of Table 1 as the trial has them."""
    shape = SHAPES[trial.suggest_categorical("shape", list(SHAPES))]
    return replace(
        base,
        learning_rate=trial.suggest_float("learning_rate", 0.01, 0.4, log=True),
        momentum=trial.suggest_float("momentum", 0.8, 0.98),
        weight_decay=trial.suggest_float("weight_decay", 1e-5, 2e-3, log=True),
        label_smoothing=trial.suggest_float("label_smoothing", 0.0, 0.2),
        warmup_epochs=trial.suggest_int("warmup_epochs", 0, max(1, base.epochs // 2)),
        batch_size=trial.suggest_categorical("batch_size", [64, 128, 256]),
        blocks=shape[0],
        channels=shape[1],
    )


def own_values(base: TrainConfig) -> dict:
    """The parameters with which `suggest` gives `base` itself: a study's first trial, what all
    others compete with.

    Only its warm-up is cut to what is allowed. Raises InputError where another value is outside the
    search space.
    """
    shape = next(
        (name for name, shape in SHAPES.items() if shape == (base.blocks, base.channels)), None
    )
    if shape is None:
        asked = " of ".join(",".join(map(str, numbers)) for numbers in (base.blocks, base.channels))
        raise InputError(
            f"tune: expected blocks and channels of one of {'; '.join(SHAPES)}; got {asked}"
        )
    numbers = ("learning_rate", "momentum", "weight_decay", "label_smoothing", "batch_size")
    warm_up = {"warmup_epochs": min(base.warmup_epochs, max(1, base.epochs // 2))}
    own = {"shape": shape, **{name: getattr(base, name) for name in numbers}, **warm_up}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a number out of range Optuna only warns
        try:
            suggest(optuna.trial.FixedTrial(own), base)
        except (UserWarning, ValueError) as error:
            raise InputError(
                f"tune: the recipe itself, the first trial, is outside the search space ({error}): --set other values"
            ) from error
    return own


def search_space(base: TrainConfig) -> dict:
    """What a study's trials have in common, as JSON: each parameter's distribution, and the
    configuration otherwise."""
    trial = optuna.trial.FixedTrial(own_values(base))
    suggest(trial, base)
    chosen = {"blocks", "channels", *trial.distributions}
    fixed = {name: value for name, value in asdict(base).items() if name not in chosen}
    space = {
        name: optuna.distributions.distribution_to_json(d)
        for name, d in trial.distributions.items()
    }
    return json.loads(json.dumps({"space": space, "configuration": fixed}))


def objective(train: ImageSet, base: TrainConfig, device: str = "auto") -> Objective:
    """The accuracy on the validation split after the last epoch; each epoch's decides whether a
    trial is pruned.

    A training that diverges counts as pruned.
    """
    if not base.validation_size:
        raise InputError(
            "tune: expected a validation split to choose by, got none: use --set validation_size=1000"
        )
    target = choose_device(device)
    base = replace(base, precision=choose_precision(base.precision, target))
    part, validation = split(train.to(target), base)

    def run(trial: Trial) -> float:
        config = suggest(trial, base)
        config = replace(config, step=choose_step(config, target, len(part)))
        state = State.new(config, target)
        step = Step(state, config)
        score = 0.0
        for state.epoch in range(config.epochs):
            plan = epoch_plan(config, len(part), state.epoch)
            try:
                train_one_epoch(step, part, config, plan, tqdm(disable=True))
            except InputError as error:
                raise optuna.TrialPruned(str(error)) from error
            logits = predict(
                state.final_model,
                validation.images,
                config.test_mean,
                config.test_std,
                config.precision,
            )
            score = accuracy(logits, validation.labels)
            trial.report(score, state.epoch)
            if state.epoch < config.epochs - 1 and trial.should_prune():
                raise optuna.TrialPruned
        return score

    return run


def open_study(where: str, space: dict, seed: int = 0, heartbeat: int = HEARTBEAT) -> optuna.Study:
    """The study in a journal file (one host) or at a database URL (many), made if it isn't there
    yet.

    Raises InputError where it can't be reached or read, or was made with another search space.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        storage = _patient(_storage, where, heartbeat)
        study = optuna.create_study(
            study_name=STUDY, storage=storage, direction="maximize", load_if_exists=True
        )
        stored = study.user_attrs.get("space")
        if stored is None:
            study.set_user_attr("space", space)
        began = len(study.trials)
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise InputError(
            f"study: {_shown(where)} can't be reached ({_reason(error)}): start the database"
        ) from error
    except ImportError as error:
        raise InputError(
            f"study: {_shown(where)} needs a driver ({_reason(error)}): pip install it"
        ) from error
    except OSError as error:
        raise InputError(
            f"study: {where} can't be written ({error.strerror}): choose another place"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"study: {_shown(where)} is no study ({_reason(error)}): name another file or URL"
        ) from error
    if stored not in (None, space):
        differing = [
            k
            for part in space
            for k in space[part]
            if stored.get(part, {}).get(k) != space[part][k]
        ]
        raise InputError(
            f"study: {_shown(where)} was made with another search space (these differ: {', '.join(differing)}): "
            "choose another place, or the same settings to go on"
        )
    study.sampler = optuna.samplers.TPESampler(seed=seed + began, constant_liar=True)
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    return study


def trials_table(path: str | Path) -> tuple[pd.DataFrame, dict[str, float]]:
    """A journal's trials that finished or were pruned, and how much of the differences each
    parameter explains.

    The columns: number, accuracy (on the validation split after the trial's last epoch), epochs,
    complete (False: pruned), seconds, and the parameters. The shares are PED-ANOVA's (Watanabe et
    al. 2023, arXiv:2304.10255), of the finished trials. Raises InputError where there is no
    journal.
    """
    if not Path(path).is_file():
        raise InputError(
            f"study: expected a journal, found none at {path}: run `cifar_lib tune --study {path}` first"
        )
    study = optuna.load_study(
        study_name=STUDY, storage=JournalStorage(JournalFileBackend(str(path)))
    )
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    rows = [
        {
            "number": trial.number,
            "accuracy": trial.intermediate_values[trial.last_step],
            "epochs": trial.last_step + 1,
        }
        | {
            "complete": trial.state == TrialState.COMPLETE,
            "seconds": trial.duration.total_seconds(),
            **trial.params,
        }
        for trial in ended
        if trial.last_step is not None  # else it diverged in its first epoch
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        shares = optuna.importance.get_param_importances(
            study, evaluator=PedAnovaImportanceEvaluator()
        )
    return pd.DataFrame(rows), shares


def _storage(where: str, heartbeat: int) -> BaseStorage:
    if "://" not in where:
        path = Path(where)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:  # Optuna would append to whatever it is
            with path.open("rb") as file:
                json.loads(file.readline())["op_code"]
        return JournalStorage(JournalFileBackend(where))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", optuna.exceptions.ExperimentalWarning
        )  # heartbeats have been that since 2021
        return RDBStorage(
            where,
            heartbeat_interval=heartbeat,
            grace_period=3 * heartbeat,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        )


def _patient(connect: Callable, *args) -> BaseStorage:
    """`connect(*args)`, again where another worker makes the same tables at the same moment: Optuna
    doesn't wait."""
    for attempt in range(1, 10):
        try:
            return connect(*args)
        except sqlalchemy.exc.DBAPIError as error:
            if not isinstance(error, sqlalchemy.exc.IntegrityError) and "already exists" not in str(
                error
            ):
                raise
            time.sleep(0.1 * attempt)
    return connect(*args)


def _shown(where: str) -> str:
    """A URL without its password."""
    return re.sub(r"(://[^:@/]*):[^@]*@", r"\1:***@", where)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def work(
    study: optuna.Study,
    trials: int,
    objective: Objective,
    one_host: bool,
    log: Callable[[str], None] = print,
) -> None:
    """Run trials until the study has this many that finished or were pruned, sharing them with
    other workers.

    Two workers never run the same trial, and a dead worker's is taken up again with the same
    parameters: where all workers are on `one_host` (a journal) as soon as its process is gone, else
    (a database) when its heartbeat stops. A worker that was only suspended, and whose trial others
    took up, leaves it to them. Raises InputError where the database goes away.
    """
    begun: list[Trial] = []

    def once(trial: Trial) -> float:
        begun.append(trial)
        trial.set_user_attr("worker", _this_worker())
        earlier = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number]
        if sum(t.state != TrialState.FAIL for t in earlier) >= trials:
            raise _Surplus  # several workers asked for the last one at the same moment
        return objective(trial)

    def report(study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.state == TrialState.PRUNED:
            log(f"trial {trial.number}: pruned")
        elif trial.state == TrialState.COMPLETE:
            log(f"trial {trial.number}: {trial.value:.2%}  (best so far: {study.best_value:.2%})")

    try:
        while not _step(study, trials, once, one_host, report, log):
            begun.clear()
    except KeyboardInterrupt:
        if begun:
            study.enqueue_trial(begun[-1].params, user_attrs={"again": begun[-1].number})
        raise
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise InputError(
            f"study: the database went away ({_reason(error)}): start it, then the same command again"
        ) from error


def _step(
    study: optuna.Study,
    trials: int,
    once: Objective,
    one_host: bool,
    report: Callable,
    log: Callable,
) -> bool:
    """Run a trial, or wait for others that do; True where nothing is left to do."""
    if one_host:
        _take_up_dead(study)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            fail_stale_trials(study)
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    done = sum(state in (TrialState.COMPLETE, TrialState.PRUNED) for state in states)
    if done >= trials:
        return True
    if done + states.count(TrialState.RUNNING) >= trials:
        time.sleep(0.5)  # there is nothing to do unless another worker dies
    else:
        try:
            study.optimize(once, n_trials=1, catch=(_Surplus,), callbacks=[report])
        except ValueError as error:
            if not str(error).startswith("Cannot tell a FAIL trial"):
                raise
            log("another worker took this one for dead, and has its trial")
    return False


class _Surplus(Exception):
    """One trial more than was asked for."""


def _take_up_dead(study: optuna.Study) -> None:
    """Trials of processes that died without a word wait again, under a new number."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not _is_dead(trial):
            continue
        try:
            study.tell(trial.number, state=TrialState.FAIL)
        except (ValueError, RuntimeError):  # another worker has just done it
            continue
        study.enqueue_trial(trial.params, user_attrs={"again": trial.number})


def _this_worker() -> dict:
    process = psutil.Process()
    return {"host": platform.node(), "pid": process.pid, "started": process.create_time()}


def _is_dead(trial: FrozenTrial) -> bool:
    worker = trial.user_attrs.get("worker")
    if worker is None:  # killed between two lines, unless it has just begun
        return (datetime.now() - trial.datetime_start).total_seconds() > 60
    if worker["host"] != platform.node():  # a file that came from another machine
        return True
    try:
        # Not to the second: it is counted from the boot, whose time moves when the clock is set.
        return abs(psutil.Process(worker["pid"]).create_time() - worker["started"]) > 60
    except psutil.NoSuchProcess:
        return True
