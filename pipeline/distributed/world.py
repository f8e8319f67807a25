"""Ranks: start, agreement, shutdown."""

import gc
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import ops
from deepspeed.accelerator import get_accelerator

from data_prep.errors import UserError


class SharedUserError(UserError):
    """Raised on every rank with the same lines, so that one rank prints them."""


@dataclass(frozen=True)
class World:
    """This process among all others. `control` is a gloo group for flags and small objects on the CPU."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, item: Any) -> list[Any]:
        """Every rank's item, in order of rank, on every rank."""
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.control)
        return items

    def broadcast(self, item: Any) -> Any:
        """Rank 0's item, on every rank."""
        items = [item]
        dist.broadcast_object_list(items, src=0, group=self.control)
        return items[0]

    def agree(self, values: Mapping[str, float]) -> dict[str, float]:
        """The largest value over all ranks under each name; a flag is 0 or 1.

        One small all-reduce on the CPU: cheap enough for every micro-step. All ranks pass the same names in the
        same order.
        """
        largest = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.control)
        return dict(zip(values, largest.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """True on every rank if it is on one."""
        return self.agree({"flag": float(flag)})["flag"] > 0

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def raise_together(self, problems: Sequence[str]) -> None:
        """Raises on every rank, with the problems of all.

        Raises:
            UserError: where one rank or more passed a problem; those not seen by all name their rank.
        """
        by_rank = self.gather(list(problems))
        merged: dict[str, list[int]] = {}
        for rank, lines in enumerate(by_rank):
            for line in lines:
                merged.setdefault(line, []).append(rank)
        if merged:
            raise SharedUserError(
                [
                    line if len(ranks) == self.size else f"{line} [rank {', '.join(map(str, ranks))}]"
                    for line, ranks in merged.items()
                ]
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """A UserError inside, on any rank, is raised on every rank. No collective may stand inside."""
        problems: list[str] = []
        try:
            yield
        except UserError as error:
            problems = error.problems
        self.raise_together(problems)


def start() -> World:
    """Join the process group. Without a launcher's environment this is a world of one."""
    if "WORLD_SIZE" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    accelerator = get_accelerator()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    name = accelerator.device_name()
    if name == "cpu":
        # Collectives for inference, which training never calls: the first start would compile them for a minute, and
        # every rank would leave 69 MB in /dev/shm.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    if name != "cpu":
        accelerator.set_device(local_rank)
    return World(
        rank=dist.get_rank(),
        local_rank=local_rank,
        size=dist.get_world_size(),
        device=torch.device(name if name == "cpu" else f"{name}:{local_rank}"),
        control=None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo"),
    )


def outlast(timeout_seconds: float) -> None:
    """Let no collective operation give up earlier: it could only say that somebody is missing, not who."""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)


def shutdown() -> None:
    """Leave the process group; a ZeRO-3 process that does not may abort after its work is done.

    Engines that only reference cycles still hold go first: collected after the group, they abort the process.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
