"""Random pickles for as long as one likes: PYTHONPATH=. python tests/fuzz_pickles.py [SECONDS]."""

import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from test_pickles import CORPUS, ENVIRONMENT, HONEST, mutated

from cifar_lib.errors import InputError
from cifar_lib.pickles import INSTRUCTIONS, read


def fuzz(seconds: float) -> str:
    """Each file is read or refused in 10 s and 1 GB; RuntimeError names the seed where not."""
    seed = time.time_ns() % 2**32
    command = [sys.executable, __file__, str(seconds), str(seed)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"seed {seed}: status {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout.strip()


def file(dice: random.Random) -> bytes:
    """A changed honest or hostile file, or an honest one with instructions put into it anywhere."""
    hostile = [content for content in CORPUS.values() if 0 < len(content) < 10**5]
    if dice.random() < 0.5:
        return mutated(dice.choice([*HONEST.values(), *hostile]), dice)
    content = bytearray(dice.choice([*HONEST.values(), *hostile]))
    for _ in range(dice.randint(1, 9)):
        code = getattr(pickle, dice.choice(INSTRUCTIONS.split()))
        at = dice.choice([dice.randrange(min(400, len(content))), len(content) - 1])
        content[at:at] = code + dice.choice([b"", bytes([dice.randrange(20)])])
    return bytes(content)


def campaign(seconds: float, seed: int) -> str:
    loaded = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (loaded + (1 << 30), loaded + (1 << 30)))
    dice, counts, end = random.Random(seed), [0, 0], time.monotonic() + seconds
    while time.monotonic() < end:
        content = file(dice)
        signal.setitimer(signal.ITIMER_PROF, 10)  # of computing; not caught: it ends the process
        try:
            read(content)
            counts[0] += 1
        except InputError as error:
            counts[1] += 1
            assert "MemoryError" not in str(error) and str(error).isprintable(), content[:1000]
    return f"{counts[0]} files read, {counts[1]} refused"


if __name__ == "__main__":
    arguments = sys.argv[1:]
    seconds = float(arguments[0]) if arguments else 60
    print(campaign(seconds, int(arguments[1])) if arguments[1:] else fuzz(seconds))
