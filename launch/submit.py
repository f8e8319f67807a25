"""A run file becomes the exact command that DeepSpeed's launcher is started with, here or over a hostfile."""

import os
import secrets
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from data_prep.errors import UserError
from launch import cluster, node
from launch.hostfile import read_hostfile, select
from launch.hosts import Elsewhere, differences, gather_facts
from launch.processes import TRAIN_PROGRAM, Ended, Launch, grace_seconds, run_session
from launch.restarts import Failure, fitting_hosts, run_with_restarts
from launch.settle import failed_for_good, settle
from launch.shell import Job, cpu_environment, deepspeed_program

if TYPE_CHECKING:
    from pipeline.config import RunConfig

HOST_WAIT_SECONDS = 600.0
"""After a failure, hosts that do not answer have so long to come back."""
HOST_POLL_SECONDS = 2.0
CPU_RANKS = 2
"""Ranks started on a machine without accelerators, where it has the cores."""


class Run(Protocol):
    """A way to run a job."""

    settings: "RunConfig"

    def describe(self) -> str:
        """What would run, as a shell would take it; nothing is started, written or asked of another host."""

    def start(self, failures: list[Failure]) -> Ended:
        """Run it once, to its end."""


def run(job: Run, max_restarts: int) -> int:
    """Run a job and start it again as `restarts.judge` allows; returns the exit code."""
    settings, folder = job.settings, job.settings.run_folder
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    code = run_with_restarts(job.start, folder, max_restarts)
    if failed_for_good(code):
        settle(settings, folder)
    return code


@dataclass
class LocalRun:
    """`deepspeed` on this machine: a rank for each device, or `processes` of them; on CPU cores without any."""

    config: Path
    overrides: tuple[str, ...]
    settings: "RunConfig"
    processes: int | None = None
    port: int | None = None
    job_id: str = field(default_factory=lambda: secrets.token_hex(8))

    def describe(self) -> str:
        return str(self.job(self.port or cluster.DEFAULT_PORT))

    def start(self, failures: list[Failure]) -> Ended:
        job = self.job(self.port if self.port and node.port_is_free(self.port) else node.free_port())
        environment = {**job.whole_environment(), node.JOB_VARIABLE: self.job_id}
        return run_session(Launch(job.command, environment, launch_log(self.settings), grace_seconds(self.settings)))

    def job(self, port: int) -> Job:
        """
        Raises:
            UserError: more processes than devices.
        """
        devices = local_devices()
        if self.processes and devices and self.processes > devices:
            raise UserError(f"{self.processes} processes, but this machine has {devices} devices; ask for fewer")
        ranks = self.processes or default_ranks()
        command = [
            str(deepspeed_program()),
            "--log_level=error",  # the log gets which rank failed, and how
            "--hostfile=none",  # DeepSpeed takes /job/hostfile, should there be one
            f"--num_accelerators={ranks}",
            f"--master_port={port}",
            str(TRAIN_PROGRAM),
            "--config",
            str(self.config),
            *self.overrides,
        ]
        return Job(command, {} if devices else cpu_environment(ranks))


