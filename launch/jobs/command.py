"""A command with its environment, as it is run and as it is shown."""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.errors import UserError


@dataclass(frozen=True)
class Job:
    """A command to run, and what is added to the environment of this process for it."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """The command as a shell would take it, one option per line."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " \\\n  ".join([*settings, *(shlex.quote(word) for word in self.command)])

    def whole_environment(self) -> dict[str, str]:
        """That of this process with the job's added; this Python's programs (ninja) first on the PATH."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return {**os.environ, "PATH": path, **self.environment}


def cpu_environment(ranks: int, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that ranks on a CPU need: DeepSpeed's CPU accelerator, and cores that they do not fight over."""
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
