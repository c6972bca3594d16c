"""Faults on purpose, many times over: python tests/reliability.py [--kills 40] [--notebooks]
[--write]

Every row is a promise. One that is broken ends the campaign with its traceback; `--write` writes
the table of those that held to results/reliability.md. Needs a POSIX system; disks that fill up
need the right to mount (root).
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "notebooks")]

from fuzz import READERS, fuzz  # noqa: E402
from shifts import generate_test_file  # noqa: E402
from stand_in import generate_stand_in  # noqa: E402

import cifar_lib.checkpoint  # noqa: E402
import cifar_lib.files  # noqa: E402
import cifar_lib.fit  # noqa: E402
import cifar_lib.train  # noqa: E402
from cifar_lib import cli, kaggle  # noqa: E402
from cifar_lib.checkpoint import RunDirectory  # noqa: E402
from cifar_lib.errors import InputError  # noqa: E402
from cifar_lib.hardware import describe  # noqa: E402
from cifar_lib.model import ResNet, save_model  # noqa: E402

DATA = generate_stand_in(70, 30)
SETTINGS = "blocks=1 channels=16 batch_size=16 epochs=4 warmup_epochs=1 learning_rate=0.02"
SETTINGS += " validation_size=10 compile=false"
FINAL = (
    "checkpoint.pt",
    "checkpoint.previous.pt",
    "history.csv",
    "metrics.json",
    "model.safetensors",
)
MOMENTS = {  # a name for the table: where the process kills itself, at the nth call
    "in a step": (cifar_lib.train, "smooth_cross_entropy"),
    "in an evaluation": (cifar_lib.fit, "predict"),
    "with a file half written": (cifar_lib.files, "open"),
    "before a file is flushed": (os, "fsync"),
    "before a file gets its name": (os, "replace"),
}
SOMETIME = "at a random time"
SIGNALS = {"SIGINT at a random time": signal.SIGINT, "SIGTERM at a random time": signal.SIGTERM}


# What the same faults did to the code of commit 58030d4, where that is known.
BEFORE = {
    "pickle": "40 KB took 49 s, 63 MB took 5.4 GB",
    "weights": "a header of 244 bytes took 1.1 GB and 12 s; NaN was taken for weights",
    "picture": "a 22 KB PNG took 2.6 GB; PostScript was run",
    "study": "a journal cut in its last line was lost, 10 of 10",
    "configuration": "a traceback",
    "checkpoint": "a traceback",
    "settings": "`precision=nonsense` was dropped, `name=x` a traceback",
    "outputs": "inputs, links, devices and read-only files were replaced",
    "strangers' folders": "files were written over and deleted",
    "streams": "tracebacks",
}


@dataclasses.dataclass
class Row:
    fault: str
    tried: int
    promised: str
    happened: str
    before: str = ""


# Processes. They are forks of this one, which never computes anything itself: a fork then starts at
# once and sound.


def forked(action: Callable[[], int | None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        code = action() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int, within: float = 120) -> int:
    """The exit code, negative for a signal; a process that doesn't end is killed."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_fork(action: Callable[[], int | None]) -> None:
    assert ended(forked(action)) == 0, "failed, see above"


def kill_at(moment: str, nth: int) -> None:
    """This process dies at the nth call of what the moment stands for."""
    module, name = MOMENTS[moment]
    real = getattr(module, name, open)
    calls = 0

    def deadly(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls < nth:
            return real(*arguments, **options)
        if name == "open" and "x" in arguments[1]:
            return HalfWritten(real(*arguments, **options))
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, deadly)


class HalfWritten:
    def __init__(self, file: io.BufferedWriter):
        self.file = file

    def __enter__(self) -> "HalfWritten":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def fileno(self) -> int:
        return self.file.fileno()

    def write(self, content: bytes) -> None:
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def command(path: Path, precision: str, *more: str) -> list[str]:
    fields = [word for setting in [*SETTINGS.split(), *more] for word in ("--set", setting)]
    return [
        "train",
        "--recipe",
        "report",
        "--run",
        str(path),
        "--device",
        "cpu",
        "--precision",
        precision,
        *fields,
    ]