def local_devices() -> int:
    """Accelerators that torch sees on this machine; 0 where DeepSpeed is to use the CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


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


@dataclass
class HostfileRun:
    """`deepspeed` over the hosts of a hostfile, on as many of them as answer at each start."""

    settings: "RunConfig"
    job: cluster.ClusterJob
    hosts: dict[str, int]
    master_address: str
    master_port: int
    min_nodes: int

    @classmethod
    def from_options(
        cls,
        config: Path,
        overrides: tuple[str, ...],
        settings: "RunConfig",
        *,
        hostfile: Path,
        include: str,
        exclude: str,
        ssh: str,
        master_address: str,
        master_port: int,
        interface: str,
        names: tuple[str, ...],
        min_nodes: int | None,
    ) -> "HostfileRun":
        hosts = select(read_hostfile(hostfile), include, exclude)
        if min_nodes and min_nodes > len(hosts):
            raise UserError(f"--min-nodes {min_nodes} is more than the {len(hosts)} hosts of {hostfile}")
        job = cluster.ClusterJob(config, overrides, settings.run_folder, secrets.token_hex(8), ssh, interface, names)
        return cls(settings, job, hosts, master_address, master_port, min_nodes or len(hosts))

    def describe(self) -> str:
        address = self.master_address or next(iter(self.hosts))
        job, files = cluster.hostfile_job(self.job, self.hosts, address, self.master_port, cpu_only())
        return f"{cluster.shown(files)}\n{job}"

    def start(self, failures: list[Failure]) -> Ended:
        cluster.require_pdsh()
        facts = self.ready_hosts(HOST_WAIT_SECONDS if failures else 0)
        hosts = {host: self.hosts[host] for host in facts}
        first = facts[next(iter(hosts))]
        address = self.master_address or master_address(next(iter(hosts)), first["addresses"])
        port = self.master_port if first["port_free"] else int(first["free_port"])
        if port != self.master_port:
            print(f"port {self.master_port} of {next(iter(hosts))} is taken; {port} is used", flush=True)
        cpu = not any(item["devices"] for item in facts.values())
        job, files = cluster.hostfile_job(self.job, hosts, address, port, cpu)
        cluster.write_files(files)
        elsewhere = Elsewhere(tuple(hosts), self.job.job_id, self.job.ssh)
        if failures:
            elsewhere.stop(signal.SIGKILL)  # a host that was cut off may still hold ranks of the start before
        print(f"hosts: {', '.join(f'{host} × {slots}' for host, slots in hosts.items())}", flush=True)
        return run_session(
            Launch(
                job.command,
                cluster.runner_environment(job.whole_environment()),
                launch_log(self.settings),
                grace_seconds(self.settings),
                elsewhere=elsewhere,
            )
        )

    def ready_hosts(self, wait_seconds: float) -> dict[str, dict]:
        """The facts of the hosts that this start uses; hosts that are away are waited for.

        Raises:
            UserError: too few hosts answer, they do not run the same, or no number of them fits the batch.
        """
        deadline = time.monotonic() + wait_seconds
        facts, unreachable = gather_facts(list(self.hosts), self.master_port, self.job.ssh)
        while len(facts) < self.min_nodes and time.monotonic() < deadline:
            print(f"waiting for {', '.join(unreachable)} (at most {wait_seconds:.0f} s)", flush=True)
            time.sleep(HOST_POLL_SECONDS)
            facts, unreachable = gather_facts(list(self.hosts), self.master_port, self.job.ssh)
        if len(facts) < self.min_nodes:
            too_few = f"{len(facts)} of {len(self.hosts)} hosts answer, {self.min_nodes} are needed (--min-nodes)"
            raise UserError([*unreachable.values(), too_few])
        for line in unreachable.values():
            print(f"left out: {line}", flush=True)
        slots = {host: self.hosts[host] for host in facts}
        training = self.settings.training
        chosen = fitting_hosts(slots, training.global_batch_size, training.micro_batch_size, self.min_nodes)
        problems = differences(facts, self.hosts)
        if not chosen:
            problems.append(
                f"training.global_batch_size ({training.global_batch_size}) is not divisible by "
                f"training.micro_batch_size ({training.micro_batch_size}) × {sum(slots.values())} ranks, nor with "
                f"fewer hosts down to {self.min_nodes}; change one of the three"
            )
        if problems:
            raise UserError(problems)
        return {host: facts[host] for host in chosen}


def master_address(host: str, addresses: Mapping[str, str]) -> str:
    """The first host's address as the others see it: what its name resolves to, if it has that; else its first.

    Raises:
        UserError: it has no address but the loopback.
    """
    try:
        resolved = socket.gethostbyname(host)
    except OSError:
        resolved = ""
    if resolved in addresses and not resolved.startswith("127."):
        return resolved
    for address, interface in addresses.items():
        if not address.startswith("127.") and not interface.startswith(("docker", "virbr")):
            return address
    raise UserError(f"{host} has no address that other hosts could reach; give --master-addr")


def cpu_only() -> bool:
    return local_devices() == 0
