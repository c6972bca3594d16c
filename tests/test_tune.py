"""Searches: the space, what a trial does, and several workers on one study, one of them killed."""

import getpass
import json
import multiprocessing
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import FixedTrial, TrialState

from cifar_lib import study as study_module
from cifar_lib.errors import InputError
from cifar_lib.model import PARAMETER_BUDGET, count_parameters
from cifar_lib.recipes import recipe
from cifar_lib.study import work
from cifar_lib.tune import SHAPES, objective, open_search, own_trial, suggest, trials_table

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:Heartbeat of storage"),
]
FORK = multiprocessing.get_context("fork")  # starts at once, where spawning imports torch anew
ROOT = Path(__file__).parent.parent
FIELDS = {"precision": "fp32", "watch_test": False, "validation_size": 10, "schedule": "cosine"}
BASE = recipe("report", epochs=2, **FIELDS)


def x(trial):
    return trial.suggest_float("x", 0, 1)


def silent(_):
    pass


def worker(where, folder, name):
    """Its trials say that they run, and end when the file `go` is there."""
    study_module.HEARTBEAT = 1

    def run(trial):
        (folder / f"{name}-{trial.number}").write_text(str(x(trial)))
        while not (folder / "go").exists():
            time.sleep(0.05)
        return trial.params["x"]

    work(open_search(where, BASE), where, 8, run, silent)


def states(study):
    return [trial.state.name for trial in study.trials]


def test_the_first_trial_is_the_reports_recipe_and_all_shapes_cost_as_much():
    base = recipe("report")
    assert suggest(own_trial(base), base) == base
    assert own_trial(BASE).params["warmup_epochs"] == 1
    sizes = [count_parameters(*shape) / PARAMETER_BUDGET for shape in SHAPES.values()]
    assert min(sizes) > 0.9 and max(sizes) <= 1


@pytest.fixture
def small(monkeypatch):
    trial = FixedTrial({**own_trial(BASE).params, "batch_size": 64})
    monkeypatch.setitem(SHAPES, "3,4,3 of 66,132,264", ((1,), (16,)))
    return trial


def test_a_trial_scores_the_validation_split_and_reports_every_epoch(stand_in, small):
    seen = []
    small.report = lambda value, step: seen.append((step, value))
    score = objective(stand_in[0], BASE, "cpu")(small)
    assert [step for step, _ in seen] == [0, 1]
    assert seen[-1][1] == score and 0 <= score <= 1


def test_a_trial_that_diverges_is_pruned(stand_in, small):
    small.suggest_float = lambda name, *_, **__: 1e30 if name == "learning_rate" else 0.0
    with pytest.raises(optuna.TrialPruned, match="diverged"):
        objective(stand_in[0], replace(BASE, epochs=6, warmup_epochs=0), "cpu")(small)


def test_a_study_goes_on_where_it_stopped(tmp_path):
    where = str(tmp_path / "Suche ü" / "study.log")
    for trials in (3, 5, 5):
        study = open_search(where, BASE)
        work(study, where, trials, x, silent)
        assert states(study) == trials * ["COMPLETE"]
    assert study.trials[0].system_attrs["fixed_params"] == own_trial(BASE).params


def test_an_interrupted_trial_waits_to_be_run_again_and_a_finished_one_does_not(tmp_path):
    def interrupt(trial):
        x(trial)
        raise KeyboardInterrupt

    where = str(tmp_path / "s")
    study = open_search(where, BASE)
    with pytest.raises(KeyboardInterrupt):
        work(study, where, 3, interrupt)
    with pytest.raises(KeyboardInterrupt):  # in the report of the second run
        work(study, where, 3, x, lambda line: signal.raise_signal(signal.SIGINT))
    work(study, where, 3, x, silent)
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    values = [trial.params["x"] for trial in study.trials]
    assert values[0] == values[1] and len(set(values)) == 3


def test_a_worker_whose_trial_another_one_took_up_goes_on(tmp_path):
    where = str(tmp_path / "s")
    study = open_search(where, BASE)
    lines: list[str] = []

    def suspended(trial):
        if trial.number == 0:  # what others do to the trial of a worker that they take for dead
            study.tell(0, state=TrialState.FAIL)
        return x(trial)

    work(study, where, 2, suspended, lines.append)
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE"]
    assert lines[0] == "another worker took this one for dead, and has its trial"


