"""A short campaign of faults; `make reliability` runs the long one."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_killed_training_ends_with_the_same_bytes_and_no_fault_loses_anything():
    command = [sys.executable, str(Path(__file__).with_name("reliability.py")), "--kills", "6", "--only"]
    campaigns = ["kills", "checkpoints", "disks", "locks", "losses", "submissions"]
    done = subprocess.run([*command, *campaigns], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()]
    assert sum(int(tried) for fault, tried, _ in rows if fault.startswith("training killed")) >= 16
    assert len(rows) >= 14