def train(
    arguments: list[str],
    kill: tuple[str, int] | None = None,
    rank: tuple[int, int, int] | None = None,
) -> int:
    """`python -m cifar_lib train`, in this process; returns its exit code. `rank`: (rank, ranks,
    port)."""
    cli.load_cifar10 = lambda _: DATA
    if rank:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")
        os.environ.update(
            zip(names, map(str, (*rank[:2], rank[0], rank[2], "127.0.0.1")), strict=True)
        )
    if kill:
        kill_at(*kill)
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        try:
            return cli.main(arguments)
        except KeyboardInterrupt:  # before `main` listens: __main__ does the same
            return 130


def trained(path: Path, precision: str, ranks: int) -> None:
    """The run, to its end, undisturbed."""
    arguments, port = command(path, precision), free_port()
    pids = [
        forked(lambda r=r: train(arguments, rank=(r, ranks, port) if ranks > 1 else None))
        for r in range(ranks)
    ]
    assert [ended(pid) for pid in pids] == [0] * ranks


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# Training that is killed


def killed_runs(folder: Path, precision: str, ranks: int, kills: int, dice: random.Random) -> Row:
    """Runs that are killed again and again until they end, as often as it takes for `kills`
    kills."""
    start = time.monotonic()
    trained(folder / "whole", precision, ranks)
    duration = time.monotonic() - start
    expected = {name: (folder / "whole" / name).read_bytes() for name in FINAL}
    moments = [*MOMENTS, SOMETIME, *(SIGNALS if ranks == 1 else ())]
    seen: Counter[str] = Counter()
    runs = 0
    while seen.total() < kills:
        path = folder / f"run{runs}"
        runs += 1
        for attempt in range(100):
            moment = dice.choice(moments) if attempt < 8 else None  # then it may finish
            if killed(path, precision, ranks, moment, duration, dice):
                seen[moment] += 1
            elif (path / "metrics.json").exists():
                break
        found = {name: (path / name).read_bytes() for name in FINAL}
        assert found == expected, f"{path} differs from {folder / 'whole'}"
        stray = [file.name for file in path.iterdir() if file.name.endswith(".tmp")]
        assert not stray, stray
    where = ", ".join(f"{moment} {n}" for moment, n in sorted(seen.items()))
    return Row(
        f"training killed, {precision}, {ranks} process{'es' if ranks > 1 else ''}: {where}",
        seen.total(),
        "the same command goes on; weights, optimizer and history end as the same bytes",
        f"{runs} runs, each ended with the bytes of the uninterrupted one",
    )


def killed(
    path: Path, precision: str, ranks: int, moment: str | None, duration: float, dice: random.Random
) -> bool:
    """One start, with a kill at the moment; whether it came to that before the run was over."""
    arguments, port, victim = command(path, precision), free_port(), dice.randrange(ranks)
    kill = (moment, dice.randint(1, 12)) if moment in MOMENTS else None
    pids = [
        forked(
            lambda r=r: train(
                arguments, kill if r == victim else None, (r, ranks, port) if ranks > 1 else None
            )
        )
        for r in range(ranks)
    ]
    if moment and not kill:
        time.sleep(dice.uniform(0, duration))
        os.kill(pids[victim], SIGNALS.get(moment, signal.SIGKILL))
    code = ended(pids[victim])
    # torchrun ends the others when one has died
    others = [ended(pid, within=120 if code == 0 else 1) for pid in pids if pid != pids[victim]]
    assert code in (0, -signal.SIGKILL, 130), f"exit code {code} {moment}"
    assert not any(others) if code == 0 else set(others) <= {0, 2, -signal.SIGKILL}, others
    return code != 0


# Checkpoints


def stopped_run(path: Path) -> None:
    """A run that died after its second epoch, two checkpoints behind it."""

    def action():
        real = RunDirectory.write_rows

        def write_rows(run, name, rows, **how):
            real(run, name, rows, **how)
            if name == "history.csv" and len(rows) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        RunDirectory.write_rows = write_rows
        train(command(path, "fp32"))

    assert ended(forked(action)) == -signal.SIGKILL


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "truncated": lambda content, dice: content[: dice.randrange(1, len(content))],
    "a bit flipped": lambda content, dice: flipped(content, dice.randrange(len(content) * 8)),
    "empty": lambda content, dice: b"",
    "missing": lambda content, dice: None,
    "from a future version": lambda content, dice: future(content),
}


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def future(content: bytes) -> bytes:
    state = torch.load(io.BytesIO(content[: -cifar_lib.checkpoint.DIGEST_SIZE]), weights_only=True)
    buffer = io.BytesIO()
    torch.save({**state, "format": state["format"] + 1}, buffer)
    return buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()


