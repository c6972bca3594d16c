"""The download, from servers of the tests' own; the archive is a tiny one."""

import hashlib
import re
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


@pytest.fixture
def archive(tmp_path, monkeypatch) -> bytes:
    """An archive that torchvision takes for CIFAR-10's, a hundred times smaller."""
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
    monkeypatch.setattr(download, "WINDOW", 0.3)
    monkeypatch.setattr(download, "SOURCES", ())
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
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def send(
    content: bytes, ranges: bool = False, until: int | None = None, pause: float = 0.0
) -> Answer:
    """Serve `content`: `ranges`: from the byte asked for; `until`: only so far, and then nothing
    for `pause` seconds."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        first = int(asked[1]) if asked and ranges else 0
        request.send_response(206 if first else 200)
        request.send_header("Content-Length", str(len(content) - first))
        request.end_headers()
        request.wfile.write(content[first:until])
        request.wfile.flush()
        time.sleep(pause)

    return answer


def drip(content: bytes, requests: list[str]) -> Answer:
    """So slowly that all of it takes a minute, but never silent."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        requests.append(request.headers.get("Range", ""))
        request.send_response(200)
        request.end_headers()
        for i in range(0, len(content), 200):
            request.wfile.write(content[i : i + 200])
            request.wfile.flush()
            time.sleep(0.1)

    return answer


def from_sources(monkeypatch, root: Path, *addresses: str, **options) -> list[str]:
    """Download from these sources in turn; returns what was logged."""
    sources = tuple(f"{address}/archive.tar.gz" for address in addresses)
    monkeypatch.setattr(download, "SOURCES", sources)
    lines: list[str] = []
    folder = download_cifar10(root, log=lines.append, **options)
    assert folder == root / FOLDER and (folder / "data_batch_1").is_file()
    assert sorted(path.name for path in root.iterdir()) == [FOLDER]
    return lines


def test_a_named_mirror_comes_first(archive, serve, tmp_path, monkeypatch):
    paths: list[str] = []

    def answer(request):
        paths.append(request.path)
        send(archive)(request)

    mirror = serve(answer) + "/cifar/"
    lines = from_sources(monkeypatch, tmp_path / "data", "http://127.0.0.1:9", mirror=mirror)
    assert paths == [f"/cifar/{CIFAR10.filename}"] and len(lines) == 1


@pytest.mark.parametrize("kind", ["closed", "404", "wrong bytes", "too long", "cut short"])
def test_a_source_that_fails_is_left_for_the_next_and_named(
    kind, archive, serve, tmp_path, monkeypatch
):
    answers = {
        "404": lambda request: request.send_error(404),
        "wrong bytes": send(bytes(len(archive))),
        "too long": send(archive + bytes(10)),
        "cut short": send(archive, until=1000),
    }
    first = "http://127.0.0.1:9" if kind == "closed" else serve(answers[kind])
    lines = from_sources(monkeypatch, tmp_path / "data", first, serve(send(archive, ranges=True)))
    expected = {
        "closed": "refused",
        "wrong bytes": "md5 differs",
        "too long": "more than",
        "404": "404",
    }
    assert expected.get(kind, "ended after 1,000 of") in lines[1] and "127.0.0.1" in lines[1]


def test_a_stalled_source_is_left_and_the_next_goes_on_where_it_stopped(
    archive, serve, tmp_path, monkeypatch
):
    ranges: list[str] = []

    def rest(request):
        ranges.append(request.headers["Range"])
        send(archive, ranges=True)(request)

    stalled = serve(send(archive, until=5000, pause=2))
    start = time.monotonic()
    from_sources(monkeypatch, tmp_path / "data", stalled, serve(rest))
    assert ranges == ["bytes=5000-"] and time.monotonic() - start < 1.5


def test_a_slow_source_is_left_for_a_fast_one(archive, serve, tmp_path, monkeypatch):
    slow = serve(drip(archive, []))
    lines = from_sources(monkeypatch, tmp_path / "data", slow, serve(send(archive)))
    assert re.search(r"127.0.0.1: \d+ kB/s", lines[1])


