"""Random files for every reader of files: python tests/fuzz.py [--seconds 60] [READER ...]

Each file is read, or refused in one line, within 10 s and 1 GB. Anything else ends the campaign
with the reader's name and the seed; `--seed` tries that again. Needs a POSIX system.
"""

import argparse
import hashlib
import io
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "notebooks")]

from session import trials_table  # noqa: E402
from test_pickles import CORPUS, HONEST, mutated  # noqa: E402

from cifar_lib import checkpoint  # noqa: E402
from cifar_lib.data import read_picture  # noqa: E402
from cifar_lib.errors import InputError  # noqa: E402
from cifar_lib.kaggle import read_test_file  # noqa: E402
from cifar_lib.model import ResNet, load_model, save_model  # noqa: E402
from cifar_lib.recipes import RECIPES, recipe  # noqa: E402
from cifar_lib.train import State  # noqa: E402

SECONDS, ROOM = 10, 1 << 30  # for one file
NASTY = (None, True, -1, 0, 1, 10**30, 1e308, -1e-300, float("nan"), "", "x" * 10_000, "0", [], {})
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def nasty(value: Any, dice: random.Random) -> Any:
    """`value` with one part of it replaced, renamed, lost or put into many lists."""
    if isinstance(value, (dict, list)) and value and dice.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = dice.choice(keys)
        changed = value.copy()
        changed[key] = nasty(value[key], dice)
        if dice.random() < 0.1:
            del changed[key]
        return changed
    if dice.random() < 0.1:
        for _ in range(300):
            value = [value]
        return value
    return dice.choice(NASTY)


def deep(text: bytes, dice: random.Random) -> bytes:
    """Now and then JSON that is nested beyond any parser's stack."""
    return text.replace(b"[", b"[" * 200_000, 1) if dice.random() < 0.02 else text


def test_files(dice: random.Random) -> bytes:
    short = [content for content in CORPUS.values() if 0 < len(content) < 10**5]
    return mutated(dice.choice([*HONEST.values(), *short]), dice)


def weights(dice: random.Random) -> bytes:
    """Changed bytes, or an honest file with another header."""
    content = WEIGHTS
    if dice.random() < 0.3:
        return mutated(content, dice)
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:size])
    own = json.loads(header["__metadata__"]["cifar_lib"])
    if dice.random() < 0.5:
        header["__metadata__"]["cifar_lib"] = json.dumps(nasty(own, dice))
    else:
        header = nasty(header, dice)
    text = deep(json.dumps(header).encode(), dice)
    return len(text).to_bytes(8, "little") + text + content[size:]


def pictures(dice: random.Random) -> bytes:
    size = dice.choice([(1, 1), (40, 30), (300, 200)])
    picture = Image.frombytes("RGB", size, dice.randbytes(3 * size[0] * size[1]))
    mode = dice.choice(["RGB", "L"])
    file = io.BytesIO()
    picture.convert(mode).save(file, dice.choice(FORMATS))
    return mutated(file.getvalue(), dice)


def configurations(dice: random.Random) -> bytes:
    content = deep(json.dumps(nasty(CONFIG, dice)).encode(), dice)
    return mutated(content, dice) if dice.random() < 0.3 else content


def checkpoints(dice: random.Random) -> bytes:
    """With the right digest, as only a run of somebody else's would have it."""
    if dice.random() < 0.5:
        payload = mutated(CHECKPOINT, dice)
    else:
        file = io.BytesIO()
        torch.save(nasty(STATE, dice), file)
        payload = file.getvalue()
    return payload + hashlib.sha256(payload).digest()


def studies(dice: random.Random) -> bytes:
    return mutated(STUDY, dice)


def settings(dice: random.Random) -> bytes:
    names = [*CONFIG, *(f"policy.{name}" for name in CONFIG["policy"]), "name", "self", ""]
    value = dice.choice(
        [str(dice.choice(NASTY)), "0x10", "1_0", "1,2", "(3,)", "none", "\x00", "½"]
    )
    return f"{dice.choice(names)}={value}".encode()


