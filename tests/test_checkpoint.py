"""Files that are written whole, and the directory of a run, which survives any kill."""

import errno
import hashlib
import io
import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from cifar_lib.checkpoint import RunDirectory
from cifar_lib.errors import InputError
from cifar_lib.files import SCRATCH, write_atomically


def state(epoch: int) -> dict:
    return {"model": {"weight": torch.full((100,), float(epoch))}, "epoch": epoch}


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """A run directory with the checkpoints of epochs 1 and 2."""
    run = RunDirectory(tmp_path / "run")
    run.write_json("config.json", {"recipe": "small"})
    run.save(state(1))
    run.save(state(2))
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def scratch(name: str) -> str:
    """The name of a file that is being written, with `name` as its random part."""
    return SCRATCH.replace("*", name)


def raising(number: int):
    """A system call that fails with this error."""

    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def refuses(path: Path, message: str, **options: object) -> None:
    with pytest.raises(InputError, match=f"^can't write [^\n]*{message}[^\n]*$"):
        write_atomically(path, b"new", **options)


# Files.


def test_a_write_replaces_the_file_keeps_the_old_one_and_leaves_nothing_else(tmp_path):
    path, kept = tmp_path / "deep" / "er" / "file", tmp_path / "deep" / "er" / "kept"
    for content in (b"one", b"two", b"three"):
        write_atomically(path, content, keep=kept)
    assert contents(path.parent) == {"file": b"three", "kept": b"two"}


def test_a_file_is_on_the_disk_before_it_takes_its_name_and_two_writers_do_not_meet(
    tmp_path, monkeypatch
):
    path, sizes = tmp_path / "file", []

    def fsync(number: int) -> None:
        sizes.append(os.fstat(number).st_size)
        if len(sizes) == 1:  # another process writes the same file meanwhile
            write_atomically(path, b"theirs")
            assert path.read_bytes() == b"theirs"

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(path, b"x" * 1000)  # stays in Python's buffer until it is flushed
    assert sizes == [1000, 6] and contents(tmp_path) == {"file": b"x" * 1000}


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_leaves_everything_as_it_was(tmp_path, monkeypatch, function):
    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, function, raising(errno.ENOSPC))
    refuses(tmp_path / "file", "No space left on device")
    refuses(tmp_path / "file" / "below", "File exists")
    assert contents(tmp_path) == {"file": b"old"}


def test_a_link_in_the_place_of_the_scratch_file_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "victim").write_bytes(b"old")
    (tmp_path / scratch("guessed")).symlink_to(tmp_path / "victim")
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    refuses(tmp_path / "file", "File exists")
    assert contents(tmp_path) == {"victim": b"old"}


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_a_new_file_has_the_permissions_of_the_umask_and_a_replaced_one_keeps_its_own(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "new", b"")
    finally:
        os.umask(before)
    (tmp_path / "old").touch(0o604)
    write_atomically(tmp_path / "old", b"")
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("new", "old")] == [0o640, 0o604]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_only_a_regular_file_that_is_not_an_input_is_written_over(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "hard").hardlink_to(tmp_path / "file")
    refuses(tmp_path / "file", "input", inputs=[tmp_path / "gone", tmp_path / "hard"])
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "fifo")
    for path in ("link", "dangling", "fifo", ".", os.devnull):
        refuses(tmp_path / path, "not a regular file")
    refuses(tmp_path / "file", "not a regular file", keep=tmp_path / "link")
    (tmp_path / "file").chmod(0o444)
    refuses(tmp_path / "file", "read-only")
    assert (tmp_path / "file").read_bytes() == b"old" and not (tmp_path / "nothing").exists()


# Checkpoints.


