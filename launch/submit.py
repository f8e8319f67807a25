"""A run file becomes the exact command that DeepSpeed's launcher is started with, here or over a hostfile."""

import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.errors import UserError
from launch.processes import TRAIN_PROGRAM

CPU_RANKS = 2
"""Ranks started on a machine without accelerators, where it has the cores."""


@dataclass(frozen=True)
class Job:
    """What is run: a command, and what is added to the environment of this process for it."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """As a shell would take it; one setting, option or override a line."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " \\\n  ".join([*settings, shlex.join(self.command)])


def local_devices() -> int:
    """Accelerators that torch sees on this machine; 0 where DeepSpeed is to use the CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def local_job(config: Path, overrides: Sequence[str], processes: int | None = None, port: int | None = None) -> Job:
    """`deepspeed` on this machine: a rank for each device, or `processes` of them.

    Raises:
        UserError: more processes than devices.
    """
    devices = local_devices()
    if processes and devices and processes > devices:
        raise UserError(f"{processes} processes, but this machine has {devices} devices; ask for {devices} or fewer")
    ranks = processes or devices or min(CPU_RANKS, os.cpu_count() or 1)
    environment = {} if devices else cpu_environment(ranks)
    command = [
        str(deepspeed_program()),
        "--quiet",
        "--hostfile=none",  # DeepSpeed takes /job/hostfile, should there be one
        f"--num_accelerators={ranks}",
        f"--master_port={port or free_port()}",
        str(TRAIN_PROGRAM),
        "--config",
        str(config),
        *overrides,
    ]
    return Job(command, environment)


def cpu_environment(ranks: int, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What ranks on a CPU need: DeepSpeed's CPU accelerator, and cores that they do not fight over."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    return {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": given.get("OMP_NUM_THREADS", str(threads))}


def deepspeed_program() -> Path:
    """The `deepspeed` of this Python.

    Raises:
        UserError: it is not installed there.
    """
    program = Path(sys.executable).with_name("deepspeed")
    if not program.exists():
        raise UserError(f"{program}: no such file; install deepspeed into the Python that runs globallocal")
    return program


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def environment_for(job: Job) -> dict[str, str]:
    """The environment of this process with the job's added; this Python's programs (ninja) first on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, **job.environment}
