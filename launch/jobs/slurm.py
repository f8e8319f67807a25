"""A run file becomes a Slurm job: an sbatch script whose srun starts the ranks, and which is queued again by itself.

    sbatch job.sbatch → python -m launch.jobs.slurm_batch (first node: checks, requeues) → srun → a task per rank

The script asks Slurm for a signal before its time limit; the ranks then save and leave with exit code 75, and the
job is put back into the queue (`launch.jobs.slurm_batch`).
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import UserError
from launch.hosts import node
from launch.jobs import environment as cluster
from launch.jobs.options import Allocation
from launch.jobs.session import TRAIN_PROGRAM, grace_seconds
from pipeline.settings.shipped import find_run_file

if TYPE_CHECKING:
    from pipeline.config import RunConfig

WAIT_SECONDS = 60
"""After one rank has left in order, the others (rank 0 hands over to MLflow) have so long."""
POLL_SECONDS = 2.0
ENDED_BADLY = 1

RANK = """source {environment}
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
exec "$@\""""


@dataclass
class SlurmRun:
    """A job for sbatch."""

    settings: "RunConfig"
    job: cluster.ClusterJob
    allocation: Allocation
    max_restarts: int = 3
    master_address: str = ""

    def files(self) -> dict[Path, str]:
        """The files that are written before sbatch is called: the environment of the ranks, and the script."""
        given = {"MASTER_ADDR": self.master_address} if self.master_address else {}
        return {
            self.job.folder / cluster.ENVIRONMENT: cluster.environment_script(self.job, given),
            self.job.folder / "job.sbatch": self.script(),
        }

    def script(self) -> str:
        wanted = self.allocation
        options = [
            f"--job-name={self.settings.run.name}",
            f"--nodes={wanted.nodes}",
            f"--ntasks-per-node={wanted.ranks_per_node}",
            f"--time={wanted.time}" if wanted.time else "",
            f"--partition={wanted.partition}" if wanted.partition else "",
            f"--array=1-{wanted.turns}%1" if wanted.turns else "--requeue",
            "--open-mode=append",
            f"--output={self.log}",
            f"--signal=B:USR1@{grace_seconds(self.settings):.0f}",
            *wanted.sbatch,
        ]
        head = "".join(f"#SBATCH {option}\n" for option in options if option)
        return f"#!/bin/bash\n{head}cd {shlex.quote(str(Path.cwd()))}\n{self.command()}\n"

    def command(self) -> str:
        """The lines that the first node runs."""
        root = shlex.quote(str(node.ROOT))
        batch = [
            *(sys.executable, "-m", "launch.jobs.slurm_batch"),
            *("--run-folder", str(self.job.run_folder.absolute())),
            *("--max-restarts", str(self.max_restarts)),
            *("--grace-seconds", f"{grace_seconds(self.settings):.0f}"),
            *(("--master-addr", self.master_address) if self.master_address else ()),
        ]
        rank = RANK.format(environment=shlex.quote(str(self.job.folder / cluster.ENVIRONMENT)))
        train = [
            *(sys.executable, "-u", str(TRAIN_PROGRAM), "--config", str(find_run_file(self.job.config).absolute())),
            *self.job.overrides,
        ]
        return "\n".join(
            [
                f"export PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}",
                f"exec {shlex.join(batch)} -- \\",
                f"  srun --label --kill-on-bad-exit=0 --wait={WAIT_SECONDS} bash -c {shlex.quote(rank)} rank \\",
                f"  {shlex.join(train)}",
            ]
        )

    @property
    def log(self) -> Path:
        return self.job.run_folder.absolute() / "logs" / "launch.log"

    def describe(self) -> str:
        """The files and the command of a submission; values are hidden, and Slurm is not asked."""
        return f"{cluster.shown(self.files())}\nsbatch --parsable {shlex.quote(str(self.job.folder / 'job.sbatch'))}"

    def submit(self, wait: bool) -> int:
        """Submit it; with `wait`, print its log until it has ended. Returns the exit code.

        Raises:
            UserError: sbatch is missing, or refuses.
        """
        if shutil.which("sbatch") is None:
            raise UserError("sbatch is not installed here; type this on a login node of the cluster")
        cluster.write_files(self.files())
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.touch()
        start = self.log.stat().st_size
        done = subprocess.run(
            ["sbatch", "--parsable", str(self.job.folder / "job.sbatch")],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            lines = [line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines() if line.strip()]
            raise UserError([f"sbatch: {line}" for line in lines] or [f"sbatch ended with code {done.returncode}"])
        number = done.stdout.strip().split(";")[0]
        print(f"job {number}: log {self.log}; `scancel {number}` saves and stops it", flush=True)
        return follow(number, self.log, start) if wait else 0


def follow(number: str, log: Path, position: int) -> int:
    """Print what the log of a job gains until the job has left the queue; returns its exit code."""
    with open(log, errors="replace") as file:
        file.seek(position)
        said = ""
        while waiting := queued(number):
            sys.stdout.write(file.read())
            if waiting != said:
                print(f"job {number}: {waiting}", flush=True)
                said = waiting
            sys.stdout.flush()
            time.sleep(POLL_SECONDS)
        sys.stdout.write(file.read())
    states = dict(ends(number))
    print(f"job {number}: {', '.join(sorted(set(states.values())))}", flush=True)
    return 0 if "COMPLETED" in states.values() else ENDED_BADLY


def queued(number: str) -> str:
    """The states of a job's parts that are in the queue or run; empty when all have ended."""
    done = slurm("squeue", "--noheader", "--jobs", number, "--format", "%T %r")
    return "; ".join(sorted({line.removesuffix(" None") for line in done.splitlines() if line.strip()}))


def ends(number: str) -> Iterator[tuple[str, str]]:
    """(Job id, final state) of a job that has ended, and of each part of an array; none when Slurm forgot it."""
    for line in slurm("scontrol", "--oneliner", "show", "job", number).splitlines():
        fields = dict(item.partition("=")[::2] for item in line.split())
        if "JobState" in fields:
            yield fields["JobId"], fields["JobState"]


def slurm(*command: str) -> str:
    """Output of one of Slurm's programs; empty where it fails, for example for a job that Slurm has forgotten."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=dict(os.environ))
    return done.stdout if done.returncode == 0 else ""
