"""Two processes on one run, started as a user would: with torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cifar_lib import ranks
from cifar_lib.checkpoint import RunDirectory
from cifar_lib.errors import InputError
from cifar_lib.fit import fit
from cifar_lib.recipes import TrainConfig, recipe
from notebooks.course.stand_in import generate_stand_in

pytestmark = pytest.mark.xdist_group("ranks")  # one worker, so that `together` runs once

ROOT = Path(__file__).parent.parent
FIELDS = {"blocks": "1,1", "channels": "16,16", "batch_size": "14", "epochs": "3"}
FIELDS |= {"warmup_epochs": "1", "learning_rate": "0.02"}
FIELDS |= {"validation_size": "10", "precision": "fp32"}
# Trains on generated images until an interrupt in the last epoch, then goes on by the same command;
# keeps what this rank ended with.
SCRIPT = """
import contextlib, sys, torch
from cifar_lib import cli, fit, ranks
from notebooks.course.stand_in import generate_stand_in
cli.load_cifar10 = lambda root: generate_stand_in(70, 31)
train_one_epoch, interrupts = fit.train_one_epoch, [KeyboardInterrupt]
def remember(step, *arguments):
    if step.state.epoch == 2 and interrupts:
        raise interrupts.pop()
    result = train_one_epoch(step, *arguments)
    torch.save([list(step.state.model.parameters()), result], f"rank{ranks.rank()}.pt")
    return result
fit.train_one_epoch = remember
with ranks.joined("cpu"):
    ranks.joined = contextlib.nullcontext  # they meet once
    codes = cli.main(sys.argv[1:]), cli.main(sys.argv[1:])
sys.exit(codes != (130, 0))
"""


def config(**changes: str) -> TrainConfig:
    return recipe("report", **{**FIELDS, **changes})


@pytest.fixture(scope="session")  # tests of other modules may run in between
def together(tmp_path_factory) -> Path:
    """A run of two ranks that was interrupted and has gone on to its end."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node=2"
    # After --, as torchrun would read --run as the beginning of an option of its own.
    train = "-- script.py train --recipe report --run run --device cpu"
    done = subprocess.run(
        [
            sys.executable,
            *torchrun.split(),
            *train.split(),
            *(f"--set={k}={FIELDS[k]}" for k in FIELDS),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for line in ("going on from epoch 2 of 3", "epoch 3/3", "test accuracy"):
        assert done.stdout.count(line) == 1  # one rank speaks
    return folder


def test_two_ranks_train_to_nearly_what_one_process_does(together, tmp_path):
    ours, theirs = (torch.load(together / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    assert all(map(torch.equal, ours[0], theirs[0])) and ours[1] == theirs[1]
    alone = fit(config(), tmp_path / "run", *generate_stand_in(70, 31), device="cpu", log=str)
    shared = json.loads((together / "run" / "metrics.json").read_text(encoding="utf-8"))
    # Batch normalisation over 7 images instead of 14 is the only difference but rounding.
    saved = (RunDirectory(path / "run").load() for path in (tmp_path, together))
    one, two = (json.loads(state["history"]) for state in saved)
    for row, other in zip(one, two, strict=True):
        assert other["train_loss"] == pytest.approx(row["train_loss"], rel=0.05)
    assert shared["test"]["n"] == alone["test"]["n"] == 31
    assert shared["test"]["cross_entropy"] == pytest.approx(alone["test"]["cross_entropy"], rel=0.1)


def test_another_number_of_ranks_is_refused(together):
    before = (together / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError, match=r"these differ: .*ranks \(2, now 1\)"):
        fit(config(), together / "run", *generate_stand_in(70, 31), device="cpu")
    assert (together / "run" / "checkpoint.pt").read_bytes() == before


def test_ranks_that_can_not_share_a_batch_or_are_set_by_hand_are_refused(tmp_path, monkeypatch):
    data = generate_stand_in(70, 31)
    with pytest.raises(InputError, match=r"ranks: set by torchrun \(1\), got 3"):
        fit(config(ranks="3"), tmp_path / "run", *data, device="cpu")
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(InputError, match="end with 1, which doesn't do for 2 ranks"):
        fit(config(batch_size="59"), tmp_path / "run", *data, device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two", "RANK": "0"}])
def test_torchruns_variables_are_checked(monkeypatch, variables):
    with ranks.joined("cpu") as device:
        assert (device, ranks.rank(), ranks.count()) == ("cpu", 0, 1)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused = pytest.raises(InputError, match=r"ranks: can't meet the other processes [^\n]*$")
    with refused, ranks.joined("cpu"):
        pass
