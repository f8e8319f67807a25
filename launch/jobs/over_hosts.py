"""A run file becomes `deepspeed` over the hosts of a hostfile, on as many of them as answer."""

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import UserError
from launch.hosts.hostfile import read_hostfile, select
from launch.hosts.ssh import Elsewhere, differences, gather_facts
from launch.jobs import environment as cluster
from launch.jobs import warm_runner
from launch.jobs.local import launch_log, local_devices
from launch.jobs.options import HostChoice, Reach
from launch.jobs.restarts import Failure, fitting_hosts
from launch.jobs.session import Ended, Launch, grace_seconds, run_session
from launch.jobs.standby import Standby
from pipeline.settings.section import counted

if TYPE_CHECKING:
    from pipeline.config import RunConfig

HOST_WAIT_SECONDS = 600.0
"""After a failure, hosts that do not answer have so long to come back."""
HOST_POLL_SECONDS = 0.5


@dataclass
class HostfileRun:
    """`deepspeed` over the hosts of a hostfile, on as many of them as answer at each start.

    Attributes:
        keep_standby: have DeepSpeed's runner for the next start ready while this one trains.
    """

    settings: "RunConfig"
    job: cluster.ClusterJob
    hosts: dict[str, int]
    master_address: str
    master_port: int
    min_nodes: int
    keep_standby: bool = False
    _standby: Standby | None = field(default=None, init=False)

    @classmethod
    def of_hostfile(
        cls,
        settings: "RunConfig",
        job: cluster.ClusterJob,
        hostfile: Path,
        choice: HostChoice,
        reach: Reach,
        keep_standby: bool = False,
    ) -> "HostfileRun":
        """
        Raises:
            UserError: the hostfile cannot be read, names no such hosts, or fewer than `choice.min_nodes`.
        """
        hosts = select(read_hostfile(hostfile), choice.include, choice.exclude)
        least = choice.min_nodes or len(hosts)
        if least > len(hosts):
            raise UserError(f"--min-nodes {least} is more than the {len(hosts)} hosts of {hostfile}")
        port = reach.master_port or cluster.DEFAULT_PORT
        return cls(settings, job, hosts, reach.master_addr, port, least, keep_standby)

    def describe(self) -> str:
        address = self.master_address or next(iter(self.hosts))
        job, files = cluster.hostfile_job(self.job, self.hosts, address, self.master_port, local_devices() == 0)
        return f"{cluster.shown(files)}\n{job}"

    def start(self, failures: list[Failure]) -> Ended:
        cluster.require_pdsh()
        facts = self.ready_hosts(bool(failures))
        hosts = {host: self.hosts[host] for host in facts}
        first = facts[next(iter(hosts))]
        address = self.master_address or master_address(next(iter(hosts)), first["addresses"])
        port = self.master_port if first["port_free"] else int(first["free_port"])
        if port != self.master_port:
            print(f"port {self.master_port} of {next(iter(hosts))} is taken; {port} is used", flush=True)
        cpu = not any(item["devices"] for item in facts.values())
        job, files = cluster.hostfile_job(self.job, hosts, address, port, cpu)
        cluster.write_files(files)
        print(f"hosts: {', '.join(f'{host} × {slots}' for host, slots in hosts.items())}", flush=True)
        environment = cluster.runner_environment(job.whole_environment())
        launch = Launch(
            job.command,
            environment,
            launch_log(self.settings),
            grace_seconds(self.settings),
            elsewhere=Elsewhere(tuple(hosts), self.job.job_id, self.job.ssh),
            when_ready=partial(self.make_standby, environment) if self.keep_standby else None,
        )
        standby, self._standby = self._standby, None
        begun = standby.process if standby and standby.go(warm_runner.order(job.command)) else None
        return run_session(launch, begun)

    def make_standby(self, environment: Mapping[str, str]) -> None:
        self._standby = Standby.of(Launch(warm_runner.COMMAND, environment))

    def close(self) -> None:
        if self._standby:
            self._standby.end()
            self._standby = None

    def ready_hosts(self, again: bool) -> dict[str, dict[str, Any]]:
        """The facts of the hosts that this start uses.

        Args:
            again: after a failure. Hosts that are away are waited for, and what one that was cut off still holds of the
                start before is ended.

        Raises:
            UserError: too few hosts answer, they do not run the same, or no number of them fits the batch.
        """
        ask = partial(gather_facts, list(self.hosts), self.master_port, self.job.ssh, self.job.job_id if again else "")
        deadline = time.monotonic() + (HOST_WAIT_SECONDS if again else 0)
        facts, unreachable = ask()
        said: set[str] = set()
        while len(facts) < self.min_nodes and time.monotonic() < deadline:
            if said != set(unreachable):
                said = set(unreachable)
                print(f"waiting for {', '.join(unreachable)} (at most {HOST_WAIT_SECONDS:.0f} s)", flush=True)
            time.sleep(HOST_POLL_SECONDS)
            facts, unreachable = ask()
        if len(facts) < self.min_nodes:
            too_few = f"{len(facts)} of {len(self.hosts)} hosts answer, {self.min_nodes} are needed (--min-nodes)"
            raise UserError([*unreachable.values(), too_few])
        for line in unreachable.values():
            print(f"left out: {line}", flush=True)
        slots = {host: self.hosts[host] for host in facts}
        training = self.settings.training
        chosen = fitting_hosts(slots, training.batch_sizes, training.micro_batch_size, self.min_nodes)
        problems = differences(facts, self.hosts)
        if not chosen:
            problems.append(
                f"training.global_batch_size ({', '.join(map(str, training.batch_sizes))}) is not divisible by "
                f"training.micro_batch_size ({training.micro_batch_size}) × {counted(sum(slots.values()), 'rank')}, "
                f"nor with fewer hosts down to {self.min_nodes}; change one of the three"
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
