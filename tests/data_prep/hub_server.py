"""A server on the loopback interface that answers as the Hugging Face hub does, and as badly as it may.

It serves one repository from memory, a dataset's or a model's, and takes commits. `faults` says what goes wrong, and
how often.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Faults:
    """How many of the next requests for data fail, each in its way; `broken` lets all of them fail."""

    bad_gateway: int = 0  # 502
    cut_body: int = 0  # the connection closes in the middle of the body
    slow: int = 0  # half a second before the answer
    broken: bool = False
    forbidden: bool = False  # commits; the answer tells the token that was sent
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, name: str) -> bool:
        with self.lock:
            left = getattr(self, name)
            if left > 0:
                setattr(self, name, left - 1)
            return left > 0


class HubServer:
    """Serves `files` of `repository` at `revision`; a context manager. `kind`: datasets or models."""

    def __init__(self, repository: str, revision: str, files: dict[str, bytes], kind: str = "datasets") -> None:
        self.repository, self.revision, self.files, self.kind = repository, revision, files, kind
        self.created: list[dict[str, Any]] = []  # what repositories were asked for
        self.faults = Faults()
        self.moved: dict[str, str] = {}  # old ids
        self.requests: list[str] = []
        self._port = 0
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Starts; after a stop, on the same port."""
        hub = self

        class Handler(_Handler):
            server_hub = hub

        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> HubServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server_hub
        sent = self.rfile.read(int(self.headers.get("content-length") or 0))
        hub.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        if hub.faults.broken:
            self._send(502, b"bad gateway")
            return
        path = self.path.split("?")[0]
        for old, new in hub.moved.items():
            if re.match(rf"/(api/)?datasets/{old}(/|$)", path):
                self._send(307, b"", {"Location": hub.url + self.path.replace(f"datasets/{old}", f"datasets/{new}", 1)})
                return
        api = f"/api/{hub.kind}/{hub.repository}"
        prefix = "/datasets" if hub.kind == "datasets" else ""
        if match := re.fullmatch(f"{prefix}/{hub.repository}/resolve/[^/]+/(.*)", path):
            self._file(match[1])
        elif self.command == "POST" and self._write(path, api, sent):
            pass
        elif match := re.fullmatch(f"{api}/tree/[^/]+/?(.*)", path):
            self._json(self._entries(match[1]))
        elif re.fullmatch(f"{api}/paths-info/.*", path):
            wanted = json.loads(sent)["paths"] if sent.startswith(b"{") else re.findall(r"paths=([^&]+)", sent.decode())
            self._json([entry for name in wanted for entry in self._info(name.replace("%2F", "/"))])
        elif path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name} for name in hub.files]
            self._json({"id": hub.repository, "sha": hub.revision, "siblings": siblings, "private": False})
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _write(self, path: str, api: str, sent: bytes) -> bool:
        """A repository made, or a commit with all content in it: what `upload_folder` asks for."""
        hub = self.server_hub
        if path == "/api/repos/create":
            hub.created.append(json.loads(sent))
            self._json({"url": f"{hub.url}/{hub.repository}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path.startswith(f"{api}/preupload/"):
            asked = json.loads(sent)["files"]
            self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]})
        elif path.startswith(f"{api}/commit/") and hub.faults.forbidden:
            said = f"{self.headers['Authorization']} may not write here"
            self._send(403, json.dumps({"error": said}).encode(), {"X-Error-Message": said})
        elif path.startswith(f"{api}/commit/"):
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._json({"commitUrl": f"{hub.url}/{hub.repository}/commit/1", "commitOid": hub.revision})
        else:
            return False
        return True

    def _info(self, name: str) -> list[dict[str, Any]]:
        files = self.server_hub.files
        if name in files:
            oid = hashlib.sha1(files[name]).hexdigest()
            return [{"type": "file", "path": name, "size": len(files[name]), "oid": oid}]
        if any(other.startswith(f"{name}/") for other in files):
            return [{"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest()}]
        return []

    def _entries(self, folder: str) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        below = [name.removeprefix(prefix) for name in self.server_hub.files if name.startswith(prefix)]
        names = {prefix + name.split("/")[0] for name in below}
        if "recursive=true" in self.path.lower():
            names |= {prefix + name for name in below}
        return [entry for name in sorted(names) for entry in self._info(name)]

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str) -> None:
        hub = self.server_hub
        if name not in hub.files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = hub.files[name]
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": hub.revision,
            "Accept-Ranges": "bytes",
        }
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {begin}-{min(end, len(content) - 1)}/{len(content)}"
            content, status = content[begin : end + 1], 206
        if self.command == "GET" and name.endswith(".parquet"):
            if hub.faults.take("slow"):
                time.sleep(0.5)
            if hub.faults.take("bad_gateway"):
                self._send(502, b"bad gateway")
                return
            if hub.faults.take("cut_body"):
                self._send(status, content, headers, len(content) // 2)
                return
        self._send(status, content, headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if cut is None else content[:cut])
        if cut is not None:
            self.close_connection = True
