"""Two processes on one run, started as a user would: with torchrun."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cifar_lib import ranks
from cifar_lib.checkpoint import RunDirectory
from cifar_lib.data import generate_stand_in
from cifar_lib.errors import InputError
from cifar_lib.recipes import recipe
from cifar_lib.train import fit

pytestmark = pytest.mark.xdist_group("ranks")  # one worker, so that `together` runs once

ROOT = Path(__file__).parent.parent
FIELDS = {
    "blocks": "1,1",
    "channels": "16,24",
    "batch_size": "15",
    "epochs": "3",
    "warmup_epochs": "1",
}
FIELDS |= {
    "precision": "fp32",
    "learning_rate": "0.02",
    "ema_decay": "0.5",
    "validation_size": "10",
}
# Trains `FIELDS` on generated images, keeps what this rank ended with, and dies after the epoch
# that DIE_AFTER names.
SCRIPT = """
import os, sys, torch
from cifar_lib import cli, ranks, train
from cifar_lib.data import generate_stand_in
cli.load_cifar10 = lambda root: generate_stand_in(70, 31)
train_one_epoch = train.train_one_epoch
def remember(step, *arguments):
    if step.state.epoch == int(os.environ.get("DIE_AFTER", -1)):
        os._exit(7)
    result = train_one_epoch(step, *arguments)
    content = step.state.content()
    torch.save([content["model"], content["ema"], result], f"rank{ranks.rank()}.pt")
    return result
train.train_one_epoch = remember
sys.exit(cli.main(sys.argv[1:]))
"""


def start(
    folder: Path, processes: int = 2, die_after: int | None = None, **changes: str
) -> subprocess.CompletedProcess:
    fields = [
        text
        for name, value in {**FIELDS, **changes}.items()
        for text in ("--set", f"{name}={value}")
    ]
    (folder / "script.py").write_text(SCRIPT)
    # After --, as torchrun would read --run as the beginning of an option of its own
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    command += [
        "--",
        "script.py",
        "train",
        "--recipe",
        "report",
        "--run",
        "run",
        "--device",
        "cpu",
        *fields,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {} if die_after is None else {"DIE_AFTER": str(die_after)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """A finished run of two ranks."""
    folder = tmp_path_factory.mktemp("together")
    done = start(folder)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("epoch 3/3") == done.stdout.count("test accuracy") == 1
    )  # one rank speaks
    return folder


def test_replicas_stay_identical_in_weights_averages_and_batch_statistics(together):
    (model, ema, result), (other_model, other_ema, other_result) = (
        torch.load(together / f"rank{rank}.pt") for rank in (0, 1)
    )
    for ours, theirs in ((model, other_model), (ema, other_ema)):
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert result == other_result  # loss and accuracy of the epoch are over all ranks


def test_two_ranks_train_to_nearly_what_one_process_does(together, tmp_path):
    alone = fit(
        recipe("report", **FIELDS),
        tmp_path / "run",
        *generate_stand_in(70, 31),
        device="cpu",
        log=str,
    )
    shared = json.loads((together / "run" / "metrics.json").read_text())
    # Batch normalisation over 7 or 8 images instead of 15 is the only difference but rounding.
    one, two = (RunDirectory(path / "run").load()["history"] for path in (tmp_path, together))
    for row, other in zip(one, two, strict=True):
        assert other["train_loss"] == pytest.approx(row["train_loss"], rel=0.05)
    assert shared["test"]["n"] == alone["test"]["n"] == 31
    assert shared["test"]["cross_entropy"] == pytest.approx(alone["test"]["cross_entropy"], rel=0.1)


def test_a_killed_run_of_two_ranks_ends_with_the_same_bytes(together, tmp_path):
    assert start(tmp_path, die_after=2).returncode != 0
    again = start(tmp_path)
    assert again.returncode == 0 and re.search("going on from epoch [12] of 3", again.stdout)
    for name in ("checkpoint.pt", "history.csv", "model.safetensors", "metrics.json"):
        assert (tmp_path / "run" / name).read_bytes() == (together / "run" / name).read_bytes(), (
            name
        )


def test_another_number_of_ranks_is_refused(together):
    before = (together / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError, match=r"these differ: .*ranks \(2, now 1\)"):
        fit(recipe("report", **FIELDS), together / "run", *generate_stand_in(70, 31), device="cpu")
    assert (together / "run" / "checkpoint.pt").read_bytes() == before


def test_a_batch_too_small_to_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(
        InputError,
        match="batch_size: batches of 59 out of 60 images end with 1, too few for 2 ranks",
    ):
        fit(
            recipe("report", **{**FIELDS, "batch_size": 59}),
            tmp_path / "run",
            *generate_stand_in(70, 31),
            device="cpu",
        )
    assert not (tmp_path / "run").exists()


def test_environment_variables_of_torchrun_are_checked(monkeypatch):
    values = {
        "RANK": "0",
        "WORLD_SIZE": "two",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        InputError, match="WORLD_SIZE: expected the value that torchrun sets, got 'two'"
    ):
        ranks.join("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK")
    with pytest.raises(InputError, match="RANK: expected the value that torchrun sets, got ''"):
        ranks.join("cpu")


def test_without_torchrun_there_is_one_rank():
    assert (ranks.join("cpu"), ranks.rank(), ranks.count()) == ("cpu", 0, 1)
    rows = torch.arange(6).view(3, 2)
    assert torch.equal(ranks.interleave(rows, 3), rows) and ranks.from_first(lambda: 5) == 5
