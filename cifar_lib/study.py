"""A study that several workers share, in a journal file (on one host) or a database (on many)."""

import contextlib
import fcntl
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import optuna
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, TrialPruned
from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError

from cifar_lib.errors import InputError

# Heartbeats, here beside ask and tell, and retries have been called experimental for years.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used with")

STUDY = "table-1"
HEARTBEAT = 10  # seconds; a database takes a worker for dead after three without one
JOURNAL = b'{"op_code":'  # what Optuna's journals begin with
RETRY = RetryHeartbeatStaleTrialCallback()  # a copy of a trial waits, under a new number
Objective = Callable[[Trial], float]


def open_study(
    where: str, space: dict[str, str], first: dict[str, object], seed: int = 1
) -> optuna.Study:
    """The study in a journal file or at a database URL; made, with the parameters `first` as its
    first trial, if it isn't there yet. `space`: what its trials have in common, as text.

    Raises InputError where it can't be reached or read, or was made with another search space.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    shown = _shown(where)
    try:
        storage = _storage(where)
        try:
            study = optuna.create_study(study_name=STUDY, storage=storage, direction="maximize")
            study.enqueue_trial(first)  # by the one worker that makes the study
        except DuplicatedStudyError:
            study = optuna.load_study(study_name=STUDY, storage=storage)
        if "space" not in study.user_attrs:
            study.set_user_attr("space", space)
        stored = study.user_attrs["space"]
        differing = [name for name in space if stored.get(name) != space[name]]
    except Exception as error:  # reading what is no study can end in any
        raise _mistake(shown, error) from error
    if differing:
        raise InputError(
            f"study: {shown} was made with another search space (these differ: "
            f"{', '.join(differing)}): choose another place, or the same settings to go on"
        )
    study.sampler = _Sampler(seed)
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    return study


class _Sampler(optuna.samplers.TPESampler):
    """Draws each trial from (seed, its number): a worker that is alone draws the same again, and
    no two workers draw the same."""

    def __init__(self, seed: int):
        super().__init__(constant_liar=True)
        self.seed = seed

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        own = np.random.SeedSequence((self.seed, trial.number)).generate_state(1)
        super().__init__(seed=int(own[0]), constant_liar=True)


class _Journal(JournalFileBackend):
    """Cuts off a last line that a full disk left unfinished, where Optuna would write on in it."""

    def append_logs(self, logs: list[dict]) -> None:
        with open(self._file_path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(file.read().rfind(b"\n") + 1)
            super().append_logs(logs)


def _storage(where: str) -> JournalStorage | RDBStorage:
    if "://" in where:
        return _database(where)
    path = Path(where)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with path.open("rb") as file:
            start = file.read(len(JOURNAL))
        if not JOURNAL.startswith(start):
            raise ValueError("it is no journal")  # Optuna would append to whatever it is
    return JournalStorage(_Journal(where))


def _database(url: str) -> RDBStorage:
    for attempt in range(10):
        try:
            return RDBStorage(
                url,
                heartbeat_interval=HEARTBEAT,
                grace_period=3 * HEARTBEAT,
                heartbeat_stale_trial_callback=RETRY,
            )
        except DBAPIError as error:
            made = isinstance(error, IntegrityError) or "already exists" in str(error)
            if attempt == 9 or not made:
                raise
            time.sleep(0.1)  # another worker is making the same tables


def work(
    study: optuna.Study,
    where: str,
    trials: int,
    objective: Objective,
    log: Callable[[str], None] = print,
) -> None:
    """Run trials until the study, opened from `where`, has this many that finished or were pruned,
    or others are running the rest.

    Workers never run the same trial. One that was interrupted waits to be run again, with the same
    parameters. So does that of a worker that died: in a journal from the next start without another
    worker at work, in a database from when its heartbeat has stopped; there a worker that was only
    suspended leaves its trial to others. Raises InputError where the database goes away or the disk
    is full; the same command then goes on.
    """
    try:
        with _joined(study, where):
            while _left(study, trials, log):
                _run_one(study, trials, objective, log)
    except (SQLAlchemyError, StorageInternalError, OSError) as error:
        raise _mistake(_shown(where), error) from error


def _run_one(
    study: optuna.Study, trials: int, objective: Objective, log: Callable[[str], None]
) -> None:
    """What `study.optimize` does, but that a storage's errors arrive as what they are."""
    trial = study.ask()
    earlier = [t.state for t in study.get_trials(deepcopy=False) if t.number < trial.number]
    value, state = None, TrialState.FAIL
    try:
        # Else it is one too many: several workers began the last one at the same moment.
        if len(earlier) - earlier.count(TrialState.FAIL) < trials:
            with get_heartbeat_thread(trial._trial_id, study._storage):
                value, state = objective(trial), TrialState.COMPLETE
    except TrialPruned:
        state = TrialState.PRUNED
    except optuna.exceptions.UpdateFinishedTrialError:
        log("another worker took this one for dead, and has its trial")
    except KeyboardInterrupt:
        value, state = None, TrialState.FAIL
        RETRY(study, study.trials[trial.number])
        raise
    finally:
        study.tell(trial, value, state, skip_if_finished=True)
    if state != TrialState.FAIL:
        log(f"trial {trial.number}: {'pruned' if value is None else format(value, '.2%')}")


def _left(study: optuna.Study, trials: int, log: Callable[[str], None]) -> bool:
    """Whether there is a trial to begin."""
    optuna.storages.fail_stale_trials(study)  # of a database, by their heartbeats
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    running = states.count(TrialState.RUNNING)
    left = trials - states.count(TrialState.COMPLETE) - states.count(TrialState.PRUNED)
    if 0 < left <= running:
        log(f"{left} still running elsewhere: if that worker died, start the same command again")
    return left > running


@contextlib.contextmanager
def _joined(study: optuna.Study, where: str) -> Iterator[None]:
    """Share the lock that all workers of a journal hold until they end, in whatever way. Who could
    have it alone knows that the others are gone, and their trials wait again under a new number."""
    if "://" in where:
        yield
        return
    with open(f"{where}.workers", "ab") as file:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for trial in study.get_trials(states=(TrialState.RUNNING,)):
                study.tell(trial.number, state=TrialState.FAIL)
                RETRY(study, trial)
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def best(study: optuna.Study) -> str:
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    if TrialState.COMPLETE not in states:
        return "none, as all were pruned"
    return f"{study.best_value:.2%} with {study.best_params}"


def load(path: str | Path) -> optuna.Study:
    """The study in a journal, to look at. Raises InputError where there is none."""
    if not Path(path).is_file():
        raise InputError(
            f"study: expected a journal, found none at {path}: "
            f"run `cifar_lib tune --study {path}` first"
        )
    try:
        return optuna.load_study(study_name=STUDY, storage=_storage(str(path)))
    except Exception as error:
        raise _mistake(str(path), error) from error


def _shown(where: str) -> str:
    """What messages call the study: of a URL neither the password nor the options.

    Raises InputError for a URL that SQLAlchemy would read in another way than was meant.
    """
    if "://" not in where:
        return where
    url = None
    with contextlib.suppress(ArgumentError, ValueError):
        url = make_url(where)
    if url is None or where.count("@") > 1:
        raise InputError(
            "study: expected a URL like postgresql+psycopg://user:password@host/name, with %40 for "
            "an @ in the password; got one that can't be read so: correct it"
        )
    return url.set(query={}).render_as_string(hide_password=True)


def _mistake(shown: str, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return InputError(
        "study: expected a journal that can be read and written, or a database that can be "
        f"reached, got {shown} ({reason}): mend that, then the same command goes on"
    )
