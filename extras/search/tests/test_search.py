"""Searches: the space, what a trial does, and several workers on one study, one of them killed."""

import multiprocessing
import os
import shutil
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from cifar_lib.data import ImageSet
from cifar_lib.errors import InputError
from cifar_lib.model import PARAMETER_BUDGET, count_parameters
from cifar_lib.recipes import recipe
from notebooks.course.reference import trials_table
from notebooks.course.stand_in import generate_stand_in
from optuna.trial import FixedTrial, TrialState

import cifar_search as search
from cifar_search import objective, open_search, own_trial, suggest, work

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
# Forking starts at once, where spawning imports torch anew; Windows has only the latter.
CAN_FORK = hasattr(os, "fork")
FORK = multiprocessing.get_context("fork" if CAN_FORK else "spawn")
ROOT = Path(__file__).parents[3]
FIELDS = {"precision": "fp32", "watch_test": False, "validation_size": 10, "schedule": "cosine"}
BASE = recipe("report", epochs=2, **FIELDS)


@pytest.fixture
def stand_in() -> tuple[ImageSet, ImageSet]:
    return generate_stand_in(60, 30)


def x(trial):
    return trial.suggest_float("x", 0, 1)


def silent(_):
    pass


def states(study):
    return [trial.state.name for trial in study.trials]


def test_the_first_trial_is_the_reports_recipe_and_all_shapes_cost_as_much():
    base = recipe("report")
    assert suggest(own_trial(base), base) == base
    assert own_trial(BASE).params["warmup_epochs"] == 1
    sizes = []
    for shape in search.SHAPES:
        config = suggest(FixedTrial({**own_trial(base).params, "shape": shape}), base)
        sizes.append(count_parameters(config.blocks, config.channels) / PARAMETER_BUDGET)
    assert min(sizes) > 0.9 and max(sizes) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"learning_rate": 1.0}, "learning_rate"), ({"blocks": "1", "channels": "16"}, "1 of 16")],
)
def test_a_recipe_outside_the_search_space_is_refused(changes, message):
    with pytest.raises(InputError, match=f"^tune: [^\n]*{message}"):
        own_trial(recipe("report", **changes))


def test_a_trial_scores_the_validation_split_every_epoch_and_is_pruned_where_it_diverges(
    stand_in, monkeypatch
):
    monkeypatch.setattr(search, "SHAPES", ("1 of 16",))
    tiny = replace(BASE, blocks=(1,), channels=(16,), epochs=3)
    trial = FixedTrial(own_trial(tiny).params)
    seen = []
    trial.report = lambda value, step: seen.append((step, value))
    score = objective(stand_in[0], tiny, "cpu")(trial)
    assert [step for step, _ in seen] == [0, 1, 2]
    assert seen[-1][1] == score and 0 <= score <= 1
    trial.suggest_float = lambda name, *_, **__: 1e30 if name == "learning_rate" else 0.0
    with pytest.raises(optuna.TrialPruned, match="diverged"):
        objective(stand_in[0], tiny, "cpu")(trial)
    with pytest.raises(InputError, match="^tune: expected a validation split"):
        objective(stand_in[0], replace(tiny, validation_size=0), "cpu")


def test_a_study_goes_on_where_it_stopped_and_an_interrupted_trial_is_run_again(tmp_path):
    def interrupt(trial):
        x(trial)
        raise KeyboardInterrupt

    where = str(tmp_path / "Suche ü" / "a?b#c%41{d}.db")
    study = open_search(where, BASE)
    with pytest.raises(KeyboardInterrupt):
        work(study, where, 3, interrupt)
    for trials in (3, 5, 5):
        work(open_search(where, BASE), where, trials, x, silent)
        assert states(study) == ["FAIL", *trials * ["COMPLETE"]]
    assert [path.name for path in Path(where).parent.iterdir()] == [Path(where).name]
    first, again = study.trials[:2]
    assert first.system_attrs["fixed_params"] == own_trial(BASE).params
    assert first.params == again.params
    assert len({trial.params["x"] for trial in study.trials}) == 5
    with pytest.raises(InputError, match=r"\(these differ: epochs\): choose another place"):
        open_search(where, replace(BASE, epochs=3))


def test_a_suspended_worker_leaves_its_trial_to_others_and_a_living_one_keeps_it(tmp_path):
    def suspended(trial):
        study.tell(trial.number, state=TrialState.FAIL)  # as others do to whom they take for dead
        return x(trial)

    def watched(trial):
        work(open_search(where, BASE), where, 1, x, lines.append)  # another worker joins
        raise optuna.TrialPruned

    where, lines = str(tmp_path / "s"), []
    study = open_search(where, BASE)
    runs = iter([suspended, watched])
    work(study, where, 1, lambda trial: next(runs)(trial), lines.append)
    assert lines[0] == "another worker took this one for dead, and has its trial"
    assert lines[1].startswith("1 still running elsewhere: ") and lines[2] == "trial 1: pruned"


def test_workers_draw_differently_and_one_alone_draws_the_same_again(tmp_path):
    def drawn(name, seed):
        study = open_search(str(tmp_path / name), BASE, seed)
        work(study, str(tmp_path / name), 3, x, silent)
        return [trial.params["x"] for trial in study.trials]

    assert drawn("a", 1) == drawn("b", 1) != drawn("c", 2)
    pair = [open_search(str(tmp_path / "pair"), BASE) for _ in range(2)]
    assert len({x(study.ask()) for study in pair}) == 2


