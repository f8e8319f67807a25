"""Programs forked from one process that has imported everything, since importing takes longer than most of what runs.

What is forked is the real program: its own arguments, environment, output and exit code, and signals reach it.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.conftest import ROOT

IMPORTED = ["pipeline.train", "mlflow.tracking", "mlflow.store.tracking.sqlalchemy_store"]
"""In this order: `pipeline.train` imports DeepSpeed without MLflow, and MLflow imports the store when it is used."""


class Fork:
    """A process, as `subprocess.Popen` shows one."""

    def __init__(self, process: BaseProcess, arguments: list[str]) -> None:
        assert process.pid
        self.process, self.args, self.pid = process, arguments, process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Exit code, or minus the signal that ended it.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(arguments: list[str], environment: dict[str, str], output: Path, errors: Path | None = None) -> Fork:
    """`python ARGUMENTS` (`-m MODULE …` or a file) in the root of the project, its output in a file, errors too."""
    process = _forks().Process(target=_program, args=(arguments, environment, output, errors or output))
    process.start()
    return Fork(process, arguments)


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The same, to its end, with output and errors apart."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        code = start(arguments, environment, output, errors).wait()
        return subprocess.CompletedProcess(arguments, code, output.read_text(), errors.read_text())


@cache
def _forks() -> ForkServerContext:
    """The process that is forked is started with the environment that libraries read when they are imported."""
    from multiprocessing import forkserver

    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([*IMPORTED, __name__])
    before = dict(os.environ)
    os.environ.update(
        {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    )
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return forks


def _program(arguments: list[str], environment: dict[str, str], output: Path, errors: Path) -> None:
    gc.freeze()  # what is imported stays: DeepSpeed collects garbage often, and would look through all of it
    for path in (output, errors):
        path.write_bytes(b"")
    for path, number in ((output, 1), (errors, 2)):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
