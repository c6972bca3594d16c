"""Faults on purpose, many times over: python -m scripts.faults [--write] [NAME ...]

Every fault comes with a promise. A broken promise ends the campaign with a traceback; `--write`
writes what happened into results/reliability.md. This needs Linux, and root for disks that fill up.
"""

import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from cifar_lib import cli
from cifar_lib.checkpoint import DIGEST_SIZE
from cifar_lib.hardware import describe
from notebooks.course.stand_in import generate_stand_in
from scripts.fuzz import READERS, fuzz

ROOT = Path(__file__).resolve().parent.parent
# A network of one block and 70 generated images, 10 of them held out: 4 epochs of 4 steps.
TRAIN = "train --recipe report --epochs 4 --set blocks=1 --set channels=16 --set batch_size=16"
TRAIN += " --set warmup_epochs=1 --set learning_rate=0.02 --set validation_size=10"
TRAIN += " --set compile=false --device cpu"
STEPS = 16
ENDS_WITH = "checkpoint.pt checkpoint.previous.pt history.csv metrics.json model.safetensors"
KILLED = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGXFSZ, 130)  # exit codes


def nothing() -> None:
    """Set no trap."""


class Training:
    """`python -m cifar_lib train`, in a fork of this process, which has imported torch already.

    `trap` is called first: it may disturb or end the training later on.
    """

    def __init__(self, run: Path, precision: str = "fp32", trap: Callable[[], None] = nothing):
        self.words = [*TRAIN.split(), "--precision", precision, "--run", str(run)]
        self.trap, self.seed = trap, random.random()
        self.output = os.memfd_create("output")
        self.process = multiprocessing.get_context("fork").Process(target=self._train)
        self.process.start()

    def _train(self) -> None:
        for stream in (1, 2):
            os.dup2(self.output, stream)
        random.seed(self.seed)
        with contextlib.suppress(KeyboardInterrupt):  # before the command listens to it
            self.trap()
            sys.exit(cli.main(self.words))
        sys.exit(130)

    def end(self) -> tuple[int, str]:
        """Wait for its end. Return its exit code, negative for a signal, and what it printed."""
        self.process.join(120)
        self.process.kill()
        self.process.join()
        said = os.pread(self.output, 1 << 20, 0).decode()
        os.close(self.output)
        return self.process.exitcode, said


@functools.cache
def undisturbed(precision: str) -> dict[str, bytes]:
    """Return the files that an undisturbed run ends with: {name: content}."""
    with tempfile.TemporaryDirectory() as folder:
        code, said = Training(Path(folder), precision).end()
        assert code == 0, said
        return {name: (Path(folder) / name).read_bytes() for name in ENDS_WITH.split()}


def check_that_it_resumes(
    run: Path, precision: str = "fp32", trap: Callable[[], None] = nothing
) -> str:
    """Check that the same command ends the run as if undisturbed. Return what it printed."""
    code, said = Training(run, precision, trap).end()
    assert code == 0, said
    expected = undisturbed(precision)
    assert {name: (run / name).read_bytes() for name in expected} == expected, f"{run} differs"
    assert not list(run.glob("*.tmp")), os.listdir(run)
    return said


def check_refused(training: Training, message: str = "error: ") -> None:
    """Check that a training ends with exit code 2, and one line that says why."""
    code, said = training.end()
    last = said.splitlines()[-1]
    assert code == 2 and "Traceback" not in said, said
    assert last.startswith("error: ") and message in last and last.isprintable(), last


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): path.read_bytes() for path in files}


# Traps, set in the process that trains. They replace functions of torch or the system, not of the
# package, so that they stay right when the package changes.


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    raise KeyboardInterrupt


def at_call(owner: object, name: str, nth: int, action: Callable[[], object] = die) -> None:
    """Call `action` before the nth call of the function `name` of `owner`."""
    real, calls = getattr(owner, name), itertools.count(1)

    def disturbed(*arguments: object, **options: object) -> object:
        if next(calls) == nth:
            action()
        return real(*arguments, **options)

    setattr(owner, name, disturbed)


