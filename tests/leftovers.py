"""What a test run leaves behind, which is nothing: no process and no file in /dev/shm, or the run fails.

A plugin of pytest, loaded by `conftest.py`. Everything that the tests start inherits a mark in its environment, and a
folder for temporary files that is theirs alone and is removed with all that killed processes have left in it.
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
PATIENCE_SECONDS = 60
"""What was told to end a moment ago may need so long."""


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # a worker inherits both from the process that started it
        return
    config.stash[SHM] = set(os.listdir(SHARED_MEMORY))
    os.environ[MARK] = uuid.uuid4().hex
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # pytest's own folders stay where they are
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}")
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="tests-")


SHM = pytest.StashKey[set[str]]()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return
    left = processes() + shared_memory(session.config.stash[SHM])
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)
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
