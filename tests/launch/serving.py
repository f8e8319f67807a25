"""`globallocal serve` as a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from tests.conftest import ROOT


class Running:
    """A server of the tests."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process, self.address = process, address

    def post(self, body: Any = None, **more: Any) -> requests.Response:
        return requests.post(f"{self.address}/v1/completions", **({"json": body} | more), timeout=60)

    def get(self, path: str) -> requests.Response:
        return requests.get(self.address + path, timeout=60)

    def value(self, name: str) -> float:
        (line,) = re.findall(rf"^globallocal_{re.escape(name)} (\S+)$", self.get("/metrics").text, re.M)
        return float(line)

    def wait_for(self, name: str, value: float) -> None:
        until = time.monotonic() + 60
        while self.value(name) != value:
            assert time.monotonic() < until, f"{name} is {self.value(name)}, not {value}"
            time.sleep(0.05)


@contextmanager
def served(path: Path, *words: str) -> Iterator[Running]:
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", "serve", str(path), "--port", "0", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        address = process.stdout.readline().split(" ")[0]
        assert address.startswith("http://127.0.0.1:"), process.stderr.read() if process.stderr else ""
        yield Running(process, address)
    finally:
        process.kill()
        process.communicate()