def damage(path: Path, how: str, dice: random.Random) -> None:
    content = DAMAGES[how](path.read_bytes(), dice)
    path.unlink() if content is None else path.write_bytes(content)


def damaged_checkpoints(folder: Path, times: int, dice: random.Random) -> Iterator[Row]:
    stopped_run(folder / "stopped")
    trained(folder / "whole", "fp32", 1)
    for how in DAMAGES:
        finished = 0
        for i in range(times):
            run = RunDirectory(shutil.copytree(folder / "stopped", folder / f"{how}{i}"))
            damage(run.path / "checkpoint.pt", how, dice)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert run.load()["epoch"] == 1
            if how != "missing":
                assert "going on from checkpoint.previous.pt" in str(caught[0].message)
            if i < 2:
                trained(run.path, "fp32", 1)
                assert all(
                    (run.path / f).read_bytes() == (folder / "whole" / f).read_bytes()
                    for f in FINAL
                )
                finished += 1
        yield Row(
            f"newest checkpoint {how}",
            times,
            "the one before is used; where it was damaged, a warning says so",
            f"it was; {finished} went on to the end, with the bytes of the undamaged run",
        )
    for i in range(times):
        run = RunDirectory(shutil.copytree(folder / "stopped", folder / f"both{i}"))
        for name in ("checkpoint.pt", "checkpoint.previous.pt"):
            damage(run.path / name, dice.choice([how for how in DAMAGES if how != "missing"]), dice)
        before = contents(run.path)
        refused(run.load, "no usable checkpoint")
        assert contents(run.path) == before
    yield Row(
        "both checkpoints damaged",
        times,
        "refused, nothing overwritten",
        "refused in one line, same files",
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name != ".lock"
    }


def refused(action: Callable[[], object], message: str) -> None:
    try:
        action()
    except InputError as error:
        assert message in str(error) and "\n" not in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


