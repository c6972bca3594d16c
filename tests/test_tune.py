"""Searches: the space, what a trial does, and several worker processes on one study, one of them
killed."""

import contextlib
import getpass
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.trial import FixedTrial, TrialState

from cifar_lib.errors import InputError
from cifar_lib.model import PARAMETER_BUDGET, count_parameters
from cifar_lib.recipes import recipe
from cifar_lib.tune import SHAPES, objective, open_study, own_values, search_space, suggest, work

ROOT = Path(__file__).parent.parent
TABLE_1 = {
    "learning_rate": 0.1,
    "momentum": 0.9,
    "weight_decay": 2e-4,
    "label_smoothing": 0.05,
    "warmup_epochs": 1,
}
TABLE_1 |= {"batch_size": 128, "shape": "3,4,3 of 66,132,264"}
BASE = recipe(
    "report", epochs=2, precision="fp32", watch_test=False, validation_size=10, schedule="cosine"
)
SPACE = search_space(BASE)
# A worker whose objective takes a while, says when it runs, and for a certain file's sake waits to
# be killed.
WORKER = """
import sys, time
from pathlib import Path
from cifar_lib.tune import open_study, work
where, folder, name, trials, one_host = sys.argv[1:]
folder = Path(folder)
def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    (folder / f"{name}-{trial.number}").write_text(str(x))
    time.sleep(300 if name == "victim" else 0.1)
    return x
work(open_study(where, {}, heartbeat=1), int(trials), objective, one_host == "1")
"""


def test_the_reports_values_are_in_the_space_and_give_its_recipe():
    base = recipe("report")
    config = suggest(FixedTrial({**TABLE_1, "warmup_epochs": 10}), base)
    assert config == base and own_values(base) == {**TABLE_1, "warmup_epochs": 10}
    assert all(count_parameters(*shape) <= PARAMETER_BUDGET for shape in SHAPES.values())
    assert all(count_parameters(*shape) > 0.9 * PARAMETER_BUDGET for shape in SHAPES.values())


def test_a_trial_scores_the_validation_split_and_reports_every_epoch(stand_in, monkeypatch):
    monkeypatch.setitem(SHAPES, "3,4,3 of 66,132,264", ((1,), (16,)))
    train = stand_in[0]
    seen = []
    trial = FixedTrial({**TABLE_1, "batch_size": 64})
    trial.report = lambda value, step: seen.append((step, value))
    score = objective(train, BASE, "cpu")(trial)
    assert [step for step, _ in seen] == [0, 1] and seen[-1][1] == score and 0 <= score <= 1


def test_a_trial_that_diverges_is_pruned(stand_in, monkeypatch):
    monkeypatch.setitem(SHAPES, "3,4,3 of 66,132,264", ((1,), (16,)))
    trial = FixedTrial({**TABLE_1, "batch_size": 64})
    with monkeypatch.context() as patch, pytest.raises(optuna.TrialPruned, match="diverged"):
        patch.setattr(
            trial, "suggest_float", lambda name, *_, **__: 1e30 if name == "learning_rate" else 0.0
        )
        objective(stand_in[0], replace(BASE, epochs=6, warmup_epochs=0), "cpu")(trial)


def test_without_a_validation_split_there_is_nothing_to_choose_by(stand_in):
    with pytest.raises(InputError, match="tune: expected a validation split"):
        objective(stand_in[0], replace(BASE, validation_size=0), "cpu")


def test_a_study_goes_on_where_it_stopped(tmp_path):
    where = str(tmp_path / "Suche ü" / "study.log")
    for trials in (3, 5, 5):
        study = open_study(where, SPACE)
        work(
            study,
            trials,
            lambda trial: trial.suggest_float("x", 0, 1),
            one_host=True,
            log=lambda _: None,
        )
        assert len(study.trials) == trials


def test_an_interrupted_trial_waits_to_be_run_again(tmp_path):
    def interrupted(trial):
        trial.suggest_float("x", 0, 1)
        raise KeyboardInterrupt

    study = open_study(str(tmp_path / "s"), SPACE)
    with pytest.raises(KeyboardInterrupt):
        work(study, 2, interrupted, one_host=True)
    x = study.trials[0].params["x"]
    work(study, 2, lambda trial: trial.suggest_float("x", 0, 1), one_host=True, log=lambda _: None)
    assert [t.state for t in study.trials] == [
        TrialState.FAIL,
        TrialState.COMPLETE,
        TrialState.COMPLETE,
    ]
    assert study.trials[1].params["x"] == x


def test_a_worker_whose_trial_another_one_took_up_goes_on(tmp_path):
    study = open_study(str(tmp_path / "s"), SPACE)
    lines: list[str] = []

    def suspended(trial):
        if trial.number == 0:
            study.tell(
                0, state=TrialState.FAIL
            )  # what others do to the trial of a worker that they take for dead
        return trial.suggest_float("x", 0, 1)

    work(study, 2, suspended, one_host=True, log=lines.append)
    assert [t.state for t in study.trials] == [
        TrialState.FAIL,
        TrialState.COMPLETE,
        TrialState.COMPLETE,
    ]
    assert lines[0] == "another worker took this one for dead, and has its trial"