def test_the_trial_of_a_worker_that_lives_is_left_to_it(tmp_path):
    where = str(tmp_path / "s")
    lines: list[str] = []

    def watched(trial):
        work(open_search(where, BASE), where, 1, x, lines.append)  # another worker joins
        return x(trial)

    study = open_search(where, BASE)
    work(study, where, 1, watched, silent)
    assert states(study) == ["COMPLETE"]
    assert lines == ["1 still running elsewhere: if that worker died, start the same command again"]


def test_workers_draw_differently_and_one_alone_draws_the_same_again(tmp_path):
    def drawn(name, seed):
        where = str(tmp_path / name)
        study = open_search(where, BASE, seed)
        work(study, where, 12, x, silent)  # the first ten are random
        return [trial.params["x"] for trial in study.trials]

    pair = [open_search(str(tmp_path / "pair"), BASE) for _ in range(2)]
    assert len({x(study.ask()) for study in pair}) == 2
    assert drawn("a", 1) == drawn("b", 1) != drawn("c", 2)


def test_a_search_that_died_of_a_full_disk_goes_on(tmp_path):
    journal = tmp_path / "s"
    study = open_search(str(journal), BASE)
    work(study, str(journal), 1, x, silent)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.stat().st_size + 600, hard))
    try:
        with pytest.raises(InputError, match=r"^study: [^\n]*File too large"):
            work(study, str(journal), 9, x, silent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not journal.read_bytes().endswith(b"\n")
    study = open_search(str(journal), BASE)
    work(study, str(journal), 9, x, silent)
    assert states(study).count("COMPLETE") == 9
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_database_that_goes_away_is_one_line(tmp_path):
    where = f"sqlite:///{tmp_path / 'study.db'}"

    def gone(trial):
        raise optuna.exceptions.StorageInternalError("connection lost\nlong story")

    with pytest.raises(InputError, match=r"^study: [^\n]*\(connection lost\): [^\n]*$"):
        work(open_search(where, BASE), where, 1, gone)


@pytest.fixture(scope="module")
def postgres():
    """The URL, but for the database's name, of a server of our own on the loopback address."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    found += [Path(path).parent for path in [shutil.which("initdb")] if path]
    if not found:
        pytest.skip("needs PostgreSQL's server programs (Debian: postgresql)")
    user = {}
    if getpass.getuser() == "root":  # the server refuses to run as root
        user = {"user": "postgres", "group": "postgres", "extra_groups": []}
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        if user:
            shutil.chown(folder, "postgres", "postgres")

        def run(program, *arguments):
            command = [found[0] / program, "-D", f"{folder}/data", *arguments]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, **user)

        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        settings = f"-p {port} -h 127.0.0.1 -k {folder} -F"
        run("initdb", "-A", "trust", "-U", "tester", "--no-sync")
        run("pg_ctl", "-w", "-l", f"{folder}/log", "-o", settings, "start")
        yield f"postgresql+psycopg://tester@127.0.0.1:{port}"
        run("pg_ctl", "-w", "-m", "immediate", "stop")


@pytest.mark.xdist_group("postgres")
@pytest.mark.parametrize("kind", ["journal", "database"])
def test_no_trial_is_lost_or_run_twice_when_a_worker_is_killed(
    tmp_path, kind, request, monkeypatch
):
    where = str(tmp_path / "study.log")
    if kind == "database":
        where = request.getfixturevalue("postgres") + "/template1"
    runs = tmp_path / "runs"
    runs.mkdir()
    deadline = time.monotonic() + 300
    workers = []
    for name in ("victim", "a", "b"):
        process = FORK.Process(target=worker, args=(where, runs, name), daemon=True)
        process.start()
        workers.append(process)
    while len({path.name.split("-")[0] for path in runs.iterdir()}) < 3:
        assert time.monotonic() < deadline and all(process.is_alive() for process in workers)
        time.sleep(0.05)
    workers[0].kill()
    workers[0].join()
    (runs / "go").touch()
    for process in workers[1:]:
        process.join(300)
        assert process.exitcode == 0
    numbers = [path.name.split("-")[1] for path in runs.glob("*-*")]
    assert len(numbers) == len(set(numbers))

    monkeypatch.setattr(study_module, "HEARTBEAT", 1)
    study = open_search(where, BASE)
    while (complete := states(study).count("COMPLETE")) < 8:
        assert time.monotonic() < deadline
        work(study, where, 8, x, silent)
        time.sleep(0.1)
    assert complete == 8
    (lost,) = runs.glob("victim-*")
    finished = [t.params["x"] for t in study.trials if t.state == TrialState.COMPLETE]
    assert finished.count(float(lost.read_text())) == 1


@pytest.mark.xdist_group("postgres")
@pytest.mark.parametrize("kind", ["journal", "sqlite", "postgres"])
def test_workers_that_start_together_make_one_study(tmp_path, kind, request):
    where = str(tmp_path / "study.log")
    if kind == "sqlite":
        where = f"sqlite:///{tmp_path / 'study.db'}"
    if kind == "postgres":
        where = request.getfixturevalue("postgres") + "/postgres"
    barrier = threading.Barrier(6)

    def open_together(_):
        barrier.wait()
        return open_search(where, BASE)

    with ThreadPoolExecutor(6) as pool:
        studies = list(pool.map(open_together, range(6)))
    assert len({study._study_id for study in studies}) == 1
    assert states(studies[0]) == ["WAITING"]


def test_the_recorded_search_is_read_and_left_alone(tmp_path):
    journal = shutil.copy(ROOT / "results/tuning/study.log", tmp_path)
    trials, shares = trials_table(journal)
    assert len(trials) == 28 and (trials.state == "COMPLETE").sum() == 15
    assert trials.accuracy.max() == pytest.approx(0.466) and trials.learning_rate[0] == 0.1
    assert set(shares) < set(trials.columns) and sum(shares.values()) == pytest.approx(1)
    assert [path.name for path in tmp_path.iterdir()] == ["study.log"]
    with pytest.raises(InputError, match="study: expected a journal, found none at"):
        trials_table(tmp_path / "nowhere")


def test_another_search_space_is_refused(tmp_path):
    where = str(tmp_path / "study.log")
    open_search(where, BASE)
    with pytest.raises(InputError, match=r"\(these differ: epochs\): choose another place"):
        open_search(where, replace(BASE, epochs=3))


@pytest.mark.parametrize(
    ("where", "content"),
    [
        ("postgresql+psycopg://me:secret@127.0.0.1:1/none", None),
        ("postgresql+psycopg://me:a@secret@127.0.0.1:1/none", None),
        ("postgresql+psycopg://me:secret/none", None),
        ("postgresql+psycopg://me@127.0.0.1:1/none?password=secret&sslpassword=secret", None),
        ("nosuchdatabase://somewhere/x", None),
        ("://", None),
        ("{tmp}", None),
        ("{tmp}/journal/below", b"a file"),
        ("{tmp}/journal", b"a file"),
        ("{tmp}/journal", b"\x00no journal\n\xff"),
        ("{tmp}/journal", b'{"op_code":0,\xff\n\x00\n'),
        ("{tmp}/journal", b'{"op_code":99,"worker_id":""}\n'),
        ("{tmp}/journal", b'{"op_code":' + 100_000 * b"[" + 100_000 * b"]" + b"}\n"),
    ],
)
def test_a_study_that_cant_be_opened_is_one_line_without_secrets(tmp_path, where, content):
    journal = tmp_path / "journal"
    if content:
        journal.write_bytes(content)
    with pytest.raises(InputError, match=r"^study: expected [^\n]*$") as error:
        open_search(where.format(tmp=tmp_path), BASE)
    assert "secret" not in str(error.value)
    assert not content or journal.read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1.0}, "learning_rate"),
        ({"blocks": "1,1", "channels": "16,32"}, r"\(\(1, 1\), \(16, 32\)\).*3,4,3 of 66,132,264"),
    ],
)
def test_a_recipe_outside_the_search_space_is_refused(changes, message):
    with pytest.raises(InputError, match=f"^tune: [^\n]*{message}"):
        own_trial(recipe("report", **changes))
