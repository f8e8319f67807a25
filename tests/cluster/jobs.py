"""A tiny run, started by `globallocal launch`, and how a test looks at it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import psutil

from launch.jobs import warm_runner
from tests.conftest import ROOT
from tests.pipeline.ranks import without_mlflow

STEPS = 9
SECONDS = 1200.0
"""Bound of every wait: a start takes 20 s on an idle machine, and many times that on a busy one."""
TRAIN = ROOT / "pipeline" / "train.py"
# Three hosts and two share the batch, and its micro-steps make a step long enough to be caught in the act.
RUN_FILE = """
run: {{name: tiny}}
model: {{hidden_size: 32, num_hidden_layers: 1, pool_size: 64, pool_dim: 32, router_hidden_size: 16}}
data: {{dataset: {dataset}, sequence_length: 32}}
training: {{max_steps: {steps}, global_batch_size: 24, micro_batch_size: 1, log_interval_steps: 1, precision: fp32}}
checkpoint: {{interval_steps: 3}}
evaluation: {{split: null}}
tracking: {{enabled: false}}
deepspeed: {{config: {root}/ds_configs/zero3.json}}
"""


@dataclass
class Run:
    """A run folder, and the launches that a test has started for it."""

    folder: Path
    dataset: Path
    launches: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file.write_text(RUN_FILE.format(dataset=self.dataset, root=ROOT, steps=STEPS))

    @property
    def file(self) -> Path:
        return self.folder / "tiny.yaml"

    @property
    def run_folder(self) -> Path:
        return self.folder / "runs" / "tiny"

    @property
    def output(self) -> str:
        """What the latest launch has printed."""
        return (self.folder / "out").read_text(errors="replace")

    @property
    def log(self) -> str:
        path = self.run_folder / "logs" / "launch.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def launch(self, *arguments: object, **environment: str) -> "subprocess.Popen[bytes]":
        """Start `globallocal launch` in the folder, its output in `out` there."""
        untracked = "tracking.enabled=true" not in arguments
        path = without_mlflow(self.folder / "python") if untracked else str(ROOT)
        with open(self.folder / "out", "wb") as out:
            job = subprocess.Popen(
                [sys.executable, "-m", "launch", "launch", "--config", str(self.file), *map(str, arguments)],
                cwd=self.folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.launches.append(job)
        return job

    def finish(self, expect: int = 0) -> None:
        """Wait for the latest launch, which must end by itself with this exit code."""
        try:
            code = self.launches[-1].wait(SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended after {SECONDS:.0f} s\n{self.told()}") from None
        assert code == expect, f"exit code {code}\n{self.told()}"

    def wait_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            code = self.launches[-1].poll()
            assert code is None, f"ended with exit code {code}\n{self.told()}"
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.1)

    def told(self) -> str:
        """Everything that helps to see why a test failed."""
        return f"== output\n{self.output}\n== launch.log\n{self.log[-20000:]}"

    def steps_saved(self) -> list[int]:
        return sorted(int(path.parent.name[5:]) for path in self.run_folder.glob("checkpoints/*/integrity.json"))

    def losses(self) -> dict[int, str]:
        return losses(self.log)

    def first_step_after(self, moment: float) -> tuple[int, float]:
        """(Step, its time) of the first that rank 0 has logged after a moment, in seconds since 1970."""
        log = (self.run_folder / "logs" / "rank-00000.log").read_text()
        for when, step in re.findall(rf"^(\S+ \S+) .* step (\d+)/{STEPS} ", log, flags=re.MULTILINE):
            time_of_step = datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f").timestamp()
            if time_of_step > moment:
                return int(step), time_of_step
        raise AssertionError(f"no step after {moment}\n{log}")

    def ranks(self) -> list[psutil.Process]:
        """Its training processes, on all hosts: their process namespaces are inside ours."""
        found = []
        for process in psutil.process_iter():
            said = words(process)
            if str(TRAIN) in said[:3] and str(self.file) in said:
                found.append(process)
        return found

    def warm_runners(self) -> list[psutil.Process]:
        """DeepSpeed's runners that were started before they were needed; one of them waits."""
        children = psutil.Process(self.launches[-1].pid).children()
        return [child for child in children if warm_runner.COMMAND[-1] in words(child)]

    def end(self) -> None:
        """Whatever became of the test: nothing of it goes on."""
        for job in self.launches:
            if job.poll() is None:
                job.send_signal(signal.SIGTERM)
                job.send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    job.wait(60)
                job.kill()
                job.wait()
        for rank in self.ranks():
            with suppress(psutil.Error):
                rank.kill()


def losses(text: str) -> dict[int, str]:
    """The last loss printed for each step, over all starts."""
    return {int(step): loss for step, loss in re.findall(rf"step (\d+)/{STEPS} +loss ([\d.]+)", text)}


def words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextmanager
def run_in(folder: Path, dataset: Path) -> Iterator[Run]:
    run = Run(folder, dataset)
    try:
        yield run
    finally:
        run.end()
