"""A real MLflow server with its database, to be killed and started again."""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from launch.hosts.node import free_port
from tests.pipeline.tracking_fixtures import empty_store

WITHOUT_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""Its job runners outlive a server that is killed, and leave files in /dev/shm."""


class Server:
    """`mlflow server` over a SQLite store, on loopback unless told otherwise; to be killed and started again."""

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        port = free_port()
        self.uri = f"http://{address}:{port}"
        self.store = f"sqlite:///{folder}/mlflow.db"
        self.artifacts = folder / "served"
        shutil.copy(empty_store(), folder / "mlflow.db")
        self._command = [sys.executable, "-m", "mlflow", "server", "--host", address, "--port", str(port)]
        self._command += ["--workers", "1", "--backend-store-uri", self.store]
        self._command += ["--artifacts-destination", str(self.artifacts)]
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._process:
            return
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                cwd=self._log.parent,
                env=os.environ | WITHOUT_JOBS,
                start_new_session=True,
            )
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                assert self._process.poll() is None, self._log.read_text()
                time.sleep(0.1)

    def kill(self) -> None:
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
