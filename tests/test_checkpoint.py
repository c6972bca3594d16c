import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cifar_lib.checkpoint import RunDirectory, write_atomically
from cifar_lib.errors import InputError

HOLD = """
import sys
from cifar_lib.checkpoint import RunDirectory
with RunDirectory(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def state(epoch: int) -> dict:
    return {
        "epoch": epoch,
        "model": {"weight": torch.full((100,), float(epoch))},
        "history": [{"epoch": epoch}],
    }


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """A run directory with the checkpoints of epochs 1 and 2."""
    run = RunDirectory(tmp_path / "run")
    run.save(state(1))
    run.save(state(2))
    return run


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path.write_bytes({"truncated": content[:-10], "flipped": bytes(flipped), "empty": b""}[how])


def fail_with_a_full_disk(monkeypatch, function: str, on_call: int = 1) -> None:
    real, calls = getattr(os, function), []

    def failing(*args):
        calls.append(args)
        if len(calls) == on_call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, function, failing)


def test_a_write_replaces_the_file_keeps_the_old_one_and_leaves_nothing_else(tmp_path):
    path, kept = tmp_path / "deep" / "file", tmp_path / "deep" / "kept"
    write_atomically(path, b"one", keep=kept)
    assert files(path.parent) == {"file": b"one"}
    write_atomically(path, b"two", keep=kept)
    write_atomically(path, b"three", keep=kept)
    assert files(path.parent) == {"file": b"three", "kept": b"two"}
    write_atomically(path, b"four")
    assert files(path.parent) == {"file": b"four", "kept": b"two"}


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_leaves_everything_as_it_was(tmp_path, monkeypatch, function):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    fail_with_a_full_disk(monkeypatch, function)
    with pytest.raises(InputError, match=r"can't write .*file \(No space left on device\)"):
        write_atomically(path, b"new")
    assert files(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("on_call", [1, 2])
def test_a_failed_replacement_with_keep_leaves_the_file_as_it_was(tmp_path, monkeypatch, on_call):
    path, kept = tmp_path / "file", tmp_path / "kept"
    path.write_bytes(b"old")
    kept.write_bytes(b"older")
    fail_with_a_full_disk(monkeypatch, "replace", on_call)
    with pytest.raises(InputError, match="nothing there was changed"):
        write_atomically(path, b"new", keep=kept)
    left = files(tmp_path)
    assert left.pop("kept") in (b"old", b"older")
    assert left == {"file": b"old"}


@pytest.mark.parametrize(("function", "on_call"), [("fsync", 1), ("replace", 1), ("replace", 2)])
def test_a_failed_save_loses_no_epoch(run, monkeypatch, function, on_call):
    fail_with_a_full_disk(monkeypatch, function, on_call)
    with pytest.raises(InputError, match="No space left"):
        run.save(state(3))
    assert run.load()["epoch"] == 2
    run.save(state(3))
    assert run.load()["epoch"] == 3


def test_a_missing_checkpoint_is_made_good_by_the_one_before_with_a_warning(run):
    (run.path / "checkpoint.pt").unlink()
    with pytest.warns(
        UserWarning, match="checkpoint.pt is missing; going on from checkpoint.previous.pt"
    ):
        assert run.load()["epoch"] == 1


def test_a_save_after_a_kill_between_the_two_renames_leaves_nothing_else(run):
    (run.path / "checkpoint.previous.pt").unlink()
    os.link(run.path / "checkpoint.pt", run.path / "checkpoint.previous.pt")
    run.save(state(3))
    assert sorted(files(run.path)) == ["checkpoint.previous.pt", "checkpoint.pt"]
    assert run.load()["epoch"] == 3


def test_a_place_that_can_not_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't write"):
        write_atomically(tmp_path / "file" / "below", b"new")
    with (
        pytest.raises(InputError, match="run directory: can't write into"),
        RunDirectory(tmp_path / "file" / "run"),
    ):
        pass
    with (
        pytest.raises(InputError, match="run directory: can't write into"),
        RunDirectory(tmp_path / "file"),
    ):
        pass
    assert files(tmp_path) == {"file": b""}


def test_a_new_run_has_no_checkpoint(tmp_path):
    assert RunDirectory(tmp_path).load() is None
    assert RunDirectory(tmp_path).read_json("metrics.json") is None


def test_the_newest_checkpoint_comes_back_and_the_one_before_is_kept(run):
    loaded = run.load()
    assert loaded["epoch"] == 2 and loaded["history"] == [{"epoch": 2}]
    assert torch.equal(loaded["model"]["weight"], torch.full((100,), 2.0))
    (run.path / "checkpoint.pt").unlink()
    with pytest.warns(UserWarning, match="missing"):
        assert run.load()["epoch"] == 1


def test_equal_states_are_equal_bytes(tmp_path):
    first, second = RunDirectory(tmp_path / "a"), RunDirectory(tmp_path / "b")
    key = "".join(["mo", "mentum"])  # a string of the same content and another identity
    first.save({"epoch": 1, "groups": [{"momentum": 0.9}, {"momentum": 0.9}], "pair": (1, 2)})
    second.save({"epoch": 1, "groups": [{"momentum": 0.9}, {key: 0.9}], "pair": [1, 2]})
    assert files(first.path) == files(second.path)


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(run, how):
    damage(run.path / "checkpoint.pt", how)
    with pytest.warns(
        UserWarning, match="checkpoint.pt: damaged .*going on from checkpoint.previous.pt"
    ):
        assert run.load()["epoch"] == 1
    run.save(state(2))
    damage(run.path / "checkpoint.pt", how)
    with pytest.warns(UserWarning, match="going on from"):
        assert run.load()["epoch"] == 1  # the damaged one did not become the one before


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
def test_two_damaged_checkpoints_are_refused_and_left_alone(run, how):
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        damage(run.path / name, how)
    before = files(run.path)
    with pytest.raises(
        InputError, match=r"no usable checkpoint \(checkpoint.pt: .*checkpoint.previous.pt: "
    ):
        run.load()
    assert files(run.path) == before


def test_a_checkpoint_is_read_without_running_code_in_it(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    run = RunDirectory(tmp_path / "run")
    run.save({"epoch": Evil()})
    with pytest.raises(InputError, match="unreadable"):
        run.load()
    assert not (tmp_path / "ran").exists()


def test_a_run_held_by_another_process_is_refused_until_that_is_killed(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(InputError, match=f"process {holder.pid} is training in"),
            RunDirectory(tmp_path),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / ".lock").exists()
    with RunDirectory(tmp_path):
        pass


def test_a_place_without_locks_is_refused(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(
        InputError, match=r"can't be locked \(No locks available\): choose one on a local disk"
    ):
        RunDirectory(tmp_path).__enter__()


def test_a_stale_lock_file_does_not_block_and_the_lock_is_given_back(tmp_path):
    (tmp_path / ".lock").write_text("999999")
    for _ in range(2):
        with RunDirectory(tmp_path):
            assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_what_a_killed_process_was_writing_is_removed(run):
    (run.path / ".timing.csv.tmp").write_text("half")
    with run:
        assert sorted(files(run.path)) == [".lock", "checkpoint.previous.pt", "checkpoint.pt"]


def test_rows_become_csv_with_empty_fields_for_none(tmp_path):
    RunDirectory(tmp_path).write_rows("rows.csv", [{"epoch": 0, "loss": 0.1 + 0.2, "test": None}])
    assert (tmp_path / "rows.csv").read_bytes() == b"epoch,loss,test\n0,0.30000000000000004,\n"


def test_json_comes_back_and_broken_json_is_refused(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_json("config.json", {"epochs": 3})
    assert (
        run.read_json("config.json")
        == json.loads((tmp_path / "config.json").read_text())
        == {"epochs": 3}
    )
    (tmp_path / "config.json").write_text('{"epochs"')
    with pytest.raises(InputError, match="config.json can't be read"):
        run.read_json("config.json")
