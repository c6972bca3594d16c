"""Searches: the space, what a trial does, and several workers on one study, one of them killed."""

import multiprocessing
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.trial import FixedTrial, TrialState

from cifar_lib.errors import InputError
from cifar_lib.model import PARAMETER_BUDGET, count_parameters
from cifar_lib.recipes import TrainConfig, recipe
from notebooks.course.reference import SEARCH, trials_table
from notebooks.course.stand_in import generate_stand_in
from scripts import search
from scripts.search import objective, open_study, suggest, table_1, work

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
# Forking starts at once, where spawning imports torch anew; Windows has only the latter.
PROCESSES = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
ROOT = Path(__file__).parents[1]
SHORT = search.SHORT | {"epochs": 2, "train_size": None, "validation_size": 10}
FIRST = {"x": 0.5}


@pytest.fixture
def base(monkeypatch) -> TrainConfig:
    """A trial of a tiny network on few images."""
    monkeypatch.setattr(search, "SHAPES", ("1 of 16",))
    monkeypatch.setattr(search, "SHORT", SHORT)
    return recipe("report", **SHORT)


@pytest.fixture(params=["file", "postgres"])
def place(request, tmp_path):
    """Where a study can be. CIFAR_POSTGRES: a server for tests, its URL without a database."""
    if request.param == "file":
        yield str(tmp_path / "Suche ü" / "a?b#c%41{d}.db")
        return
    if "CIFAR_POSTGRES" not in os.environ:
        pytest.skip("needs psycopg and CIFAR_POSTGRES=postgresql+psycopg://user@host")
    server, name = os.environ["CIFAR_POSTGRES"], f"test_{time.time_ns()}"
    engine = sqlalchemy.create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
        yield f"{server}/{name}"
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


def x(trial):
    return trial.suggest_float("x", 0, 1)


def states(study):
    return [trial.state.name for trial in study.trials]


def test_the_first_trial_is_table_1_and_all_shapes_cost_about_as_much():
    report = recipe("report", **search.SHORT)
    first = table_1(report)
    assert suggest(FixedTrial(first), report) == report
    assert (first["learning_rate"], first["batch_size"], first["warmup_epochs"]) == (0.1, 128, 1)
    configs = [suggest(FixedTrial(first | {"shape": shape}), report) for shape in search.SHAPES]
    sizes = [count_parameters(c.blocks, c.channels) / PARAMETER_BUDGET for c in configs]
    assert min(sizes) > 0.9 and max(sizes) <= 1


def test_a_trial_scores_the_validation_split_each_epoch(base, stand_in):
    trial, scores = FixedTrial(table_1(base)), {}
    trial.report = lambda score, epoch: scores.update({epoch: score})
    last = objective(stand_in[0], base, "cpu")(trial)
    assert scores.keys() == {0, 1} and scores[1] == last
    assert (last * base.validation_size).is_integer()


def test_a_trial_is_pruned_where_it_falls_behind_or_diverges(base, stand_in):
    trial = FixedTrial(table_1(base))
    trial.should_prune = lambda: True
    with pytest.raises(optuna.TrialPruned, match="^$"):
        objective(stand_in[0], base, "cpu")(trial)
    assert 0 <= objective(stand_in[0], replace(base, epochs=1), "cpu")(trial) <= 1  # it is done
    trial.should_prune = lambda: False
    trial.suggest_float = lambda name, *_, **__: 1e30 if name == "learning_rate" else 0.0
    with pytest.raises(optuna.TrialPruned, match="diverged"):
        objective(stand_in[0], replace(base, epochs=3), "cpu")(trial)


