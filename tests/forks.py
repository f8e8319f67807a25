"""Programs forked from one process that has imported everything, since importing takes longer than most of what runs.

What is forked is the real program: its own arguments, environment, output and exit code, and signals reach it.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.conftest import ROOT

IMPORTED = ["pipeline.train", "mlflow.tracking"]
"""In this order: `pipeline.train` imports DeepSpeed without MLflow."""


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


def start(arguments: list[str], environment: dict[str, str], output: Path) -> Fork:
    """`python ARGUMENTS` (`-m MODULE …` or a file) in the root of the project, its output in a file."""
    process = _forks().Process(target=_program, args=(arguments, environment, output))
    process.start()
    return Fork(process, arguments)


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


def _program(arguments: list[str], environment: dict[str, str], output: Path) -> None:
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
