"""Seconds from a loss to the first step after it: of one of two ranks, and of one of two hosts.

The hosts are network namespaces of this machine (`tests/cluster/hosts.py`), so both starts share its cores.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from pipeline.exit_codes import PREEMPTED
from tests.cluster import hosts
from tests.conftest import ROOT

TRAINED_SECONDS = 60.0
"""Before the kill: the standby is ready by then also on a machine with other work."""
STEP = re.compile(r"step [\d,]+/")
START = re.compile(r"start +([\d.]+) s: ")
Lines = Iterator[tuple[float, str]]


def measure(folder: Path, dataset: Path) -> dict[str, float]:
    """Two small ranks train for a minute, then one is killed."""
    with launched(folder, dataset, "--local=2") as (job, lines):
        start = next(float(match[1]) for _, line in lines if (match := START.search(line)))
        train(lines, TRAINED_SECONDS)
        killed = kill_a_rank(job)
        judged = when(lines, "restart 1 of")
        again = train(lines)
    return {
        "start_without_a_standby_seconds": start,
        "failure_judged_seconds": judged - killed,
        "first_step_again_seconds": again - killed,
    }


def measure_host(folder: Path, dataset: Path) -> dict[str, Any]:
    """Two hosts with a rank each train for a minute, then one crashes, and is back as soon as it is missed."""
    if lacking := hosts.why_not():
        return {"not measured": f"{lacking[0]} is missing; {lacking[1]}"}
    if forbidden := hosts.forbidden():
        return {"not measured": forbidden}
    folder.mkdir(parents=True, exist_ok=True)
    with hosts.cluster(folder / "hosts", 2) as two, launched(folder, dataset, *two.options(2)) as (_, lines):
        when(lines, "  saved ")
        train(lines, TRAINED_SECONDS)
        crashed = time.monotonic()
        two.hosts[1].crash()
        judged = when(lines, "restart 1 of")
        two.restart(1)
        back = time.monotonic()
        begun = when(lines, "hosts: ")
        start = next(line for _, line in lines if START.search(line))
        again = train(lines)
    print(start.strip(), file=sys.stderr)
    return {
        "failure_judged_seconds": judged - crashed,
        "back_seconds": back - crashed,
        "asked_and_begun_seconds": begun - crashed,
        "first_step_again_seconds": again - crashed,
    }


@contextmanager
def launched(folder: Path, dataset: Path, *options: object) -> "Iterator[tuple[subprocess.Popen[str], Lines]]":
    """A job, and what it says, line by line; it is stopped at the end."""
    words = [
        *("--config=launch/runs/quickstart.yaml", f"run.output_dir={folder}", "run.name=restart"),
        *(f"data.dataset={dataset}", "data.sequence_length=64", "training.max_steps=100000", "evaluation.prompts=[]"),
        *("training.global_batch_size=2", "training.micro_batch_size=1", "training.log_interval_steps=1"),
        *("checkpoint.interval_steps=20", "evaluation.interval_steps=100000", f"tracking.uri=sqlite:///{folder}/m.db"),
    ]
    job = subprocess.Popen(
        [sys.executable, "-m", "launch", "launch", *map(str, options), *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = said(job)
    try:
        yield job, lines
    finally:
        job.send_signal(signal.SIGTERM)
        for _ in lines:
            pass
        job.wait()


def when(lines: Lines, words: str) -> float:
    return next(moment for moment, line in lines if words in line)


def train(lines: Lines, seconds: float = 0.0) -> float:
    """The moment of the first step done so many seconds from now."""
    begin = time.monotonic()
    return next(moment for moment, line in lines if STEP.search(line) and moment > begin + seconds)


def said(job: "subprocess.Popen[str]") -> Lines:
    """What it says until it ends, which nobody waits for: then its last words are the error's."""
    assert job.stdout
    last: deque[str] = deque(maxlen=30)
    for line in job.stdout:
        last.append(line)
        yield time.monotonic(), line
    if job.wait() not in (0, PREEMPTED):
        raise RuntimeError("".join(last))


def kill_a_rank(job: "subprocess.Popen[str]") -> float:
    """The older of the processes that are rank 1; the younger is the standby's."""
    ranks = [item for item in psutil.Process(job.pid).children(recursive=True) if "--local_rank=1" in item.cmdline()]
    oldest = min((item for item in ranks if item.cmdline()[1] == "-u"), key=lambda item: item.create_time())
    os.kill(oldest.pid, signal.SIGKILL)
    return time.monotonic()
