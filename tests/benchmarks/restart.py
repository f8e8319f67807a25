"""Seconds from the SIGKILL of one of two ranks to the first step after it, under `globallocal launch --local 2`."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.conftest import ROOT

TRAINED_SECONDS = 60.0
"""Before the kill: the standby is ready by then also on a machine with other work."""
STEP = re.compile(r"step [\d,]+/")
START = re.compile(r"start +([\d.]+) s: ")


def measure(folder: Path, dataset: Path) -> dict[str, float]:
    """Two small ranks train for a minute, then one is killed."""
    words = [
        *("--local=2", "--config=launch/runs/quickstart.yaml", f"run.output_dir={folder}", "run.name=restart"),
        *(f"data.dataset={dataset}", "data.sequence_length=64", "training.max_steps=100000", "evaluation.prompts=[]"),
        *("training.global_batch_size=2", "training.micro_batch_size=1", "training.log_interval_steps=1"),
        *("checkpoint.interval_steps=20", "evaluation.interval_steps=100000", f"tracking.uri=sqlite:///{folder}/m.db"),
    ]
    job = subprocess.Popen(
        [sys.executable, "-m", "launch", "launch", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = said(job)
    start = next(float(match[1]) for _, line in lines if (match := START.match(line)))
    began = time.monotonic()
    next(moment for moment, line in lines if STEP.match(line) and moment > began + TRAINED_SECONDS)
    killed = kill_a_rank(job)
    seconds: dict[str, float] = {}
    for moment, line in lines:
        if "globallocal: " in line and "restart 1 of" in line:
            seconds["failure_judged_seconds"] = moment - killed
        if STEP.match(line) and "failure_judged_seconds" in seconds:
            seconds["first_step_again_seconds"] = moment - killed
            break
    job.send_signal(signal.SIGTERM)
    for _ in lines:
        pass
    job.wait()
    return {"start_without_a_standby_seconds": start, **seconds}


def said(job: "subprocess.Popen[str]") -> Iterator[tuple[float, str]]:
    assert job.stdout
    for line in job.stdout:
        yield time.monotonic(), line


def kill_a_rank(job: "subprocess.Popen[str]") -> float:
    """The older of the processes that are rank 1; the younger is the standby's."""
    ranks = [item for item in psutil.Process(job.pid).children(recursive=True) if "--local_rank=1" in item.cmdline()]
    oldest = min((item for item in ranks if item.cmdline()[1] == "-u"), key=lambda item: item.create_time())
    os.kill(oldest.pid, signal.SIGKILL)
    return time.monotonic()
