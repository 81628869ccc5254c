"""Downloads against a server on this machine: ranges, connections that are cut, and files of another content."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lightning_edge.locks import Lock
from lightning_edge.zoo.download import download

CONTENT = bytes(range(256)) * 64
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Serves `CONTENT`, and cuts the first answers after so many bytes."""

    def __init__(self) -> None:
        self.cuts: list[int] = []
        self.ranges: list[str | None] = []
        self.knows_ranges = True
        self.status = 200
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers.get("Range")
                server.ranges.append(asked)
                begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.knows_ranges else 0
                self.send_response(206 if begin else server.status)
                if begin:
                    self.send_header("Content-Range", f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}")
                self.send_header("Content-Length", str(len(CONTENT) - begin))
                self.end_headers()
                self.wfile.write(CONTENT[begin : begin + server.cuts.pop(0)] if server.cuts else CONTENT[begin:])

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/sounds.tar.gz"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def fetch(server: Server, folder: Path, size_bytes: int = len(CONTENT), digest: str = DIGEST) -> Path:
    return download(server.url, folder, size_bytes, digest, pause_s=0.0)


def test_a_cut_connection_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    server.cuts = [5000, 1]
    path = fetch(server, tmp_path / "new" / "data")
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=5000-", "bytes=5001-"]
    assert [file.name for file in path.parent.iterdir()] == ["sounds.tar.gz"]
    # A second time nothing is asked for.
    assert fetch(server, path.parent) == path
    assert len(server.ranges) == 3


def test_the_next_run_goes_on_with_what_came(server: Server, tmp_path: Path) -> None:
    server.cuts = [700, 0, 0, 0]
    with pytest.raises(OSError, match=r"700 of 16,384 bytes are there, and the next run goes on .* data\.folder"):
        fetch(server, tmp_path)
    assert (tmp_path / "sounds.tar.gz.part").read_bytes() == CONTENT[:700]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=700-"


def test_a_server_without_ranges_begins_anew(server: Server, tmp_path: Path) -> None:
    server.knows_ranges, server.cuts = False, [700]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=700-"]


@pytest.mark.parametrize(
    ("size_bytes", "digest", "message"),
    [
        (len(CONTENT), "0" * 64, "not the published 0000"),
        (len(CONTENT) - 1, DIGEST, "has 16,384 bytes, not the published 16,383"),
        (len(CONTENT) + 1, DIGEST, "has 16,384 bytes, not the published 16,385"),
    ],
)
def test_another_file_is_refused_and_not_kept(
    server: Server, tmp_path: Path, size_bytes: int, digest: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fetch(server, tmp_path, size_bytes, digest)
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_another_file_is_found_out(server: Server, tmp_path: Path) -> None:
    (tmp_path / "sounds.tar.gz.part").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="it was removed"):
        fetch(server, tmp_path)
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_a_file_that_is_not_there_is_asked_for_once(server: Server, tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(OSError, match="HTTP Error 404"):
        fetch(server, tmp_path)
    assert len(server.ranges) == 1


def test_two_processes_do_not_write_one_file(server: Server, tmp_path: Path) -> None:
    lock = Lock.take(tmp_path / "sounds.tar.gz.lock")
    assert lock is not None
    with pytest.raises(OSError, match="another process downloads"):
        fetch(server, tmp_path)
    lock.release()