def test_a_save_killed_between_its_renames_loses_no_epoch_and_leaves_nothing_behind(run):
    os.replace(run.path / "checkpoint.pt", run.path / "checkpoint.previous.pt")
    (run.path / scratch("0a")).write_text("half", encoding="utf-8")
    with run:
        assert run.load()["epoch"] == 2
        run.save(state(3))
    names = [".lock", "checkpoint.previous.pt", "checkpoint.pt", "config.json"]
    assert sorted(contents(run.path)) == names
    assert run.load()["epoch"] == 3


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def packed(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()


WHOLE = {"format": 3, **state(2)}
DAMAGED = {
    "empty": b"",
    "truncated": packed(WHOLE)[:-10],
    "flipped": packed(WHOLE).replace(b"epoch", b"epocj"),
    "code": packed({**WHOLE, "model": Evil()}),
    "a list": packed([1, 2]),
    "a future format": packed({**WHOLE, "format": 4}),
}


@pytest.mark.parametrize("damaged", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_checkpoint_is_passed_over_and_two_are_refused(run, damaged, monkeypatch):
    monkeypatch.chdir(run.path)
    for _ in range(2):  # the damaged one must not become the one before
        (run.path / "checkpoint.pt").write_bytes(damaged)
        with pytest.warns(UserWarning, match="checkpoint.pt: .*resuming from checkpoint.previous"):
            assert run.load()["epoch"] == 1
        run.save(state(2))
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (run.path / name).write_bytes(damaged)
    before = contents(run.path)
    with pytest.raises(InputError, match=r"no usable .*checkpoint.pt: [^\n]*previous.pt: [^\n]*$"):
        run.load()
    assert contents(run.path) == before and not (run.path / "ran").exists()


# The directory.


def test_a_run_that_is_held_is_refused_until_it_is_left(run):
    with run, pytest.raises(InputError, match="another process is training in "):
        RunDirectory(run.path).__enter__()  # the system's locks are by opened file
    with RunDirectory(run.path):
        pass


@pytest.mark.parametrize(
    ("lock", "number"),
    [(FileLock, errno.ENOTSUP), ("fcntl.flock", errno.ENOSYS), ("fcntl.flock", errno.ENOTSUP)],
)
def test_a_mounted_drive_without_locks_and_permissions_will_do(run, monkeypatch, lock, number):
    if lock is FileLock:
        monkeypatch.setattr(FileLock, "acquire", raising(number))
    else:
        pytest.importorskip("fcntl", reason="needs flock")
        monkeypatch.setattr(lock, raising(number))
    monkeypatch.setattr("shutil.copymode", raising(errno.ENOTSUP))
    message = rf"can't be locked \({os.strerror(number)}\): start only one training"
    for epoch in (3, 4):  # a lock file that stays must not look like another process
        with (
            pytest.warns(UserWarning, match=message),
            run,
        ):
            run.save(state(epoch))
        assert run.load()["epoch"] == epoch


@pytest.mark.parametrize("theirs", ["model.safetensors", ".x.tmp", "config.json"])
def test_somebody_elses_folder_and_a_place_below_a_file_are_refused_untouched(tmp_path, theirs):
    (tmp_path / theirs).write_text('{"architectures": ["ResNet"]}', encoding="utf-8")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=rf"holds '{theirs}', but no run's config.json"):
        RunDirectory(tmp_path).__enter__()
    for path in (tmp_path / theirs, tmp_path / theirs / "run"):
        with pytest.raises(InputError, match="run directory: .* can't be written"):
            RunDirectory(path).__enter__()
    assert contents(tmp_path) == before


def test_only_our_own_scratch_files_are_removed_and_no_link_is_followed(run, tmp_path):
    (run.path / scratch("0a")).write_text("half", encoding="utf-8")
    (run.path / scratch("folder")).mkdir()
    (run.path / ".theirs.tmp").write_text("whole", encoding="utf-8")
    with run:
        left = {path.name for path in run.path.glob(".*")}
    assert left == {".lock", ".theirs.tmp", scratch("folder")}
    (tmp_path / "victim").write_bytes(b"old")
    (run.path / ".lock").unlink()
    (run.path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match="can't be written"), run:
        pass
    assert (tmp_path / "victim").read_bytes() == b"old"


@pytest.mark.parametrize("there", [b"", b"epoch,loss,test\n0,2.5,1\n", b"\xff\x00"])
def test_rows_become_csv_and_go_below_whatever_is_there(run, there):
    rows = [{"epoch": 1, "loss": 0.1 + 0.2, "test": None}]
    header, line = b"epoch,loss,test\n", b"1,0.30000000000000004,\n"
    for below, expected in ((True, (there or header) + line), (False, header + line)):
        (run.path / "rows.csv").write_bytes(there)
        run.write_rows("rows.csv", rows, below)
        assert (run.path / "rows.csv").read_bytes() == expected


@pytest.mark.parametrize(
    "text", [b'{"epochs"', b"{}", b"[1]", b"\xff", b'{"n": %s}' % (b"9" * 400)]
)
def test_json_that_is_not_an_object_of_sane_numbers_is_refused(run, text):
    (run.path / "metrics.json").write_bytes(text)
    with pytest.raises(InputError, match=r"metrics.json can't be read \([^\n]*$"):
        run.read_json("metrics.json")