def at_step(nth: int, action: Callable[[], object] = die) -> None:
    at_call(torch.optim.SGD, "step", nth, action)


def limit_files() -> None:
    """Let the system kill this process in the middle of writing a long file, from now on."""
    size = random.randrange(1, len(undisturbed("fp32")["checkpoint.pt"]))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def signal_later(number: int) -> None:
    """Send this process a signal at any time after a random step, not only at a call."""

    def start_timer() -> None:
        timer = threading.Timer(random.uniform(0, 0.2), os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

    at_step(random.randint(1, STEPS), start_timer)


def take_locks_away() -> None:
    """Let locks fail as on a mounted Drive."""
    number = random.choice([errno.ENOSYS, errno.ENOTSUP])

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    fcntl.flock = flock


MOMENTS: dict[str, Callable[[], None]] = {  # the traps of a training that is killed
    "in a step": lambda: at_step(random.randint(1, STEPS)),
    "in an evaluation": lambda: at_call(torch.nn.Module, "eval", random.randint(1, 8)),
    "with a file half written": lambda: at_step(random.randint(1, STEPS), limit_files),
    "before a file is flushed": lambda: at_call(os, "fsync", random.randint(1, 16)),
    "before a file gets its name": lambda: at_call(os, "replace", random.randint(1, 20)),
    "at a random time": lambda: signal_later(signal.SIGKILL),
    "by SIGINT at a random time": lambda: signal_later(signal.SIGINT),
    "by SIGTERM at a random time": lambda: signal_later(signal.SIGTERM),
}


# Faults. Each function causes one fault in an empty folder, and returns what happened, or counts of
# it. Its docstring is the promise, and it raises AssertionError if the promise is broken.


def killed(folder: Path, moment: str) -> Counter[str]:
    """The same command resumes the run, however often; every file ends with the same bytes."""
    precision, kills = random.choice(["fp32", "bf16"]), 0
    undisturbed("fp32")  # known before the fork: a trap asks for it
    for _ in range(random.randint(1, 3)):
        code, said = Training(folder, precision, MOMENTS[moment]).end()
        assert code in (0, *KILLED), (code, said)
        kills += code != 0
    check_that_it_resumes(folder, precision)
    return Counter({f"{precision}, the same bytes": kills})


def interrupt_run(folder: Path) -> None:
    """Begin a run, and interrupt it in its last epoch, when it has two checkpoints."""
    code, said = Training(folder, trap=lambda: at_step(STEPS - 2, interrupt)).end()
    assert code == 130, said


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: random.randrange(len(content))])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def change_format(path: Path) -> None:
    """Change a checkpoint's format as a future version may, with the right digest."""
    state = torch.load(io.BytesIO(path.read_bytes()[:-DIGEST_SIZE]), weights_only=True)
    file = io.BytesIO()
    torch.save({**state, "format": state["format"] + 1}, file)
    path.write_bytes(file.getvalue() + hashlib.sha256(file.getvalue()).digest())


DAMAGES = (truncate, flip_a_bit, change_format)


def newest_damaged(folder: Path, damage: Callable[[Path], None]) -> str:
    """The one before is used, with a warning if there is a damaged one; the same bytes."""
    interrupt_run(folder)
    damage(folder / "checkpoint.pt")
    said = check_that_it_resumes(folder)
    assert damage is Path.unlink or "resuming from checkpoint.previous.pt" in said, said
    return "the same bytes"


def both_damaged(folder: Path) -> str:
    """Exit code 2 and one line; nothing is changed."""
    interrupt_run(folder)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        random.choice(DAMAGES)(folder / name)
    before = contents(folder)
    check_refused(Training(folder), "no usable checkpoint")
    assert contents(folder) == before
    return "refused"


