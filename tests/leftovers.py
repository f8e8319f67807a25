"""What a test run leaves behind, which is nothing: no process, no file in /dev/shm, none among temporary files.

A plugin of pytest, loaded by `conftest.py`. Everything that the tests start inherits a mark in its environment, and a
folder for temporary files that is theirs alone.
"""

import os
import shutil
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pipeline.distributed.shared_memory import NAME

MARK = "GLOBALLOCAL_TESTS"
SHARED_MEMORY = Path("/dev/shm")
OF_THE_KILLED = ("pymp-", "ray")
"""Temporary folders of multiprocessing and of Ray, which a process that a test kills cannot remove."""
PATIENCE_SECONDS = 20
"""What was told to end a moment ago may need so long."""


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # a worker inherits both from the process that started it
        return
    config.stash[SHM] = set(os.listdir(SHARED_MEMORY))
    os.environ[MARK] = uuid.uuid4().hex
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # pytest's own folders stay where they are
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="tests-")


SHM = pytest.StashKey[set[str]]()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return
    left = processes() + shared_memory(session.config.stash[SHM]) + temporary_files()
    if left:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter:
            reporter.section("left behind by the tests", red=True)
            reporter.write("".join(f"{line}\n" for line in left))
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def processes() -> list[str]:
    """Living ones with this run's mark; they are killed."""
    own = {process.pid for process in (psutil.Process(), *psutil.Process().parents())}
    marked = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid not in own and process.environ().get(MARK) == os.environ[MARK]:
                marked.append(process)
    _, alive = psutil.wait_procs(marked, timeout=PATIENCE_SECONDS)
    left = []
    for process in alive:
        with suppress(psutil.Error):
            left.append(f"process {process.pid}: {' '.join(process.cmdline())[:300]}")
            process.kill()
    return left


def shared_memory(before: set[str]) -> list[str]:
    """New names in /dev/shm. Ranks that were killed on their first steps leave DeepSpeed's buffers: they go here."""
    new = [SHARED_MEMORY / name for name in sorted(set(os.listdir(SHARED_MEMORY)) - before)]
    for path in new:
        if path.name.startswith(NAME):
            path.unlink(missing_ok=True)
    return [str(path) for path in new if not path.name.startswith(NAME)]


def temporary_files() -> list[str]:
    """What lies in the tests' folder for temporary files, which is removed."""
    folder = Path(os.environ["TMPDIR"])
    left = [str(path) for path in sorted(folder.iterdir()) if not path.name.startswith(OF_THE_KILLED)]
    shutil.rmtree(folder, ignore_errors=True)
    return left