# Disks


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    folder.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
        check=True,
        capture_output=True,
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def full_disks(folder: Path, times: int, dice: random.Random) -> Iterator[Row]:
    try:
        with small_disk(folder / "trial", 1 << 20):
            pass
    except (OSError, subprocess.CalledProcessError):
        yield Row(
            "disk full, disk read-only",
            0,
            "the last checkpoint stays whole",
            "not tried: no right to mount",
        )
        return
    trained(folder / "whole", "fp32", 1)
    need = sum(path.stat().st_size for path in (folder / "whole").iterdir())
    kept = 0
    for i in range(times):
        with small_disk(folder / f"disk{i}", dice.randrange(4096 * 4, need)) as disk:
            pid = forked(lambda disk=disk: train(command(disk / "run", "fp32")))
            assert ended(pid) == 2  # what an InputError gives
            run = RunDirectory(disk / "run")
            if (run.path / "checkpoint.pt").exists():
                assert run.load()["epoch"] >= 1
                kept += 1
            assert not [path for path in disk.rglob("*.tmp")]
            # more room, and the same command
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            trained(run.path, "fp32", 1)
            assert all(
                (run.path / name).read_bytes() == (folder / "whole" / name).read_bytes()
                for name in FINAL
            )
    yield Row(
        "disk full (a small tmpfs), at a random byte of the run",
        times,
        "exit code 2 with one line, the last checkpoint whole, no temporary file; with room, it "
        "goes on",
        f"so it was; {kept} times there was a checkpoint already; all ended with the bytes of the "
        "undisturbed run",
    )
    with small_disk(folder / "read-only", 1 << 26) as disk:
        stopped_run(disk / "run")
        before = contents(disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert ended(forked(lambda: train(command(disk / "run", "fp32")))) == 2
        assert ended(forked(lambda: train(command(disk / "new", "fp32")))) == 2
        assert contents(disk / "run") == before
    yield Row(
        "disk read-only: a run to go on with, a new one",
        2,
        "exit code 2, nothing changed",
        "so it was",
    )


# Locks, losses, submissions, pickles


def locks(folder: Path, times: int) -> Row:
    for i in range(times):
        path = folder / f"held{i}"
        ready, started = os.pipe()

        def hold(path=path, started=started):
            with RunDirectory(path):
                os.write(started, b".")
                time.sleep(60)

        pid = forked(hold)
        os.read(ready, 1)
        refused(RunDirectory(path).__enter__, "another process trains in")
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        with RunDirectory(path):
            pass
    return Row(
        "two processes in one directory, then the first one killed",
        times,
        "the second is refused; the dead one's lock doesn't block",
        "so it was",
    )


def losses_that_are_not_finite(folder: Path, times: int, dice: random.Random) -> Row:
    for i in range(times):
        path, epoch, step = folder / f"nan{i}", dice.randrange(4), dice.randrange(4)
        value = dice.choice([float("nan"), float("inf"), float("-inf")])

        def poisoned(path=path, epoch=epoch, step=step, value=value):
            real, calls = cifar_lib.train.smooth_cross_entropy, []

            def loss(*arguments):
                calls.append(0)
                return real(*arguments) * (value if len(calls) == epoch * 4 + step + 1 else 1)

            cifar_lib.train.smooth_cross_entropy = loss
            config = cifar_lib.recipes.recipe(
                "report", **dict(s.split("=") for s in SETTINGS.split()), precision="fp32"
            )
            expected = f"not finite at epoch {epoch}, step {step}"
            with (
                open(os.devnull, "w", encoding="utf-8") as nowhere,
                contextlib.redirect_stderr(nowhere),
            ):
                refused(
                    lambda: cifar_lib.fit.fit(
                        config, path, *DATA, device="cpu", log=lambda _: None
                    ),
                    expected,
                )

        in_fork(poisoned)
        saved = RunDirectory(path).load()
        assert (saved or {"epoch": 0})["epoch"] == epoch
        assert all(t.isfinite().all() for t in (saved["model"].values() if saved else []))
    return Row(
        "loss NaN or infinite at a random step",
        times,
        "training stops, names epoch and step, keeps the last checkpoint",
        "so it was",
    )


def submissions(folder: Path, times: int, dice: random.Random) -> Row:
    new = {"ids": list(range(3000)), "labels": [i % 10 for i in range(3000)]}
    path = folder / "submission.csv"
    kaggle.write_submission(folder / "expected.csv", **new)
    expected, old = (folder / "expected.csv").read_bytes(), b"an older submission"
    outcomes: Counter[str] = Counter()
    moments = [
        "with a file half written",
        "before a file is flushed",
        "before a file gets its name",
    ]
    for _ in range(times):
        path.write_bytes(old)
        moment, nth = dice.choice(moments), dice.randint(1, 2)

        def write(moment=moment, nth=nth):
            kill_at(moment, nth)
            kaggle.write_submission(path, **new)

        ended(forked(write))
        outcomes["old" if path.read_bytes() == old else "new"] += 1
        assert path.read_bytes() in (old, expected)
    return Row(
        "submission killed while it is written over an older one",
        times,
        "the old file or the whole new one, never a part",
        f"the old one {outcomes['old']} times, the new one {outcomes['new']} times",
    )


def random_files(reader: str, seconds: float) -> Row:
    was_read, refused_, slowest = fuzz(reader, seconds)
    return Row(
        f"random files: {reader}",
        was_read + refused_,
        "each read or refused in one line within 10 s and 1 GB, nothing else",
        f"{was_read:,} read, {refused_:,} refused, the slowest took {slowest:.2f} s",
        BEFORE.get(reader, ""),
    )


def pickles(folder: Path) -> Row:
    from test_pickles import CORPUS

    os.chdir(folder)
    for name, content in CORPUS.items():
        Path("test.pkl").write_bytes(content)
        refused(lambda: kaggle.read_test_file("test.pkl"), "test file: test.pkl")
        assert os.listdir() == ["test.pkl"], name
    os.chdir(ROOT)
    promised = "refused in one line, nothing runs"
    return Row("hostile and broken pickles", len(CORPUS), promised, "so it was")


# Outputs, strangers' folders, streams


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Kind and content of all that lies in a folder."""
    found = {}
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = os.lstat(path).st_mode, content
    return found


def refused_command(words: list[str]) -> None:
    def run() -> int:
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stderr(nowhere),
        ):
            return cli.main(words)

    code = ended(forked(run))
    assert code == 2, f"exit code {code}: {words}"


def outputs(folder: Path) -> Row:
    os.chdir(folder)
    info = {"mean": [0.5] * 3, "std": [0.25] * 3}
    save_model(Path("model.safetensors"), ResNet((1,), (16,)), info)
    generate_test_file("test.pkl", DATA[1])
    Image.fromarray(DATA[1].images[0].permute(1, 2, 0).numpy()).save("cat.png")
    os.link("cat.png", "cat.grad-cam.png")  # the picture itself, where its plot would go
    Path("other.csv").write_text("somebody's", encoding="utf-8")
    Path("read-only.csv").write_text("somebody's", encoding="utf-8")
    os.chmod("read-only.csv", 0o444)
    os.symlink("other.csv", "link.csv")
    os.mkfifo("fifo.csv")
    os.mkdir("folder.csv")
    targets = ["test.pkl", "model.safetensors", "link.csv", "fifo.csv", "folder.csv"]
    targets += ["read-only.csv", "/dev/null"]
    commands = [["submit", "--test", "test.pkl", "--out", target] for target in targets]
    commands += [["predict", "cat.png", "--grad-cam", "."]]
    before = everything(folder)
    null = os.lstat("/dev/null").st_mode
    for words in commands:
        refused_command([*words, "--weights", "model.safetensors", "--device", "cpu"])
        assert everything(folder) == before, words
    assert os.lstat("/dev/null").st_mode == null
    os.chdir(ROOT)
    return Row(
        "outputs that name an input, a link, a device, a FIFO, a folder, a read-only file",
        len(commands),
        "exit code 2, nothing changed",
        "so it was",
        BEFORE["outputs"],
    )


def strangers_folders(folder: Path) -> Row:
    """`train --run` on a folder that is no run's."""
    theirs = {
        "weights": {"model.safetensors": b"theirs"},
        "a history": {"history.csv": b"theirs"},
        "notes": {"notes.txt": b"theirs", ".notes.tmp": b"theirs"},
        "another configuration": {"config.json": b'{"name": "theirs"}'},
        "no object": {"config.json": b"[]"},
    }
    for name, files in theirs.items():
        place = folder / name
        place.mkdir()
        for file, content in files.items():
            (place / file).write_bytes(content)
    linked = folder / "a lock that is a link"
    linked.mkdir()
    (folder / "target").write_bytes(b"theirs")
    os.symlink(folder / "target", linked / ".lock")
    before = everything(folder)
    for name in [*theirs, linked.name]:
        pid = forked(lambda name=name: train(command(folder / name, "fp32")))
        assert ended(pid) == 2, name
        after = everything(folder)
        after.pop(str(folder / name / ".lock"), None)
        kept = {path: entry for path, entry in before.items() if path in after}
        assert after == kept and len(before) - len(kept) <= 1, name
    return Row(
        "a folder of somebody else's as run directory",
        len(theirs) + 1,
        "exit code 2, nothing changed",
        "so it was",
        BEFORE["strangers' folders"],
    )


STREAMS = {  # a shell's line, and the exit codes it may end with
    "info > /dev/full": {2},
    "info | head -c 1 > /dev/null; exit ${PIPESTATUS[0]}": {0, 141},
    "info >&-": {0, 2},
    r"predict $'caf\xe9.png' 2>&1 | cat; exit ${PIPESTATUS[0]}": {2},
    r"predict $'two\nlines.png'": {2},
    r"evaluate --weights $'\x1b[31m.safetensors'": {2},
}


def streams(folder: Path) -> Row:
    for line, codes in STREAMS.items():
        done = subprocess.run(
            ["bash", "-c", f"{sys.executable} -m cifar_lib {line}"], cwd=ROOT, capture_output=True
        )
        assert done.returncode in codes, (line, done)
        said = done.stderr.decode().removesuffix("\n")
        assert not said or said.isprintable(), (line, said)
    return Row(
        "output to a full disk, a closed pipe, a closed stream; names of any bytes",
        len(STREAMS),
        "no traceback; at most one line of printable text, exit code 2 (141 for a closed pipe)",
        "so it was",
        BEFORE["streams"],
    )


def tests(fault: str, promised: str, *selection: str) -> Row:
    """What the test suite tries, counted."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout
    passed = int(done.stdout.rsplit(" passed", 1)[0].split()[-1])
    return Row(fault, passed, promised, f"so it was (`pytest {' '.join(selection)}`)")


def notebooks(folder: Path) -> Row:
    """Each notebook alone, every code cell twice, in a copy whose path has spaces and letters that
    are no ASCII."""
    import nbformat
    from nbclient import NotebookClient

    copy = folder / "ein Ordner für Übungen 演習"
    ignored = shutil.ignore_patterns(".git", ".venv", "data", "html", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    os.environ |= {"JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter"), "TQDM_DISABLE": "1"}
    names = sorted(path.name for path in (copy / "notebooks").glob("0*.ipynb"))
    for name in names:
        notebook = nbformat.read(copy / "notebooks" / name, as_version=4)
        notebook.cells = [
            cell for cell in notebook.cells for _ in range(1 + (cell.cell_type == "code"))
        ]
        for cell in notebook.cells:
            cell.pop("id", None)
        NotebookClient(
            notebook, timeout=None, resources={"metadata": {"path": str(copy)}}
        ).execute()
        print(f"  {name}", flush=True)
    return Row(
        "notebooks from another folder, path with spaces and 演習, every code cell twice",
        len(names),
        "they run to the end",
        "so it was",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kills", type=int, default=40, help="for one process and each precision; a third for two"
    )
    parser.add_argument(
        "--notebooks", action="store_true", help="also run the notebooks, which takes minutes"
    )
    parser.add_argument("--write", action="store_true", help="write results/reliability.md")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="campaigns whose name contains one of these"
    )
    options = parser.parse_args()
    # A background job of a shell ignores SIGINT, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    dice, times = random.Random(options.seed), max(options.kills // 2, 1)
    few = max(options.kills // 3, 1)
    campaigns: dict[str, Callable[[Path], object]] = {
        **{
            f"kills {precision} {ranks}": lambda f, p=precision, r=ranks: killed_runs(
                f, p, r, options.kills if r == 1 else few, dice
            )
            for precision in ("fp32", "bf16")
            for ranks in (1, 2)
        },
        "checkpoints": lambda f: damaged_checkpoints(f, times, dice),
        "disks": lambda f: full_disks(f, few, dice),
        "locks": lambda f: locks(f, times),
        "losses": lambda f: losses_that_are_not_finite(f, few, dice),
        "submissions": lambda f: submissions(f, options.kills, dice),
        "hostile pickles": pickles,
        **{
            f"random {reader}": lambda f, reader=reader: random_files(reader, options.kills)
            for reader in READERS
        },
        "outputs": outputs,
        "strangers": strangers_folders,
        "streams": streams,
        "data": lambda f: tests(
            "data: files missing, truncated, swapped, changed",
            "one clear line",
            "tests/test_data.py",
            "-k",
            "named or refused",
        ),
        "downloads": lambda f: tests(
            "downloads: refused, throttled, stalled, broken off, wrong bytes, two at once",
            "the next source, going on with what came; nothing half-downloaded is ever used",
            "tests/test_download.py",
        ),
        "command line": lambda f: tests(
            "command line: flags with wrong values, missing files, signals",
            "exit code 2 (130) and one line",
            "tests/test_cli.py",
            "-k",
            "mistake or missing or interrupted or cuda",
        ),
    }
    if options.notebooks:
        campaigns["notebooks"] = notebooks
    rows: list[Row] = []
    start = time.monotonic()
    for name, campaign in campaigns.items():
        if not any(part in name for part in options.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            made = campaign(Path(folder))
            for row in [made] if isinstance(made, Row) else made:
                rows.append(row)
                print(f"{row.fault} | {row.tried} | {row.happened}", flush=True)
    minutes = (time.monotonic() - start) / 60
    if options.write:
        write(rows, minutes, options)
    return 0


def write(rows: list[Row], minutes: float, options: argparse.Namespace) -> None:
    where = describe(torch.device("cpu"))
    machine = f"{where['cpu_cores']} cores, {torch.backends.cpu.get_cpu_capability()}"
    flags = (
        f" --kills {options.kills}" + " --notebooks" * options.notebooks + f" --seed {options.seed}"
    )
    text = f"""# Reliability

Faults on purpose, and what became of them. Made by `python tests/reliability.py{flags} --write`
in {minutes:.0f} minutes ({machine}, Python {where["python"]}, torch {where["torch"]}) at commit
{where["commit"]}; a broken promise stops it, so every row held.

The runs are of a network of one block on generated images: 4 epochs of 4 steps, validation
and test set evaluated each epoch. Bytes are compared: checkpoints, history,
metrics, weights.

| fault | times tried | promised | at 58030d4 | what happened |
| --- | --- | --- | --- | --- |
"""
    text += "".join(
        f"| {row.fault} | {row.tried:,} | {row.promised} | {row.before} | {row.happened} |\n"
        for row in rows
    )
    path = ROOT / "results" / "reliability.md"
    # What scripts/wrong_results.py wrote below these rows stays.
    _, heading, others = path.read_text(encoding="utf-8").partition("\n## ")
    path.write_text(text + heading + others, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