def mount(disk: Path, options: str) -> None:
    """Mount a small disk at this path, or change the one that is mounted there."""
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    subprocess.run(words, check=True, capture_output=True)


class NotHere(Exception):
    """A fault can't be caused on this machine."""


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    disk = folder / "disk"
    disk.mkdir()
    try:
        mount(disk, f"size={size}")
    except (OSError, subprocess.CalledProcessError):
        raise NotHere("no right to mount a disk") from None
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def disk_full(folder: Path) -> str:
    """Exit code 2, one line, no scratch file; with more room the run ends with the same bytes."""
    size = random.randrange(1 << 14, sum(map(len, undisturbed("fp32").values())))
    with small_disk(folder, size) as disk:
        check_refused(Training(disk / "run"), "can't ")
        assert not list(disk.rglob("*.tmp"))
        when = "after" if (disk / "run" / "checkpoint.pt").exists() else "before"
        mount(disk, "remount,size=64m")
        check_that_it_resumes(disk / "run")
    return f"{when} the first checkpoint, the same bytes"


def disk_read_only(folder: Path) -> str:
    """Exit code 2 and one line, for a run to resume and for a new one; nothing is changed."""
    with small_disk(folder, 1 << 26) as disk:
        interrupt_run(disk / "run")
        before = contents(disk)
        mount(disk, "remount,ro")
        check_refused(Training(disk / "run"), "can't ")
        check_refused(Training(disk / "new"), "can't ")
        assert contents(disk) == before
    return "refused"


def without_locks(folder: Path) -> str:
    """A warning; a run that is killed resumes there and ends with the same bytes."""
    Training(folder, trap=lambda: (take_locks_away(), at_step(random.randint(1, STEPS)))).end()
    said = check_that_it_resumes(folder, trap=take_locks_away)
    assert "can't be locked" in said, said
    return "the same bytes"


def two_at_once(folder: Path) -> str:
    """The second one is refused in one line; once the first is dead, the run resumes."""
    run, in_a_step = folder / "run", folder / "in a step"

    def hold() -> None:
        in_a_step.touch()
        time.sleep(100)

    first = Training(run, trap=lambda: at_step(random.randint(1, STEPS), hold))
    while not in_a_step.exists():
        time.sleep(0.01)
    check_refused(Training(run), "another process is training in")
    first.process.kill()
    first.end()
    check_that_it_resumes(run)
    return "refused, then the same bytes"


def random_files(folder: Path, reader: str) -> Counter[str]:
    """Each is read, or refused in one line, within 10 s and 1 GB."""
    return fuzz(reader, seconds=40, seed=random.randrange(2**32))


# Lines of a shell, and the exit codes that they may end with; tests/test_cli.py has wrong flags.
COMMANDS = {
    "info > /dev/full": {2},
    "info | head -c 1 > /dev/null; exit ${PIPESTATUS[0]}": {0, 141},  # 141: a closed pipe
    "info >&-": {0, 2},
    r"evaluate --weights $'\x1b[31m.safetensors'": {2},
    r"predict $'two\nlines.png'": {2},
    r"predict $'caf\xe9.png' 2>&1 | cat; exit ${PIPESTATUS[0]}": {2},
}


def wrong_commands(folder: Path) -> Counter[str]:
    """No traceback; at most one line of printable text."""
    happened: Counter[str] = Counter()
    for line, codes in COMMANDS.items():
        words = ["bash", "-c", f"{sys.executable} -m cifar_lib {line}"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, encoding="utf-8")
        said = done.stderr.removesuffix("\n")
        assert done.returncode in codes and (not said or said.isprintable()), (line, done)
        happened[f"exit code {done.returncode}"] += 1
    return happened


def tests(folder: Path, name: str) -> Counter[str]:
    """One line that says what is wrong, or a way around it; nothing is lost, nothing is run."""
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{name}"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout
    passed = int(done.stdout.partition(" passed")[0].split()[-1])
    return Counter({f"tests passed in tests/{name}": passed})