def test_a_search_on_stand_in_data_is_resumed(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search, "load_cifar10", lambda _: generate_stand_in(60, 0))
    where = str(tmp_path / "new" / "study.db")
    command = ["--study", where, "--device", "cpu", "--trials"]
    assert search.main([*command, "1"]) == search.main([*command, "2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line[:8] for line in said] == ["trial 0:", "best on ", "trial 1:", "best on "]
    study = open_study(where, table_1(base))
    best = max(trial.value for trial in study.trials if trial.state == TrialState.COMPLETE)
    assert said[-1].startswith(f"best on the validation split: {best:.2%} with ")
    assert study.trials[0].params == table_1(base)


def test_a_wrong_input_is_one_line_and_an_interrupt_says_how_to_continue(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(search, "load_cifar10", lambda _: generate_stand_in(60, 0))
    command = ["--study", str(tmp_path / "s"), "--device", "cpu", "--trials", "1"]
    assert search.main(command) == 2
    assert capsys.readouterr().err == ("error: train_size: expected at most 60 images, got 4000\n")
    assert not (tmp_path / "s").exists()

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "objective", lambda *_: interrupt)
    assert search.main(command) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_an_interrupted_trial_is_run_again(tmp_path):
    def interrupt(trial):
        x(trial)
        raise KeyboardInterrupt

    study = open_study(str(tmp_path / "s"), FIRST)
    with pytest.raises(KeyboardInterrupt):
        work(study, 1, interrupt)
    work(study, 2, x)
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE"]
    assert [trial.params["x"] for trial in study.trials][:2] == [0.5, 0.5]


def test_workers_that_start_together_make_one_study_and_share_its_trials_out(place):
    together = threading.Barrier(6, timeout=60)

    def worker(_):
        together.wait()
        study = open_study(place, FIRST)
        together.wait()
        study.optimize(x, n_trials=1)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(worker, range(6)))
    study = open_study(place, FIRST)
    assert [trial.number for trial in study.trials] == list(range(6))
    assert states(study) == 6 * ["COMPLETE"]
    values = [trial.params["x"] for trial in study.trials]
    assert values[0] == 0.5 and len(set(values)) == 6


def begin_a_trial(where, begun):
    def run(trial):
        begun.send(x(trial))
        time.sleep(600)

    work(open_study(where, FIRST), 1, run)


def test_a_killed_workers_trial_is_run_again_and_a_living_ones_isnt(place, monkeypatch):
    monkeypatch.setattr(search, "HEARTBEAT", 1)
    here, there = PROCESSES.Pipe()
    worker = PROCESSES.Process(target=begin_a_trial, args=(place, there))
    worker.start()
    lost = here.recv()
    study = open_study(place, FIRST)
    work(study, 1, x)
    assert states(study) == ["RUNNING", "COMPLETE"]  # it is alive
    worker.kill()
    worker.join()
    deadline = time.monotonic() + 60
    while states(study)[0] == "RUNNING":
        assert time.monotonic() < deadline
        work(study, states(study).count("COMPLETE") + 1, x)
        time.sleep(0.2)
    finished = [t.params["x"] for t in study.trials if t.state == TrialState.COMPLETE]
    assert finished.count(lost) == 1


def test_a_suspended_worker_leaves_its_trial_to_others(tmp_path, capsys):
    def suspended_once(trial):
        if trial.number == 0:  # what others do to a worker that they take for dead
            study.tell(trial.number, state=TrialState.FAIL)
        return x(trial)

    study = open_study(str(tmp_path / "s"), FIRST)
    work(study, 1, suspended_once)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "another worker took this one for dead, and has its trial"
    assert said[1].startswith("trial 1: ") and states(study) == ["FAIL", "COMPLETE"]


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
    "where",
    [
        "postgresql+psycopg://me:secret@127.0.0.1:1/none",
        "postgresql+psycopg://me:a@secret@127.0.0.1:1/none",
        "postgresql+psycopg://me:secret/none",
        "nosuchdatabase://secret/x",
        "://",
        "{tmp}",
        "{tmp}/file",
        "{tmp}/file/below",
    ],
)
def test_a_study_that_cant_be_opened_is_one_line_without_secrets(tmp_path, where):
    (tmp_path / "file").write_bytes(b"a file")
    with pytest.raises(InputError, match=r"^study: expected .*$") as error:
        open_study(where.format(tmp=tmp_path), FIRST)
    assert "secret" not in str(error.value)
    assert (tmp_path / "file").read_bytes() == b"a file"


def test_a_study_with_trials_of_another_length_is_refused_and_stays(tmp_path, monkeypatch):
    older = Path(shutil.copy(SEARCH, tmp_path / "older.db"))  # it doesn't say how long they were
    before = older.read_bytes()
    with pytest.raises(InputError, match="SHORT in scripts/search.py"):
        open_study(str(older), FIRST)
    assert older.read_bytes() == before

    open_study(str(tmp_path / "study.db"), FIRST)
    open_study(str(tmp_path / "study.db"), FIRST)
    monkeypatch.setattr(search, "SHORT", SHORT | {"epochs": 3})
    with pytest.raises(InputError, match="begin a new study"):
        open_study(str(tmp_path / "study.db"), FIRST)
