"""One job as one session of processes: it is ended whole, whatever became of its launcher.

DeepSpeed's launcher leaves workers behind when it is told to end or is killed, and reports a killed helper as
success. So a job runs in a session of its own; a stop goes to its ranks, all at once; when the launcher has
ended, for whatever reason, the rest of the session is ended too, here and on other hosts; and a guard does the
same should this very process vanish.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import psutil

import pipeline
from launch.hosts.ssh import Elsewhere
from launch.jobs.failures import Blame, blame
from launch.jobs.screen import Screen
from pipeline.exit_codes import HANG, PREEMPTED
from pipeline.redact import redact_text

if TYPE_CHECKING:
    from pipeline.config import RunConfig

TRAIN_PROGRAM = Path(pipeline.__file__).parent / "train.py"
ABANDONED_EXIT_CODE = 1
"""The launcher said 0, and left ranks running."""
FAILURE_GRACE_SECONDS = 10.0
"""Time that the ranks of other nodes have to end by themselves after one node has failed."""
CLOSING_SECONDS = 30.0
"""What a rank may need beyond its own grace: rank 0 hands over to MLflow."""
READY = re.compile(rb"(\S+: )?start   ")
"""How the line begins in which rank 0 says the seconds of its start; over hosts its host stands in front."""
LAUNCHER_SAID = re.compile(rb"\[ERROR\] \[launch\.py:.* exits with return code = (-?\d+)")
"""DeepSpeed's launcher of this machine, once its ranks have ended; that it and the one above it end takes seconds."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Launch:
    """The way a job is started and ended.

    Attributes:
        environment: the whole environment of the command.
        log: a file that gets a copy of all output.
        grace_seconds: time to save after a request to stop.
        elsewhere: the ranks on other hosts, where there are any.
        stop_signal: sent to the command itself where the ranks are not its descendants here (srun forwards it).
        echo: copy the output to ours.
        limit_seconds: the job is killed when it takes longer.
        when_ready: called once, when the ranks stand before their first step.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path | None = None
    grace_seconds: float = 150.0
    elsewhere: Elsewhere | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    echo: bool = True
    limit_seconds: float | None = None
    when_ready: Callable[[], None] | None = None


@dataclass(frozen=True)
class Ended:
    """The end of a job.

    Attributes:
        code: exit code, that of a signal as 128 + its number.
        stopped_by: the signal by which we were asked to stop it.
        blames: the failures that ranks and launchers told of, in their order.
    """

    code: int
    stopped_by: signal.Signals | None = None
    blames: tuple[Blame, ...] = ()


@dataclass
class _Watch:
    """The events of a running job, as told by signals and by its output."""

    asked: list[signal.Signals] = field(default_factory=list)
    ranks_seen: bool = False
    is_ready: bool = False
    code: int | None = None
    blames: list[Blame] = field(default_factory=list)


def grace_seconds(settings: "RunConfig") -> float:
    """Time that the ranks get to save and leave; they keep to their own part of it."""
    return settings.training.preemption_grace_seconds + CLOSING_SECONDS


def start_session(launch: Launch, stdin: int = subprocess.DEVNULL) -> "subprocess.Popen[bytes]":
    """The launcher, in a session of its own."""
    return subprocess.Popen(
        launch.command,
        env=dict(launch.environment),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run_session(launch: Launch, job: "subprocess.Popen[bytes] | None" = None) -> Ended:
    """Run a launcher in a session of its own, its output copied to ours and to the log, until all has ended.

    SIGINT, SIGTERM and SIGUSR1 to us become a request to the ranks to save and leave. What is still there after the
    grace period, or at a second signal, is killed.

    Args:
        job: where `start_session` has started it already.
    """
    job = job or start_session(launch)
    assert job.stdout is not None
    watch = _Watch()
    guard_process = _start_guard(job.pid, launch)
    copier = threading.Thread(target=_copy, args=(job.stdout, launch, watch), daemon=True)
    copier.start()
    previous = {
        number: signal.signal(number, lambda received, _: watch.asked.append(signal.Signals(received)))
        for number in STOP_SIGNALS
    }
    try:
        _wait(job, launch, watch)
    finally:
        abandoned = bool(ranks_of(job.pid))
        end_session(job.pid)
        if launch.elsewhere and (watch.asked or watch.blames or job.returncode):
            launch.elsewhere.stop(signal.SIGKILL)
        for number, handler in previous.items():
            signal.signal(number, handler)
        guard_process.kill()
        guard_process.wait()
        copier.join(timeout=5)
    code = job.returncode if job.returncode >= 0 else 128 - job.returncode
    if watch.code is not None and not launch.elsewhere:
        code = watch.code % 256
    code = code or (ABANDONED_EXIT_CODE if abandoned else 0)
    if code and watch.asked and not launch.elsewhere and not watch.ranks_seen:
        code = PREEMPTED  # no rank was there yet, and nothing is lost
    if code and any(told.is_hang for told in watch.blames):
        code = HANG  # the launcher itself may have been killed, waiting for a rank that is stopped
    return Ended(code, watch.asked[0] if watch.asked else None, tuple(watch.blames))


def _wait(job: "subprocess.Popen[bytes]", launch: Launch, watch: _Watch) -> None:
    limit = time.monotonic() + launch.limit_seconds if launch.limit_seconds else None
    deadline = None
    told: set[int] = set()
    when_ready = launch.when_ready
    while job.poll() is None:
        if when_ready and watch.is_ready and not watch.asked and not watch.blames:
            when_ready()
            when_ready = None
        if watch.asked and deadline is None:
            if launch.echo:
                patience = f"at most {launch.grace_seconds:.0f} s"
                print(f"{watch.asked[0].name}: the ranks save and stop ({patience})", flush=True)
            deadline = time.monotonic() + launch.grace_seconds
            if launch.elsewhere and not launch.elsewhere.stop(signal.SIGTERM):
                deadline = 0.0  # no rank has started
        elif watch.blames and deadline is None:
            deadline = time.monotonic() + FAILURE_GRACE_SECONDS
        if watch.asked and not launch.elsewhere:
            watch.ranks_seen |= _tell(job.pid, told, launch.stop_signal)
        over = any(moment is not None and time.monotonic() > moment for moment in (deadline, limit))
        over |= watch.code is not None and not launch.elsewhere
        insisted = [number for number in watch.asked if number != signal.SIGUSR1]  # a notice in advance, no order
        if over or len(insisted) > 1:
            end_session(job.pid, patience_seconds=0)
        time.sleep(0.1)


def _tell(session: int, told: set[int], number: signal.Signals) -> bool:
    """Signal each rank once, those that start late included; before there is one, the launcher itself.

    Returns whether there was a rank.
    """
    ranks = ranks_of(session)
    seen = bool(ranks)
    if not ranks and not told:
        with suppress(psutil.NoSuchProcess):
            ranks = [psutil.Process(session)]
    for process in ranks:
        if process.pid not in told:
            told.add(process.pid)
            _signal(process, number)
    return seen


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
    return [process for process in ranks.values() if _parent(process) not in ranks]


def end_session(session: int, patience_seconds: float = 1.0) -> None:
    """Kill what is left of a session, after a moment in which it may still end by itself."""
    deadline = time.monotonic() + patience_seconds
    while (left := session_members(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    while left:
        for process in left:
            _signal(process, signal.SIGKILL)
        time.sleep(0.05)  # no waiting through psutil: it would take our child's exit code from subprocess
        left = session_members(session)


def _parent(process: psutil.Process) -> int | None:
    with suppress(psutil.Error):
        return int(process.ppid())
    return None


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.Error):
        process.send_signal(number)


def _copy(source: BinaryIO, launch: Launch, watch: _Watch) -> None:
    """Line by line to the screen and to the log, with an eye on what it says."""
    with open(launch.log or os.devnull, "ab") as file, Screen(launch.echo) as screen:
        for line in source:
            if b"://" in line:  # whoever prints a URL, its password stays here
                line = redact_text(line.decode(errors="surrogateescape")).encode(errors="surrogateescape")
            file.write(line)
            file.flush()
            screen.show(line)
            watch.is_ready |= bool(READY.match(line))
            if said := LAUNCHER_SAID.search(line):
                watch.code = int(said[1])
            told = blame(line.decode(errors="replace"))
            if told:
                watch.blames.append(told)


def _start_guard(session: int, launch: Launch) -> "subprocess.Popen[bytes]":
    """A process that ends the job when we have vanished: its standard input is a pipe that only we hold."""
    elsewhere = launch.elsewhere.to_json() if launch.elsewhere else ""
    return subprocess.Popen(
        [sys.executable, "-m", "launch.jobs.session", str(session), str(launch.grace_seconds), elsewhere],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def guard(session: int, grace_seconds: float, elsewhere: Elsewhere | None) -> None:
    """Wait for the end of standard input; then let the job's ranks save, and kill what is left."""
    sys.stdin.buffer.read()
    if elsewhere:
        elsewhere.stop(signal.SIGTERM)
    for rank in ranks_of(session):
        _signal(rank, signal.SIGTERM)
    end_session(session, grace_seconds)
    if elsewhere:
        elsewhere.stop(signal.SIGKILL)


if __name__ == "__main__":
    guard(int(sys.argv[1]), float(sys.argv[2]), Elsewhere.from_json(sys.argv[3]) if sys.argv[3] else None)
