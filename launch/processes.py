"""One job as one session of processes: it is ended whole, whatever became of its launcher.

DeepSpeed's launcher leaves workers behind when it is told to end or is killed, and reports a killed helper as
success. So a job runs in a session of its own; a stop goes to its ranks, all at once; when the launcher has
ended, for whatever reason, the rest of the session is ended too; and a guard does the same should this very
process vanish.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

import pipeline

TRAIN_PROGRAM = Path(pipeline.__file__).parent / "train.py"
ABANDONED_EXIT_CODE = 1
"""The launcher said 0, and left ranks running."""


@dataclass(frozen=True)
class Ended:
    """How a job ended: exit code (that of a signal as 128 + its number) and the signal that asked us to stop it."""

    code: int
    stopped_by: signal.Signals | None = None


def run_session(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path | None = None,
    grace_seconds: float = 120,
    stop_elsewhere: Callable[[signal.Signals], None] | None = None,
) -> Ended:
    """Run a launcher in a session of its own, its output copied to ours and to `log`, until all of it has ended.

    SIGINT and SIGTERM to us become SIGTERM to the ranks: they save and leave. What is still there after
    `grace_seconds`, or at a second signal, is killed. `stop_elsewhere` passes a signal to ranks on other hosts.
    """
    job = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    guard = _start_guard(job.pid, grace_seconds)
    assert job.stdout is not None
    copier = threading.Thread(target=_copy, args=(job.stdout, log), daemon=True)
    copier.start()
    asked: list[signal.Signals] = []
    previous = {number: signal.signal(number, lambda n, _: asked.append(signal.Signals(n))) for number in _STOPS}
    try:
        _wait(job, asked, grace_seconds, stop_elsewhere)
    finally:
        abandoned = bool(ranks_of(job.pid))
        end_session(job.pid)
        if stop_elsewhere and (asked or job.returncode or abandoned):
            stop_elsewhere(signal.SIGKILL)
        for number, handler in previous.items():
            signal.signal(number, handler)
        guard.terminate()
        guard.wait()
        copier.join(timeout=5)
    code = job.returncode if job.returncode >= 0 else 128 - job.returncode
    return Ended(code or (ABANDONED_EXIT_CODE if abandoned else 0), asked[0] if asked else None)


_STOPS = (signal.SIGINT, signal.SIGTERM)


def _wait(
    job: "subprocess.Popen[bytes]",
    asked: list[signal.Signals],
    grace_seconds: float,
    stop_elsewhere: Callable[[signal.Signals], None] | None,
) -> None:
    deadline = None
    told: set[int] = set()
    while job.poll() is None:
        if asked and deadline is None:
            deadline = time.monotonic() + grace_seconds
            print(f"{asked[0].name}: the ranks save and stop (at most {grace_seconds:.0f} s)", flush=True)
            if stop_elsewhere:
                stop_elsewhere(signal.SIGTERM)
        if deadline:  # ranks may still be starting
            for process in ranks_of(job.pid) or (session_members(job.pid) if not told else []):
                if process.pid not in told:
                    told.add(process.pid)
                    _signal(process, signal.SIGTERM)
        if len(asked) > 1 or (deadline and time.monotonic() > deadline):
            end_session(job.pid, patience_seconds=0)
        time.sleep(0.1)


def session_members(session: int) -> list[psutil.Process]:
    """Every living process of a session, orphans included."""
    members = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def ranks_of(session: int) -> list[psutil.Process]:
    """The training processes of a session, without what they started themselves."""
    ranks = {}
    for process in session_members(session):
        with suppress(psutil.Error):
            if str(TRAIN_PROGRAM) in process.cmdline()[:3]:  # python -u train.py; the launchers name it further on
                ranks[process.pid] = process
    return [process for process in ranks.values() if process.ppid() not in ranks]


def end_session(session: int, patience_seconds: float = 1.0) -> None:
    """Kill what is left of a session, after a moment in which it may still end by itself."""
    deadline = time.monotonic() + patience_seconds
    while (left := session_members(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    while left:
        for process in left:
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(left, timeout=1)
        left = session_members(session)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _copy(source: BinaryIO, log: Path | None) -> None:
    """Line by line to our standard output, and to the log."""
    with open(log or os.devnull, "ab") as file:
        for line in source:
            file.write(line)
            file.flush()
            with suppress(OSError, ValueError):  # our own output may be closed; the job goes on
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()


def _start_guard(session: int, grace_seconds: float) -> "subprocess.Popen[bytes]":
    """A process that ends the session when we have vanished: its standard input is a pipe that only we hold."""
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(session), str(grace_seconds)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def guard(session: int, grace_seconds: float) -> None:
    """Wait for the end of standard input; then stop the session's ranks, and kill what is left."""
    sys.stdin.buffer.read()
    for rank in ranks_of(session):
        _signal(rank, signal.SIGTERM)
    end_session(session, grace_seconds)


if __name__ == "__main__":
    guard(int(sys.argv[1]), float(sys.argv[2]))
