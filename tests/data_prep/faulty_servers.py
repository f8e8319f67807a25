"""Web and S3 servers that answer wrongly when told to."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Answers(ThreadingHTTPServer):
    """A faulty server: it serves `files`, or what the server at `behind` answers, for some requests with a fault."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes] | None = None, behind: str = "", port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Answer)
        self.files, self.behind = files or {}, behind.removeprefix("http://")
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.fault, self.left, self.meant = "none", 0.0, re.compile("")
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_: object) -> None:
        pass  # clients hang up on purpose

    @contextlib.contextmanager
    def answering(self, fault: str, left: float, meant: str = "") -> Iterator[Callable[[], float]]:
        """Inside, the next `left` requests whose line `meant` matches are answered so; gives how many there were."""
        self.fault, self.left, self.meant, self.closing = fault, left, re.compile(meant), threading.Event()
        try:
            yield lambda: left - self.left
        finally:
            self.closing.set()
            self.left = 0

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


STATUSES = (204, 304, 400, 401, 403, 404, 408, 410, 416, 418, 425, 429, 451, 500, 501, 502, 503, 504, 505)
FAULTS = ["none", *map(str, STATUSES), "cut", "empty", "half", "half, unsaid", "shifted", "ranges ignored", "too much",
          "no length", "chunked", "chunked, cut", "gzip", "longer announced", "shorter announced", "redirect",
          "redirect loop",
          "redirect to a file", "redirect nowhere", "no HEAD", "HEAD lies", "garbage", "hangs up", "stalls", "a page",
          "drips", "a bad header"]  # fmt: skip
HARMLESS = ("none", "drips")
PASSING = ("429", "500", "502", "503", "504", "cut", "hangs up", "stalls")
"""After two of these all is well again."""


class _Answer(BaseHTTPRequestHandler):
    server: Answers
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        server, line = self.server, f"{self.command} {self.path}"
        path = self.path.lstrip("/").removeprefix("moved/")
        fault = "none"
        if server.left > 0 and not self.path.startswith("/moved/") and server.meant.search(line):
            server.left -= 1
            fault = server.fault
        status, headers, body = self._asked_behind(path) if server.behind else self._from_memory(path)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if status == 200:
                self._answer(fault, body, path, headers)
            else:
                self._send(status, body, headers)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD

    def _from_memory(self, path: str) -> tuple[int, dict[str, str], bytes]:
        body = self.server.files.get(path.partition("?")[0])
        return (404, {}, b"no") if body is None else (200, {"ETag": '"1"'}, body)

    def _asked_behind(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """The whole of it: ranges are this server's affair."""
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kept = {name: value for name, value in self.headers.items() if name.lower() not in ("range", "connection")}
        asked = http.client.HTTPConnection(self.server.behind)
        asked.request("GET" if self.command == "HEAD" else self.command, f"/{path}", sent, kept)
        with contextlib.closing(asked), asked.getresponse() as answer:
            own = re.compile("content-length|connection|transfer-encoding|date|server|x-amz-checksum.*", re.I)
            headers = {name: value for name, value in answer.getheaders() if not own.fullmatch(name)}
            return answer.status, headers, answer.read()

    def _answer(self, fault: str, body: bytes, path: str, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status, sent = 200, None
        if wanted and fault != "ranges ignored":
            first, last = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1)
            if fault.startswith("half") and last > first:
                last = (first + last) // 2
            shift = 1 if fault == "shifted" and first else 0
            status, total = 206, len(body)
            body = body[first - shift : last + 1 - shift]
            headers["Content-Range"] = f"bytes {first - shift}-{last - shift}/{total}"
            if fault in ("half, unsaid", "too much"):
                del headers["Content-Range"]
        elif fault.startswith("half"):
            sent = len(body) // 2
        length: int | None = len(body)
        if fault.isdigit():
            status, body, length = int(fault), b"", 0
        elif fault in ("cut", "chunked, cut"):
            sent = len(body) // 2
        elif fault == "empty":
            sent = 0
        elif fault == "too much":
            body, length = body + b"more", len(body) + 4
        elif fault in ("no length", "chunked", "chunked, cut"):
            length = None
        elif fault == "gzip":
            body = gzip.compress(body)
            length, headers["Content-Encoding"] = len(body), "gzip"
        elif fault in ("longer announced", "HEAD lies"):
            length = len(body) + 1000
        elif fault == "shorter announced":
            length = len(body) // 2
        elif fault.startswith("redirect"):
            places = {
                "redirect": f"/moved/{path}",
                "redirect loop": f"/{path}",
                "redirect to a file": "file:///etc/passwd",
            }
            status, body, length = 302, b"", 0
            headers["Location"] = places.get(fault, "http://127.0.0.1:9/nowhere")
        elif fault == "no HEAD" and self.command == "HEAD":
            status, body, length = 405, b"", 0
        elif fault == "garbage":
            self.wfile.write(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
            self.close_connection = True
            return
        elif fault == "hangs up":
            self.close_connection = True
            return
        elif fault == "stalls":
            self.server.closing.wait(30)
            return
        elif fault == "a page":
            body = b"<html>Please log in</html>"
            length = len(body)
        elif fault == "a bad header":
            headers["Content-Length"], length = "many", None
        self._send(status, body, headers, length, sent, fault.startswith("chunked"), fault == "drips")

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = -1,
        sent: int | None = None, chunked: bool = False, drip: bool = False,
    ) -> None:  # fmt: skip
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length == -1 else length))
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        body = body if sent is None else body[:sent]
        if self.command == "HEAD":
            return
        if chunked:
            self.wfile.write(f"{len(body):x}\r\n".encode() + body + b"\r\n")
            self.wfile.write(b"0\r\n\r\n" if sent is None else b"")
        elif drip:
            for start in range(0, len(body), max(1, len(body) // 20)):
                self.wfile.write(body[start : start + max(1, len(body) // 20)])
                time.sleep(0.005)
        else:
            self.wfile.write(body)
        if length != len(body) or chunked:
            self.close_connection = True


@contextlib.contextmanager
def http_server(files: dict[str, bytes]) -> Iterator[tuple[Answers, str]]:
    with Answers(files) as server:
        yield server, server.url


@contextlib.contextmanager
def s3_server(files: dict[str, bytes]) -> Iterator[tuple[Answers, str]]:
    """Faults before moto's server."""
    import s3fs
    from moto.server import ThreadedMotoServer

    behind = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    behind.start()
    before = dict(os.environ)
    try:
        with Answers(behind="http://127.0.0.1:{1}".format(*behind.get_host_and_port())) as server:
            os.environ |= {"AWS_ENDPOINT_URL": server.url, "AWS_DEFAULT_REGION": "us-east-1"}
            os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
            s3fs.S3FileSystem.clear_instance_cache()
            system = s3fs.S3FileSystem()
            system.makedirs("data", exist_ok=True)  # moto keeps what a process has put there
            for name, content in files.items():
                system.pipe_file(f"data/{name}", content)
            yield server, "s3://data"
    finally:
        os.environ.clear()
        os.environ.update(before)
        s3fs.S3FileSystem.clear_instance_cache()
        behind.stop()
