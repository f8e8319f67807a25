"""Servers that die, lie or never answer; processes that are killed. Real servers, real processes."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from data_prep.errors import UserError
from pipeline.tracking.opening import settle_run
from tests.pipeline.mlflow_server import Server
from tests.pipeline.tracking_fixtures import Config, only_run, points, start, store

__all__ = ["store"]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    server = Server(folder)
    yield server
    server.kill()


class LostAnswers:
    """Forwards to a server; the answer to the first creation of a run never comes back."""

    def __init__(self, server: Server) -> None:
        proxy = self
        self.lost = 0

        class Handler(BaseHTTPRequestHandler):
            def forward(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                request = urllib.request.Request(
                    server.uri + self.path,
                    self.rfile.read(length) if length else None,
                    {"Content-Type": self.headers.get("Content-Type", "")},
                    method=self.command,
                )
                try:
                    with urllib.request.urlopen(request, timeout=30) as answer:
                        status, body = answer.status, answer.read()
                except urllib.error.HTTPError as error:
                    status, body = error.code, error.read()
                if self.path.endswith("/runs/create") and not proxy.lost:
                    proxy.lost += 1
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_PATCH = forward

            def log_message(self, *arguments: object) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def wait_until_delivered(tracker: object) -> None:
    while tracker._shipper.undelivered_bytes:  # type: ignore[attr-defined]
        time.sleep(0.05)


def test_a_server_that_is_late_dies_and_returns_misses_nothing(server: Server, store: str, tmp_path: Path) -> None:
    said: list[str] = []
    tracker = start(server.uri, tmp_path / "run", said, params={"lr": 0.1})
    assert tracker.run_id is None
    assert "cannot be used" in said[0]
    for step in range(100):
        tracker.log_metrics({"loss": float(step)}, step)
    server.start()
    wait_until_delivered(tracker)
    run_id = tracker.run_id
    while not any("MLflow is back" in line for line in said):  # said after the last record has arrived
        time.sleep(0.05)

    server.kill()
    for step in range(100, 3_000):
        tracker.log_metrics({"loss": float(step)}, step)
    tracker.log_text("written while the server was down", "samples/a.txt")
    while not any("cannot be used" in line for line in said[2:]):
        time.sleep(0.05)
    server.start()
    assert tracker.close(deadline_seconds=300) is True, said

    run = only_run(server.store)
    assert run.info.run_id == run_id == tracker.run_id
    assert (run.info.status, run.data.params) == ("FINISHED", {"lr": "0.1"})
    assert points(server.store, run_id, "loss") == [(step, float(step)) for step in range(3_000)]
    assert next(server.artifacts.rglob("a.txt")).read_text() == "written while the server was down"


def test_an_unanswered_creation_leaves_one_run(server: Server, tmp_path: Path) -> None:
    server.start()
    proxy = LostAnswers(server)
    try:
        tracker = start(proxy.uri, tmp_path / "run", [], experiment="lost answers")
        tracker.log_metrics({"loss": 1.0}, 0)
        assert tracker.close() is True
        assert proxy.lost == 1
        # A server may also carry out a creation only after it was tried again.
        first = only_run(server.store, "lost answers")
        client = MlflowClient(server.store)
        ghost = client.create_run(
            first.info.experiment_id, tags={"globallocal.run_key": first.data.tags["globallocal.run_key"]}
        )
        path = tmp_path / "run/tracking/delivery.json"
        assert '"uncertain_create": true' in path.read_text()
        tracker = start(proxy.uri, tmp_path / "run", [], experiment="lost answers")
        assert tracker.close() is True
    finally:
        proxy.close()
    run = only_run(server.store, "lost answers")
    assert run.info.run_id == first.info.run_id
    assert run.data.metrics == {"loss": 1.0}
    assert client.get_run(ghost.info.run_id).info.lifecycle_stage == "deleted"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        held = []

        def accept() -> None:
            while True:
                try:
                    held.append(listener.accept())
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def child(uri: str, folder: Path, *arguments: object, seconds: float = 20) -> subprocess.Popen[str]:
    """It gives MLflow `seconds` at its end."""
    words = map(str, (uri, folder, *arguments, seconds))
    command = [sys.executable, "-m", "tests.pipeline.tracking_child", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder.parent)


def test_a_server_that_never_answers_blocks_neither_training_nor_exit(
    silent_server: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    # The process gives its server 3 s at the end; hanging would be for ever.
    output, _ = child(silent_server, tmp_path / "run", 0, 500, 0, "FINISHED", seconds=3).communicate(timeout=120)
    lines = output.splitlines()
    assert "cannot be used" in lines[0]
    assert "step 499" in lines
    assert re.search(r"bytes of .*spool.jsonl have not reached MLflow within 3 s; they are kept", lines[-2])
    assert lines[-1] == "delivered False"

    assert settle_run(Config(store), tmp_path / "run")
    run = only_run(store)
    assert run.info.status == "FINISHED"
    assert points(store, run.info.run_id, "loss") == [(step, step / 2) for step in range(500)]


def test_killed_and_resumed_three_times_is_one_run_without_a_doubled_step(store: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    resume_at = 0
    for kill_at in (25, 47, 90):
        with child(store, folder, resume_at, 10_000, 0.01, "FINISHED") as process:
            assert process.stdout
            for line in process.stdout:
                if line == f"step {kill_at}\n":
                    process.kill()
        assert process.returncode == -signal.SIGKILL
        assert only_run(store).info.status in ("RUNNING", "KILLED")  # nobody is left to say otherwise
        resume_at = kill_at // 10 * 10  # the last checkpoint

    assert settle_run(Config(store), folder, "FAILED", "host lost")
    run = only_run(store)
    assert (run.info.status, run.data.tags["globallocal.status"]) == ("FAILED", "host lost")

    output, _ = child(store, folder, resume_at, 120, 0, "FINISHED").communicate(timeout=120)
    assert output.endswith("delivered True\n")
    run = only_run(store)
    assert run.info.status == "FINISHED"
    assert run.data.tags["globallocal.attempts"] == "1 lost, 2 lost, 3 host lost, 4 finished"
    assert points(store, run.info.run_id, "loss") == [(step, step / 2) for step in range(120)]
    assert points(store, run.info.run_id, "gradient_norm") == [(step, 1.0) for step in range(120)]


@pytest.mark.parametrize("code", [401, 403])
def test_a_wrong_password_is_refused_before_the_first_step(code: int, tmp_path: Path) -> None:
    class Denies(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(code)

        def log_message(self, *arguments: object) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Denies)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    uri = f"http://user:hunter2@127.0.0.1:{http.server_address[1]}"
    try:
        with pytest.raises(UserError, match=r"tracking.uri http://127.0.0.1") as caught:
            start(uri, tmp_path / "run", [])
    finally:
        http.shutdown()
        http.server_close()
    assert "hunter2" not in str(caught.value)
    assert not (tmp_path / "run/tracking/spool.jsonl").exists()