def test_where_all_are_slow_the_fastest_is_taken_in_the_end(archive, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SLOW", 10**9)
    monkeypatch.setattr(download, "WINDOW", 0.05)
    requests: list[str] = []

    def steady(request):  # a second for all of it
        requests.append("steady")
        request.send_response(200)
        request.end_headers()
        for i in range(0, len(archive), len(archive) // 10):
            request.wfile.write(archive[i : i + len(archive) // 10])
            time.sleep(0.04)

    from_sources(monkeypatch, tmp_path / "data", serve(drip(archive, requests)), serve(steady))
    assert requests == ["", "steady", "steady"]


def test_bytes_of_another_archive_are_not_gone_on_with(archive, serve, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f".{CIFAR10.filename}.part").write_bytes(b"another archive's beginning")
    from_sources(monkeypatch, tmp_path / "data", serve(send(archive, ranges=True)))


def test_a_redirect_is_followed_with_the_range(archive, serve, tmp_path, monkeypatch):
    target = serve(send(archive, ranges=True))

    def redirect(request):
        request.send_response(302)
        request.send_header("Location", f"{target}/elsewhere")
        request.end_headers()

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f".{CIFAR10.filename}.part").write_bytes(archive[:777])
    from_sources(monkeypatch, tmp_path / "data", serve(redirect))


def test_what_came_outlives_a_failure_and_the_next_call_goes_on(
    archive, serve, tmp_path, monkeypatch
):
    monkeypatch.setattr(download, "SOURCES", (serve(send(archive, until=5000)),))
    with pytest.raises(InputError, match=r"could not be downloaded \(127.0.0.1: it ended after"):
        download_cifar10(tmp_path / "data", log=str)
    assert not (tmp_path / "data" / FOLDER).exists()
    ranges: list[str] = []

    def rest(request):
        ranges.append(request.headers["Range"])
        send(archive, ranges=True)(request)

    from_sources(monkeypatch, tmp_path / "data", serve(rest))
    assert ranges == ["bytes=5000-"]


def test_the_time_limit_holds_and_the_message_is_one_line(archive, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SLOW", 0)
    monkeypatch.setattr(download, "SOURCES", (serve(drip(archive, [])),))
    start = time.monotonic()
    with pytest.raises(InputError, match="the time is over.*CIFAR10_ROOT") as error:
        download_cifar10(tmp_path / "data", give_up_after=0.5, log=str)
    assert time.monotonic() - start < 2 and "\n" not in str(error.value)


def test_the_archive_can_be_kept_elsewhere_and_serves_the_next_machine(
    archive, serve, tmp_path, monkeypatch
):
    drive = tmp_path / "drive"
    from_sources(monkeypatch, tmp_path / "one", serve(send(archive)), archives=drive)
    assert (drive / CIFAR10.filename).read_bytes() == archive
    from_sources(monkeypatch, tmp_path / "two", archives=drive)


def test_two_processes_download_once(archive, serve, tmp_path, monkeypatch):
    requests: list[str] = []

    def answer(request):
        requests.append(request.path)
        time.sleep(0.2)
        send(archive)(request)

    monkeypatch.setattr(download, "SOURCES", (serve(answer),))
    calls = [
        threading.Thread(target=download_cifar10, args=(tmp_path / "data",), kwargs={"log": str})
        for _ in range(2)
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join(10)
    assert len(requests) == 1 and (tmp_path / "data" / FOLDER).is_dir()


@pytest.mark.parametrize(
    "mirror", ["example.org/cifar", "file:///folder", "http://user:secret@host", "http://"]
)
def test_a_mirror_that_is_no_address_is_refused_without_its_password(mirror, tmp_path, monkeypatch):
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
    monkeypatch.setenv("CIFAR10_MIRROR", mirror)
    with pytest.raises(InputError, match="CIFAR10_MIRROR: expected http") as error:
        load_cifar10(home=tmp_path / "data")
    assert "secret" not in str(error.value)


def test_a_place_that_can_not_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't write CIFAR-10 into"):
        download_cifar10(tmp_path / "file" / "data")