def test_a_search_that_died_of_a_full_disk_goes_on(tmp_path, monkeypatch, capfd):
    resource = pytest.importorskip("resource", reason="needs limits on a file's size")
    monkeypatch.setattr(search, "HEARTBEAT", 1)
    file = tmp_path / "s"
    study = open_search(str(file), BASE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size // 2, hard))
    try:
        with pytest.raises(InputError, match=r"^study: [^\n]*disk[^\n]*the same command goes on$"):
            work(study, str(file), 2, x, silent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert states(study) == ["RUNNING"]
    deadline = time.monotonic() + 60
    while states(study).count("COMPLETE") < 2:
        assert time.monotonic() < deadline
        work(open_search(str(file), BASE), str(file), 2, x, silent)
    assert "Traceback" not in capfd.readouterr().err
    numbers = [trial.system_attrs.get("failed_trial") for trial in study.trials]
    assert states(study).count("FAIL") == numbers.count(0) == 1  # it was run again


@pytest.fixture(params=["file", "postgres"])
def place(request, tmp_path):
    """Where a study can be. CIFAR_POSTGRES: a server for tests, its URL without a database."""
    if request.param == "file":
        yield str(tmp_path / "study.db")
        return
    if "CIFAR_POSTGRES" not in os.environ:
        pytest.skip("needs psycopg and CIFAR_POSTGRES=postgresql+psycopg://user@host")
    server, name = os.environ["CIFAR_POSTGRES"], f"test_{time.time_ns()}"
    engine = sqlalchemy.create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
        yield f"{server}/{name}"
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


def worker(where, folder, name, trials):
    """Its trials say that they run, and end when the file `go` is there."""

    def run(trial):
        (folder / f"{name}-{trial.number}").write_text(str(x(trial)), encoding="utf-8")
        while not (folder / "go").exists():
            time.sleep(0.05)
        return trial.params["x"]

    work(open_search(where, BASE), where, trials, run, silent)


def test_no_trial_is_lost_or_run_twice_where_workers_start_together_and_one_is_killed(
    tmp_path, place, monkeypatch
):
    monkeypatch.setattr(search, "HEARTBEAT", 5)  # busy cores delay a beat by seconds
    runs = tmp_path / "runs"
    runs.mkdir()
    # Only one goes on to the eighth: two that begin the last at once would run one too many.
    shares = {"x": 3, "a": 8, "b": 3}
    workers = [FORK.Process(target=worker, args=(place, runs, *share)) for share in shares.items()]
    for process in workers:
        process.start()
    deadline = time.monotonic() + 300
    while len({path.name.split("-")[0] for path in runs.iterdir()}) < 3:
        assert time.monotonic() < deadline and all(process.is_alive() for process in workers)
        time.sleep(0.05)
    workers[0].kill()
    (runs / "go").touch()
    for process in workers:
        process.join(300)
    assert [process.exitcode for process in workers] == [-9, 0, 0]
    study = open_search(place, BASE)
    while states(study).count("COMPLETE") < 8:
        assert time.monotonic() < deadline
        work(study, place, 8, x, silent)
        time.sleep(0.1)
    numbers = [path.name.split("-")[1] for path in runs.glob("*-*")]
    finished = [t.params["x"] for t in study.trials if t.state == TrialState.COMPLETE]
    (lost,) = runs.glob("x-*")
    assert len(numbers) == len(set(numbers)) and len(finished) == 8
    assert finished.count(float(lost.read_text(encoding="utf-8"))) == 1


def test_workers_that_start_together_make_one_study_and_share_its_first_trial_out(place):
    barrier = threading.Barrier(6)

    def first_number(_):
        barrier.wait()
        study = open_search(place, BASE)
        barrier.wait()
        return study.ask().number

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(first_number, range(6))) == [0, 1, 2, 3, 4, 5]


def test_the_recorded_search_is_read_and_left_alone(tmp_path):
    recorded = ROOT / "results/tuning/study.db"
    copied = Path(shutil.copy(recorded, tmp_path))
    trials, shares = trials_table(copied)
    assert len(trials) == 28 and (trials.state == "COMPLETE").sum() == 15
    assert trials.accuracy.max() == pytest.approx(0.466) and trials.learning_rate[0] == 0.1
    assert set(shares) < set(trials.columns) and sum(shares.values()) == pytest.approx(1)
    assert list(tmp_path.iterdir()) == [copied] and copied.read_bytes() == recorded.read_bytes()
    with pytest.raises(InputError, match="^study: expected .*nowhere"):
        trials_table(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("where", "content"),
    [
        ("postgresql+psycopg://me:secret@127.0.0.1:1/none", None),
        ("postgresql+psycopg://me:a@secret@127.0.0.1:1/none", None),
        ("postgresql+psycopg://me:secret/none", None),
        ("postgresql+psycopg://me@127.0.0.1:1/none?password=secret&sslpassword=secret", None),
        ("nosuchdatabase://secret/x", None),
        ("://", None),
        ("{tmp}", None),
        ("{tmp}/file/below", b"a file"),
        ("{tmp}/file", b"a file"),
        ("{tmp}/file", b"SQLite format 3\0 it is not"),
        ("sqlite:///{tmp}/file", "CREATE TABLE mine (x)"),
    ],
)
def test_a_study_that_cant_be_opened_is_one_line_without_secrets(tmp_path, where, content):
    file = tmp_path / "file"
    if isinstance(content, str):
        with sqlite3.connect(file) as database:
            database.execute(content)
    elif content:
        file.write_bytes(content)
    before = file.read_bytes() if content else None
    with pytest.raises(InputError, match=r"^study: expected [^\n]*$") as error:
        open_search(where.format(tmp=tmp_path), BASE)
    assert "secret" not in str(error.value)
    assert not content or file.read_bytes() == before
