"""Two faults of the campaign; `make reliability` does all of them, many times."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork, flock and Linux's memory files")
def test_the_campaign_does_the_faults_that_are_named_and_prints_what_happened():
    names = ["both checkpoints damaged", "file system without locks"]
    command = [sys.executable, "-m", "scripts.faults", "--at-most", "1", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=500)
    assert done.returncode == 0, done.stderr
    damaged, without_locks = done.stdout.splitlines()
    assert damaged.startswith("| both checkpoints damaged | 1 | ") and "refused: 1" in damaged
    assert without_locks.startswith("| file system without locks | 1 | ")
    assert "the same bytes: 1" in without_locks