FAULTS: list[tuple] = [  # name, times, function, and its arguments after the folder
    *((f"training killed {moment}", 10, killed, moment) for moment in MOMENTS),
    ("newest checkpoint truncated", 10, newest_damaged, truncate),
    ("newest checkpoint with a bit flipped", 10, newest_damaged, flip_a_bit),
    ("newest checkpoint of a future version", 2, newest_damaged, change_format),
    ("newest checkpoint missing", 2, newest_damaged, Path.unlink),
    ("both checkpoints damaged", 10, both_damaged),
    ("disk full, at a random byte of the run", 10, disk_full),
    ("disk read-only", 2, disk_read_only),
    ("file system without locks", 10, without_locks),
    ("two processes in one directory, then the first one killed", 10, two_at_once),
    *((f"random files: {reader}", 1, random_files, reader) for reader in READERS),
    ("wrong commands, broken streams", 1, wrong_commands),
    ("hostile pickles", 1, tests, "test_pickles.py"),
    ("CIFAR-10's files and pictures: missing, damaged, huge", 1, tests, "test_data.py"),
    ("downloads: throttled, stalled, broken off, wrong bytes", 1, tests, "test_download.py"),
    ("folders of others; outputs that are inputs, links, devices", 1, tests, "test_checkpoint.py"),
    ("wrong flags, missing files, signals", 1, tests, "test_cli.py"),
    ("wrong variables", 1, tests, "test_environment.py"),
]


# The campaign


def repeat(times: int, fault: Callable, *arguments: object) -> Counter[str]:
    """Cause a fault `times` times, each in a new folder, and count what happened."""
    happened: Counter[str] = Counter()
    for _ in range(times):
        with tempfile.TemporaryDirectory() as folder:
            what = fault(Path(folder), *arguments)
            happened.update([what] if isinstance(what, str) else what)
    return +happened


def report(rows: list[str], flags: str) -> str:
    where = describe(torch.device("cpu"))
    return f"""# Reliability

Faults on purpose, and what became of them. Made by `python -m scripts.faults {flags}` on
{where["cpu_cores"]} cores ({torch.backends.cpu.get_cpu_capability()}) with Python {where["python"]}
and torch {where["torch"]}, at commit
{where["commit"]}. A broken promise stops it, so every row held.

The runs are of a network of one block on generated images: 4 epochs of 4 steps, validation and test
set evaluated in each. Bytes are compared: checkpoints, history, metrics, weights.

| fault | times | promised | what happened |
| --- | --- | --- | --- |
""" + "".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts of faults' names")
    parser.add_argument("--at-most", type=int, default=1000, help="times that a fault is done")
    parser.add_argument("--write", action="store_true", help="write results/reliability.md")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # A background job of a shell ignores SIGINT, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)  # a fork of several threads isn't sound
    images = generate_stand_in(70, 30)
    cli.load_cifar10 = lambda *_: images

    rows = []
    for name, times, fault, *arguments in FAULTS:
        if not any(part in name for part in options.names or [""]):
            continue
        random.seed(f"{options.seed} {name}")
        try:
            happened = repeat(min(times, options.at_most), fault, *arguments)
            counts = ", ".join(f"{what}: {n:,}" for what, n in sorted(happened.items()))
        except NotHere as reason:
            happened, counts = Counter(), f"not tried: {reason}"
        rows.append(f"| {name} | {happened.total():,} | {fault.__doc__} | {counts} |\n")
        print(end=rows[-1], flush=True)
    if options.write:
        path = ROOT / "results" / "reliability.md"
        # Keep what other programs and people wrote below.
        _, heading, others = path.read_text(encoding="utf-8").partition("\n## ")
        text = report(rows, " ".join(sys.argv[1:]))
        path.write_text(text + heading + others, encoding="utf-8")


if __name__ == "__main__":
    main()
