import errno
import hashlib
import io
import os
import signal
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
    run.write_json("config.json", {"recipe": "quick"})
    run.save(state(1))
    run.save(state(2))
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refuses(path: Path, message: str, **options: object) -> None:
    with pytest.raises(InputError, match=f"^can't write [^\n]*{message}[^\n]*$"):
        write_atomically(path, b"new", **options)


# Files


def test_a_write_replaces_the_file_keeps_the_old_one_and_leaves_nothing_else(tmp_path):
    path, kept = tmp_path / "deep" / "file", tmp_path / "deep" / "kept"
    for content in (b"one", b"two", b"three"):
        write_atomically(path, content, keep=kept)
    assert contents(path.parent) == {"file": b"three", "kept": b"two"}


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_leaves_everything_as_it_was(tmp_path, monkeypatch, function):
    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, function, full_disk)
    refuses(tmp_path / "file", "No space left on device")
    refuses(tmp_path / "file" / "below", "File exists")
    assert contents(tmp_path) == {"file": b"old"}


def test_two_writers_of_one_file_do_not_meet(tmp_path, monkeypatch):
    path, fsync = tmp_path / "file", os.fsync

    def other_writer(_):
        monkeypatch.setattr(os, "fsync", fsync)
        write_atomically(path, b"theirs")
        assert path.read_bytes() == b"theirs"

    monkeypatch.setattr(os, "fsync", other_writer)
    write_atomically(path, b"ours")
    assert contents(tmp_path) == {"file": b"ours"}


def test_a_link_in_the_place_of_the_scratch_file_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "victim").write_bytes(b"old")
    (tmp_path / SCRATCH.replace("*", "guessed")).symlink_to(tmp_path / "victim")
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
def test_only_a_regular_file_that_is_no_input_is_written_over(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "hard").hardlink_to(tmp_path / "file")
    refuses(tmp_path / "file", "input", inputs=[tmp_path / "gone", tmp_path / "hard"])
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "fifo")
    for path in ("link", "dangling", "fifo", ".", os.devnull):
        refuses(tmp_path / path, "no regular file")
    refuses(tmp_path / "file", "no regular file", keep=tmp_path / "link")
    (tmp_path / "file").chmod(0o444)
    refuses(tmp_path / "file", "read-only")
    assert (tmp_path / "file").read_bytes() == b"old" and not (tmp_path / "nothing").exists()


# Checkpoints


def test_a_save_killed_between_its_renames_loses_no_epoch_and_leaves_nothing_behind(run):
    os.replace(run.path / "checkpoint.pt", run.path / "checkpoint.previous.pt")
    (run.path / SCRATCH.replace("*", "0a")).write_text("half", encoding="utf-8")
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
        with pytest.warns(UserWarning, match="checkpoint.pt: .*going on from checkpoint.previous"):
            assert run.load()["epoch"] == 1
        run.save(state(2))
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (run.path / name).write_bytes(damaged)
    before = contents(run.path)
    with pytest.raises(InputError, match=r"no usable .*checkpoint.pt: [^\n]*previous.pt: [^\n]*$"):
        run.load()
    assert contents(run.path) == before and not (run.path / "ran").exists()


# The directory


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_held_by_another_process_is_refused_until_that_is_killed(run):
    ready, held = os.pipe()
    holder = os.fork()
    if holder == 0:
        with run:
            os.write(held, b".")
            signal.pause()
    os.read(ready, 1)
    try:
        with pytest.raises(InputError, match="another process trains in "), run:
            pass
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    with run:
        pass


def test_a_place_that_can_not_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="run directory: .* can't be written"):
            RunDirectory(path).__enter__()


def test_a_mounted_drive_without_locks_permissions_and_flushed_folders_will_do(run, monkeypatch):
    def unsupported(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def flush(file: int, real=os.fsync) -> None:
        unsupported() if os.path.isdir(f"/proc/self/fd/{file}") else real(file)

    monkeypatch.setattr(FileLock, "acquire", unsupported)
    monkeypatch.setattr(os, "fchmod", unsupported, raising=False)
    monkeypatch.setattr(os, "fsync", flush)
    with pytest.warns(UserWarning, match="can't be locked .*: start only one training"), run:
        run.save(state(3))
    assert run.load()["epoch"] == 3


@pytest.mark.parametrize("missing", [errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_flock_is_warned_of_each_time(run, monkeypatch, missing):
    fcntl = pytest.importorskip("fcntl", reason="needs flock")

    def unsupported(*_: object) -> None:
        raise OSError(missing, os.strerror(missing))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    for _ in range(2):  # a lock file that stays must not look like another process
        with pytest.warns(UserWarning, match="can't be locked .*: start only one training"), run:
            assert (run.path / ".lock").exists()


@pytest.mark.parametrize("theirs", ["model.safetensors", ".x.tmp", "config.json"])
def test_the_folder_of_somebody_else_is_refused_untouched(tmp_path, theirs):
    (tmp_path / theirs).write_text('{"architectures": ["ResNet"]}', encoding="utf-8")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=rf"holds '{theirs}', no config.json"):
        RunDirectory(tmp_path).__enter__()
    assert contents(tmp_path) == before


def test_only_our_own_scratch_files_are_removed_and_no_link_is_followed(run, tmp_path):
    (run.path / SCRATCH.replace("*", "0a")).write_text("half", encoding="utf-8")
    (run.path / SCRATCH.replace("*", "folder")).mkdir()
    (run.path / ".theirs.tmp").write_text("whole", encoding="utf-8")
    with run:
        left = {path.name for path in run.path.glob(".*")}
    assert left == {".lock", ".theirs.tmp", SCRATCH.replace("*", "folder")}
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
    if hasattr(os, "mkfifo"):  # not on Windows
        os.mkfifo(run.path / "fifo.csv")
        with pytest.raises(InputError, match="can't write .*no regular file"):
            run.write_rows("fifo.csv", rows, below=True)


@pytest.mark.parametrize(
    "text", [b'{"epochs"', b"{}", b"[1]", b"\xff", b'{"n": %s}' % (b"9" * 400)]
)
def test_json_that_is_no_object_of_sane_numbers_is_refused(run, text):
    (run.path / "metrics.json").write_bytes(text)
    with pytest.raises(InputError, match=r"metrics.json can't be read \([^\n]*$"):
        run.read_json("metrics.json")