def read_setting(path: Path) -> None:
    name, _, value = path.read_text(encoding="utf-8").partition("=")
    recipe("report", **{name: value})


def read_configuration(path: Path) -> None:
    stored = checkpoint.RunDirectory(path.parent).read_json(path.name)
    recipe("report", **stored)


def read_checkpoint(path: Path) -> None:
    path.rename(path.with_name("checkpoint.pt"))
    State(SMALL, torch.device("cpu")).load(checkpoint.RunDirectory(path.parent).load())


READERS: dict[str, tuple[Callable[[random.Random], bytes], Callable[[Path], object]]] = {
    "pickle": (test_files, read_test_file),
    "weights": (weights, load_model),
    "picture": (pictures, read_picture),
    "configuration": (configurations, read_configuration),
    "settings": (settings, read_setting),
    "checkpoint": (checkpoints, read_checkpoint),
    "study": (studies, trials_table),
}


def prepare() -> None:
    """The honest files that are changed."""
    global WEIGHTS, CONFIG, SMALL, STATE, CHECKPOINT, STUDY
    torch.manual_seed(0)
    network = ResNet((1,), (16,))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        info = {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "temperature": 1.1}
        save_model(path, network, info)
        WEIGHTS = path.read_bytes()
    CONFIG = json.loads(json.dumps(asdict(RECIPES["quick"])))
    SMALL = recipe("quick", blocks="1", channels="16", precision="fp32")
    STATE = {"format": checkpoint.FORMAT, **State(SMALL, torch.device("cpu")).content()}
    file = io.BytesIO()
    torch.save(STATE, file)
    CHECKPOINT = file.getvalue()
    STUDY = next(iter((ROOT / "results" / "tuning").iterdir())).read_bytes()


def campaign(name: str, seconds: float, seed: int) -> str:
    """In this process; ends it where a file is neither read nor refused in the bounds."""
    prepare()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    make, read = READERS[name]
    loaded = (
        int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        * resource.getpagesize()
    )
    resource.setrlimit(resource.RLIMIT_AS, (loaded + ROOM, loaded + ROOM))
    dice, was_read, refused, slowest = random.Random(seed), 0, 0, 0.0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        content = make(dice)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            path.write_bytes(content)
            start = time.perf_counter()
            signal.alarm(SECONDS)  # not caught: it ends the process
            try:
                read(path)
                was_read += 1
            except InputError as error:
                refused += 1
                assert str(error).isprintable() and "MemoryError" not in str(error), error
            signal.alarm(0)
            slowest = max(slowest, time.perf_counter() - start)
    return f"{was_read} {refused} {slowest:.2f}"


def fuzz(name: str, seconds: float, seed: int | None = None) -> tuple[int, int, float]:
    """Files read, files refused, seconds of the slowest; RuntimeError where a bound was broken."""
    seed = time.time_ns() % 2**32 if seed is None else seed
    command = [sys.executable, __file__, "--here", name, "--seconds", str(seconds)]
    done = subprocess.run([*command, "--seed", str(seed)], capture_output=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{name}, seed {seed}: {done.returncode}: {done.stderr[-3000:]}")
    was_read, refused, slowest = done.stdout.split()
    return int(was_read), int(refused), float(slowest)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(READERS))
    parser.add_argument("--seconds", type=float, default=60, help="for each reader")
    parser.add_argument("--seed", type=int, help="the one that an error named")
    parser.add_argument("--here", choices=READERS, help="in this process")
    options = parser.parse_args()
    if options.here:
        print(campaign(options.here, options.seconds, options.seed))
        return 0
    for name in options.readers or READERS:
        was_read, refused, slowest = fuzz(name, options.seconds, options.seed)
        print(f"{name}: {was_read:,} read, {refused:,} refused, slowest {slowest:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
