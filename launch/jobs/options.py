"""Options of a job beside its run file: the hosts, the way to reach them, the request to Slurm."""

import re
from dataclasses import dataclass, field

from data_prep.errors import UserError


@dataclass(frozen=True)
class HostChoice:
    """The hosts of a hostfile that take part.

    Attributes:
        include: only these, joined by commas.
        exclude: all but these.
        min_nodes: how few may go on when others are gone; all of them when None.
    """

    include: str = ""
    exclude: str = ""
    min_nodes: int | None = None


@dataclass(frozen=True)
class Reach:
    """The way to the hosts of a job, and the variables handed to them.

    Attributes:
        ssh: options for ssh, for example `-p 2222 -i ~/.ssh/cluster`.
        master_addr: address of the first host; asked of it when empty.
        master_port: its port; chosen when None.
        interface: network interface of the collectives; found on each node when empty.
        env: environment variables to hand on beside those that every job hands on.
    """

    ssh: str = ""
    master_addr: str = ""
    master_port: int | None = None
    interface: str = ""
    env: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Allocation:
    """The request to Slurm.

    Attributes:
        nodes: a number, or MIN-MAX.
        time: limit of one start, as sbatch takes it (`24:00:00`); the partition's when empty.
        turns: 0 lets Slurm put the job back into the queue. N > 0 submits an array of N jobs that run one after
            another, each going on where the one before stopped, for queues that forbid it.
        sbatch: any other options of sbatch, such as `--gpus-per-node=8`; they win over ours.
    """

    nodes: str = "1"
    ranks_per_node: int = 1
    time: str = ""
    partition: str = ""
    turns: int = 0
    sbatch: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        problems = []
        if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", self.nodes):
            problems.append(f"--nodes {self.nodes}: give a number, or MIN-MAX")
        problems += [
            f"--sbatch {option}: write it as sbatch takes it, such as --sbatch=--account=physics"
            for option in self.sbatch
            if not option.startswith("-") or "\n" in option
        ]
        if problems:
            raise UserError(problems)