# Several workers


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a server of our own on the loopback address, as Debian's package has it."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [
        Path(p).parent for p in [shutil.which("initdb")] if p
    ]
    if not found:
        pytest.skip("needs PostgreSQL's server programs (Debian: postgresql)")
    programs = found[-1]
    as_user = {}
    if getpass.getuser() == "root":  # the server refuses to run as root
        as_user = {"user": "postgres", "group": "postgres", "extra_groups": []}
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        if as_user:
            shutil.chown(folder, "postgres", "postgres")
        quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": folder, **as_user}
        data = f"{folder}/data"
        subprocess.run(
            [programs / "initdb", "-D", data, "-A", "trust", "-U", "tester", "--no-sync"], **quiet
        )
        settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        control = [programs / "pg_ctl", "-D", data, "-w"]
        subprocess.run([*control, "-l", f"{folder}/log", "-o", settings, "start"], **quiet)
        try:
            yield f"postgresql+psycopg://tester@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **quiet)


@pytest.mark.xdist_group("postgres")
@pytest.mark.parametrize("kind", ["journal", "database"])
def test_no_trial_is_lost_or_run_twice_when_a_worker_is_killed(tmp_path, kind, request):
    where = (
        request.getfixturevalue("postgres") if kind == "database" else str(tmp_path / "study.log")
    )
    runs = tmp_path / "runs"
    runs.mkdir()
    trials = 8

    def start(name: str) -> subprocess.Popen:
        command = [
            sys.executable,
            "-c",
            WORKER,
            where,
            str(runs),
            name,
            str(trials),
            str(int(kind == "journal")),
        ]
        return subprocess.Popen(command, cwd=ROOT)

    with contextlib.ExitStack() as stack:
        workers = [start(name) for name in ("victim", "a", "b")]
        for worker in workers:
            stack.callback(worker.kill)
        deadline = time.monotonic() + 120
        while not list(runs.glob("victim-*")):
            assert time.monotonic() < deadline and workers[0].poll() is None
            time.sleep(0.05)
        workers[0].send_signal(signal.SIGKILL)
        assert [worker.wait(timeout=120) for worker in workers] == [-signal.SIGKILL, 0, 0]

    study = open_study(where, {})
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    assert len(complete) == trials
    (lost,) = runs.glob("victim-*")
    assert float(lost.read_text()) in [trial.params["x"] for trial in complete]
    ran = [path.name.split("-")[1] for path in runs.iterdir()]
    assert len(ran) == len(set(ran)) == trials + 1
    assert {int(number) for number in ran} == {t.number for t in complete} | {
        int(lost.name.split("-")[1])
    }


@pytest.mark.xdist_group("postgres")
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_workers_that_start_together_make_one_study(tmp_path, kind, request):
    if kind == "postgres":
        server = request.getfixturevalue("postgres")
        with sqlalchemy.create_engine(server, isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(sqlalchemy.text("CREATE DATABASE together"))
        where = server.rpartition("/")[0] + "/together"
    else:
        where = f"sqlite:///{tmp_path / 'study.db'}"
    workers = 6
    barrier = threading.Barrier(workers)

    def open_together(_) -> optuna.Study:
        barrier.wait()
        return open_study(where, SPACE)

    with ThreadPoolExecutor(workers) as pool:
        studies = list(pool.map(open_together, range(workers)))
    assert len({study._study_id for study in studies}) == 1
    assert open_study(where, SPACE).user_attrs["space"] == SPACE


def test_a_database_that_goes_away_is_one_line(tmp_path):
    study = open_study(f"sqlite:///{tmp_path / 'study.db'}", SPACE)

    def gone(trial):
        raise optuna.exceptions.StorageInternalError("connection lost\nlong story")

    with pytest.raises(
        InputError, match=r"^study: the database went away \(connection lost\): start it"
    ):
        work(study, 1, gone, one_host=False)


# Bad input


def test_another_search_space_is_refused(tmp_path):
    where = str(tmp_path / "study.log")
    open_study(where, SPACE)
    with pytest.raises(
        InputError, match=r"was made with another search space \(these differ: .*epochs"
    ):
        open_study(where, search_space(replace(BASE, epochs=3)))
    assert open_study(where, SPACE).trials == []


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("postgresql+psycopg://me:secret@127.0.0.1:1/none", "can't be reached"),
        ("nosuchdatabase://somewhere/x", "study: "),
        ("://", "study: "),
        ("{tmp}/garbage", "is no study"),
        ("{tmp}", "study: "),
        ("{tmp}/garbage/under", "study: "),
    ],
)
def test_a_study_that_cant_be_opened_is_one_line(tmp_path, where, message):
    (tmp_path / "garbage").write_bytes(b"\x00no journal\n\xff")
    with pytest.raises(InputError) as error:
        open_study(where.format(tmp=tmp_path), SPACE)
    text = str(error.value)
    assert message in text and "\n" not in text and "secret" not in text
    assert (tmp_path / "garbage").read_bytes() == b"\x00no journal\n\xff"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 32}, "32"),
        ({"learning_rate": 1.0}, "learning_rate"),
        ({"momentum": 0.5}, "momentum"),
        (
            {"blocks": "1,1", "channels": "16,32"},
            "expected blocks and channels of one of 3,4,3 of 66,132,264; ",
        ),
    ],
)
def test_a_recipe_outside_the_search_space_is_refused(changes, message):
    with pytest.raises(InputError, match=f"^tune: [^\n]*{message}"):
        search_space(recipe("report", **changes))


def test_the_space_is_json_and_names_every_row_of_table_1():
    assert json.loads(json.dumps(SPACE)) == SPACE
    assert set(SPACE["space"]) == set(TABLE_1)
