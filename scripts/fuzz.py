"""Random files for every reader of files: python -m scripts.fuzz [--seconds 60] [READER ...]

Most are honest files with a few changes. Each must be read, or refused in one printable line,
within 10 seconds and 1 GB. Anything else ends the campaign with the reader's name and the seed;
`--seed` makes the same files again. This needs Linux.
"""

import argparse
import faulthandler
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import pickle
import random
import resource
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image

from cifar_lib.checkpoint import DIGEST_SIZE, RunDirectory
from cifar_lib.errors import InputError
from cifar_lib.fit import fit
from cifar_lib.kaggle import read_test_file
from cifar_lib.model import load_model
from cifar_lib.pictures import read_picture
from cifar_lib.recipes import RECIPES, recipe
from cifar_lib.train import State
from notebooks.course.stand_in import generate_stand_in
from tests.test_pickles import CORPUS, mutated

SECONDS, ROOM = 10, 1 << 30  # how much time, and how many bytes of memory, one file may take
NETWORK = {"blocks": "1", "channels": "16", "precision": "fp32"}
# Values that nobody expects. The words are also used as names of fields.
WORDS = ["", "0", "0x10", "1_0", "1,2", "none", "name", "self", "\x00", "½", "x" * 10_000]
NASTY = [None, True, -1, 0, 1, 10**30, 1e308, -1e-300, float("nan"), [], {}, *WORDS]


# A nasty value, and a random file for each reader.


def nasty(value: Any) -> Any:
    """Return `value` with one of its parts replaced, renamed, dropped or put into many lists."""
    if isinstance(value, (dict, list)) and value and random.random() < 0.85:
        key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
        changed = value.copy()
        changed[key] = nasty(value[key])
        if random.random() < 0.1:
            lost = changed.pop(key)
            if isinstance(changed, dict) and random.random() < 0.5:
                changed[random.choice(WORDS)] = lost
        return changed
    if random.random() < 0.1:
        return functools.reduce(lambda inner, _: [inner], range(300), value)
    return random.choice(NASTY)


def nasty_json(value: Any) -> bytes:
    """Return a nasty value as JSON, now and then nested deeper than any parser's stack."""
    text = json.dumps(nasty(value)).encode()
    return text.replace(b"[", b"[" * 200_000, 1) if random.random() < 0.02 else text


@functools.cache
def honest_pickles() -> list[bytes]:
    """Return test files of every protocol, and the short ones of the tests' hostile files."""
    images = generate_stand_in(0, 2)[1].images.permute(0, 2, 3, 1)  # (2, 32, 32, 3)
    content = {b"data": images.numpy(), b"ids": [0, 1]}
    honest = [pickle.dumps(content, protocol) for protocol in range(6)]
    return honest + [file for file in CORPUS.values() if 0 < len(file) < 10**5]


@functools.cache
def honest_pictures() -> list[bytes]:
    files = []
    formats = "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"
    sizes = (1, 1), (40, 30), (300, 200)
    for kind, size, mode in itertools.product(formats, sizes, ("RGB", "L")):
        files.append(io.BytesIO())
        Image.effect_noise(size, 64).convert(mode).save(files[-1], kind)
    return [file.getvalue() for file in files]


@functools.cache
def honest_run() -> dict[str, bytes]:
    """Return the files of a run of one epoch, by name."""
    config, images = recipe("small", epochs=1, **NETWORK), generate_stand_in(60, 20)
    with tempfile.TemporaryDirectory() as folder:
        fit(config, folder, *images, device="cpu", log=lambda line: None)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def weights() -> bytes:
    """Return a file of weights with changed bytes or another header."""
    content = honest_run()["model.safetensors"]
    if random.random() < 0.3:
        return mutated(content, random)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if random.random() < 0.5:
        text = nasty_json(header)
    else:
        ours = json.loads(header["__metadata__"]["cifar_lib"])
        header["__metadata__"]["cifar_lib"] = nasty_json(ours).decode()
        text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[end:]


def checkpoint() -> bytes:
    """Return a changed checkpoint with the right digest, as a stranger could make it."""
    content = honest_run()["checkpoint.pt"][:-DIGEST_SIZE]
    if random.random() < 0.5:
        content = mutated(content, random)
    else:
        file = io.BytesIO()
        torch.save(nasty(torch.load(io.BytesIO(content), weights_only=True)), file)
        content = file.getvalue()
    return content + hashlib.sha256(content).digest()


@functools.cache
def state() -> State:
    return State(recipe("small", **NETWORK), torch.device("cpu"))


def read_checkpoint(path: Path) -> None:
    path.rename(path.with_name("checkpoint.pt"))
    state().load(RunDirectory(path.parent).load())


def configuration() -> bytes:
    content = nasty_json(asdict(RECIPES["small"]))
    return mutated(content, random) if random.random() < 0.3 else content


def read_configuration(path: Path) -> None:
    recipe("report", **RunDirectory(path.parent).read_json(path.name))


READERS = {
    "pickle": (lambda: mutated(random.choice(honest_pickles()), random), read_test_file),
    "picture": (lambda: mutated(random.choice(honest_pictures()), random), read_picture),
    "weights": (weights, load_model),
    "checkpoint": (checkpoint, read_checkpoint),
    "configuration": (configuration, read_configuration),
}


# A campaign.


def read_files(reader: str, seconds: float, seed: int) -> Counter[str]:
    """Let a reader read random files in this process; count those read and those refused."""
    make, read = READERS[reader]
    happened: Counter[str] = Counter()
    random.seed(seed)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for prepare in (honest_pickles, honest_pictures, honest_run, state):
        prepare()  # before memory is limited
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        content = make()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            path.write_bytes(content)
            faulthandler.dump_traceback_later(SECONDS, exit=True)  # also in the middle of C code
            try:
                read(path)
                happened["read"] += 1
            except InputError as error:
                assert str(error).isprintable() and "MemoryError" not in str(error), error
                happened["refused"] += 1
            faulthandler.cancel_dump_traceback_later()
    return happened


def fuzz(reader: str, seconds: float, seed: int) -> Counter[str]:
    """Do the same in a process of its own, because its limits hold until it ends.

    Raises RuntimeError if a file was neither read nor refused within the limits.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as process:
        try:
            return process.submit(read_files, reader, seconds, seed).result()
        except Exception as error:
            raise RuntimeError(f"reader {reader}, --seed {seed}: {error!r}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(READERS))
    parser.add_argument("--seconds", type=float, default=60, help="for each reader")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    options = parser.parse_args()
    for reader in options.readers or READERS:
        happened = fuzz(reader, options.seconds, options.seed)
        print(f"{reader}: {happened['read']:,} read, {happened['refused']:,} refused", flush=True)


if __name__ == "__main__":
    main()
