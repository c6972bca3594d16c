"""The download, from servers of the tests' own; the archive is a tiny one."""

import hashlib
import tarfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from torchvision.datasets import CIFAR10

from cifar_lib import download
from cifar_lib.data import FOLDER, load_cifar10
from cifar_lib.download import download_cifar10
from cifar_lib.errors import InputError

Answer = Callable[[BaseHTTPRequestHandler], None]
CLOSED = "http://127.0.0.1:9"


@pytest.fixture
def archive(tmp_path, monkeypatch) -> bytes:
    """An archive that is taken for CIFAR-10's, a thousand times smaller."""
    batches = tmp_path / "made" / FOLDER
    batches.mkdir(parents=True)
    noise = b"".join(hashlib.sha256(bytes([i % 256, i // 256])).digest() for i in range(3000))
    (batches / "data_batch_1").write_bytes(noise)
    path = tmp_path / "made" / "archive.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(batches, FOLDER)
    content = path.read_bytes()
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    monkeypatch.setattr(download, "ARCHIVE_BYTES", len(content))
    monkeypatch.setattr(download, "WINDOW", 0.4)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return content


@pytest.fixture
def serve():
    """serve(answer) starts a server whose every GET is handled by `answer`; gives its address."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                answer(self)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # the downloader goes away while it is served
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def send(content: bytes, asked: list | None = None, until: int | None = None, seconds=0) -> Answer:
    """Serve `content` from the byte asked for, noting path and range in `asked`; only until there,
    and evenly in so many seconds for all of it."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range", "")
        if asked is not None:
            asked.append(f"{request.path} {wanted}")
        first = int(wanted[len("bytes=") : -1]) if wanted else 0
        request.send_response(206 if first else 200)
        request.send_header("Content-Length", str(len(content) - first))
        request.end_headers()
        for start in range(first, until or len(content), 500):
            request.wfile.write(content[start : min(start + 500, until or len(content))])
            time.sleep(seconds * 500 / len(content))

    return answer


@pytest.fixture
def fetch(archive, monkeypatch):
    """fetch(root, *addresses, **options) downloads from these sources in turn."""

    def download_from(root: Path, *addresses: str, **options) -> None:
        sources = tuple(f"{address}/archive.tar.gz" for address in addresses)
        monkeypatch.setattr(download, "SOURCES", sources)
        # Unpacked elsewhere it could be on another disk, from which nothing moves at once.
        monkeypatch.setattr(download.tempfile, "tempdir", str(root / "nowhere"))
        folder = download_cifar10(root, **options)
        assert folder == root / FOLDER and (folder / "data_batch_1").is_file()
        assert [path.name for path in root.iterdir()] == [FOLDER]

    return download_from


def test_a_named_mirror_comes_first(archive, serve, fetch, tmp_path):
    asked: list[str] = []
    fetch(tmp_path / "new" / "data", CLOSED, mirror=serve(send(archive, asked)) + "/cifar/")
    assert asked == [f"/cifar/{CIFAR10.filename} "]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "refused"),
        (lambda archive: lambda request: request.send_error(404), "404: Not Found"),
        (lambda archive: send(bytes(len(archive))), "another file: the md5 differs"),
        (lambda archive: send(archive, until=1000), "the transfer ended after 1,000 of"),
        (lambda archive: send(archive, seconds=1000), "timed out"),
    ],
)
def test_a_source_that_fails_is_named_and_left_for_the_next(
    answer, reason, archive, serve, fetch, tmp_path
):
    failing = serve(answer(archive)) if answer else CLOSED
    message = rf"^CIFAR-10 could not be downloaded \(127.0.0.1:\d+: .*{reason}.*$"
    with pytest.raises(InputError, match=message):
        fetch(tmp_path / "data", failing)
    assert not (tmp_path / "data" / FOLDER).exists()
    fetch(tmp_path / "data", failing, serve(send(archive)))


def test_what_came_is_gone_on_with_unless_it_belongs_to_another_archive(
    archive, serve, fetch, tmp_path
):
    asked: list[str] = []
    with pytest.raises(InputError):
        sources = [send(archive, until=5000), send(archive, asked, until=9000)]
        fetch(tmp_path / "data", *map(serve, sources))
    fetch(tmp_path / "data", serve(send(archive, asked)))
    assert asked == ["/archive.tar.gz bytes=5000-", "/archive.tar.gz bytes=9000-"]

    for size in (500, 10**6):
        (tmp_path / f"{size}").mkdir()
        (tmp_path / f"{size}" / CIFAR10.filename).write_bytes(bytes(size))
        fetch(tmp_path / f"{size}", serve(send(archive)))


def test_a_slow_source_is_left_for_the_next_but_the_last_is_not(
    archive, serve, fetch, tmp_path, monkeypatch
):
    asked: list[str] = []
    monkeypatch.setattr(download, "SLOW", len(archive) / 5)
    fetch(tmp_path / "one", *(serve(send(archive, asked, seconds=s)) for s in (20, 1)), CLOSED)
    assert asked[0] == "/archive.tar.gz " and asked[1].startswith("/archive.tar.gz bytes=")
    monkeypatch.setattr(download, "SLOW", 10**9)
    fetch(tmp_path / "two", serve(send(archive, seconds=1)))


def test_the_time_limit_holds(archive, serve, fetch, tmp_path):
    with pytest.raises(
        InputError, match=r"\(127[^;]*: the time limit was reached\): set CIFAR10_ROOT"
    ):
        fetch(tmp_path, serve(send(archive, seconds=20)), CLOSED, give_up_after=0.2)


def test_the_archive_can_be_kept_elsewhere_and_serves_the_next_machine(
    archive, serve, fetch, tmp_path
):
    drive = tmp_path / "drive" / "archives"
    fetch(tmp_path / "one", serve(send(archive)), archives=drive)
    assert (drive / CIFAR10.filename).read_bytes() == archive
    fetch(tmp_path / "two", archives=drive)


def test_two_at_once_download_once(archive, serve, tmp_path, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(download, "SOURCES", (serve(send(archive, asked, seconds=0.3)),))
    calls = [threading.Thread(target=download_cifar10, args=(tmp_path / "data",)) for _ in range(2)]
    for call in calls:
        call.start()
    for call in calls:
        call.join(10)
    assert len(asked) == 1 and (tmp_path / "data" / FOLDER).is_dir()


@pytest.mark.parametrize(
    "mirror",
    ["example.org/cifar", "file:///folder", "http://user:secret@host/x", "http://", "ftp:"],
)
def test_a_mirror_that_is_no_address_is_refused_without_its_password(mirror, tmp_path, monkeypatch):
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
    monkeypatch.setenv("CIFAR10_MIRROR", mirror)
    with pytest.raises(InputError, match="^CIFAR10_MIRROR: expected an address.*$") as error:
        load_cifar10(home=tmp_path / "data")
    assert "secret" not in str(error.value) and not (tmp_path / "data").exists()


def test_a_place_that_can_not_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="can't write CIFAR-10 into"):
        download_cifar10(tmp_path / "file" / "data")
