"""A short campaign of faults; `make reliability` runs the long one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_training_ends_with_the_same_bytes_and_no_fault_loses_anything():
    command = [
        sys.executable,
        "-m",
        "scripts.faults",
        "--kills",
        "5",
        "--only",
    ]
    campaigns = [
        "kills fp32",
        "kills bf16 1",
        "checkpoints",
        "disks",
        "locks",
        "losses",
        "submissions",
    ]
    done = subprocess.run(
        [*command, *campaigns], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=500
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()]
    assert sum(int(tried) for fault, tried, _ in rows if fault.startswith("training killed")) >= 11
    assert len(rows) >= 13
