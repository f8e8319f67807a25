"""A run file becomes the exact command that DeepSpeed's launcher is started with on this machine."""

import os
import secrets
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from data_prep.errors import UserError
from launch.hosts import node
from launch.jobs import environment as cluster
from launch.jobs.closing import close
from launch.jobs.command import Job, cpu_environment, deepspeed_program
from launch.jobs.restarts import Failure, run_with_restarts
from launch.jobs.session import TRAIN_PROGRAM, Ended, Launch, grace_seconds, run_session
from launch.jobs.standby import Standby
from pipeline.distributed.turn import GO, STANDBY_VARIABLE, STARTED_VARIABLE

if TYPE_CHECKING:
    from pipeline.config import RunConfig

VISIBLE = "CUDA_VISIBLE_DEVICES"
CPU_RANKS = 2
"""Ranks started on a machine without accelerators, where it has the cores."""


class Run(Protocol):
    """A way to run a job."""

    settings: "RunConfig"

    def describe(self) -> str:
        """The command as a shell would take it; nothing is started, written or asked of another host."""

    def start(self, failures: list[Failure]) -> Ended:
        """Run it once, to its end."""

    def close(self) -> None:
        """It is not started again."""


def run(job: Run, max_restarts: int) -> int:
    """Run a job and start it again as `restarts.judge` allows; returns the exit code."""
    settings, folder = job.settings, job.settings.run_folder
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    try:
        code = run_with_restarts(job.start, folder, max_restarts)
    finally:
        job.close()
    close(settings, code)
    return code


@dataclass
class LocalRun:
    """`deepspeed` on this machine: a rank for each device, or `processes` of them; on CPU cores without any.

    Attributes:
        keep_standby: make the next start ready while this one trains.
    """

    config: Path
    overrides: tuple[str, ...]
    settings: "RunConfig"
    processes: int | None = None
    port: int | None = None
    keep_standby: bool = False
    job_id: str = field(default_factory=lambda: secrets.token_hex(8))
    _standby: Standby | None = field(default=None, init=False)

    @property
    def ranks(self) -> int:
        return self.processes or default_ranks()

    def describe(self) -> str:
        return str(self.job(self.port or cluster.DEFAULT_PORT))

    def start(self, failures: list[Failure]) -> Ended:
        standby, self._standby = self._standby, None
        if standby and standby.go(GO * self.ranks):
            return run_session(standby.launch, standby.process)
        if self.port and not node.port_is_free(self.port):
            raise UserError(
                f"--master-port {self.port} is taken on this machine; leave it out, and a free one is found"
            )
        launch = self.launch()
        return run_session(replace(launch, environment={**launch.environment, STARTED_VARIABLE: str(time.time())}))

    def launch(self) -> Launch:
        job = self.job(self.port or node.free_port())
        return Launch(
            job.command,
            {**job.whole_environment(), node.JOB_VARIABLE: self.job_id},
            launch_log(self.settings),
            grace_seconds(self.settings),
            when_ready=self.make_standby if self.keep_standby else None,
        )

    def make_standby(self) -> None:
        launch = self.launch()
        self._standby = Standby.of(replace(launch, environment={**launch.environment, STANDBY_VARIABLE: "1"}))

    def close(self) -> None:
        if self._standby:
            self._standby.end()
            self._standby = None

    def job(self, port: int) -> Job:
        """
        Raises:
            UserError: more processes than devices.
        """
        devices, ranks, visible = local_devices(), self.ranks, os.environ.get(VISIBLE)
        if problems := device_problems(ranks):
            raise UserError(problems)
        environment = {} if devices else cpu_environment(ranks)
        chosen = [f"--num_accelerators={ranks}"]
        if devices and visible:  # DeepSpeed's launcher keeps to it where it is not told a number
            if not visible.replace(",", "").isdigit():
                raise UserError(f"{VISIBLE}={visible}: DeepSpeed's launcher takes device numbers, such as 2,3")
            chosen, environment = [], {VISIBLE: ",".join(visible.split(",")[:ranks])}
        command = [
            str(deepspeed_program()),
            "--log_level=error",  # the log gets which rank failed, and how
            "--hostfile=none",  # DeepSpeed takes /job/hostfile, should there be one
            *chosen,
            f"--master_port={port}",
            str(TRAIN_PROGRAM),
            "--config",
            str(self.config),
            *self.overrides,
        ]
        return Job(command, environment)


def local_devices() -> int:
    """Accelerators that torch sees on this machine; 0 where DeepSpeed is to use the CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def device_problems(ranks: int) -> list[str]:
    """A line where more ranks are asked for than there are devices."""
    devices = local_devices()
    if not devices or ranks <= devices:
        return []
    return [f"{ranks} processes, but this machine has {devices} devices; ask for fewer"]


def choose_accelerator() -> None:
    """Spare DeepSpeed its search, and the person its warning, where there are only CPU cores."""
    if local_devices() == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def default_ranks() -> int:
    """A rank for each device; where there is none, two on the CPU's cores."""
    return local_devices() or min(CPU_RANKS, os.cpu_count() or 1)


def launch_log(settings: "RunConfig") -> Path:
    """The file that keeps everything the launcher and the ranks print."""
    return settings.run_folder / "logs" / "launch.log"
