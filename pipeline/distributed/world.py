"""Ranks: start, agreement, shutdown."""

import gc
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import _get_build_directory

from data_prep.errors import UserError
from pipeline.distributed import shared_memory
from pipeline.distributed.stop import Stopped, StopRequest
from pipeline.files import locked


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


def start(stop: StopRequest | None = None) -> World:
    """Join the process group. Without a launcher's environment this is a world of one.

    Raises:
        Stopped: asked to stop while operators were compiled.
    """
    if "WORLD_SIZE" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    accelerator = get_accelerator()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    name = accelerator.device_name()
    if name == "cpu":
        load_operator("ShareMemCommBuilder", stop)
        if local_rank == 0:
            shared_memory.sweep()
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    if name == "cpu":
        dist.barrier()  # all have mapped all
        shared_memory.remove_own(dist.get_rank())
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


def load_operator(builder_name: str, stop: StopRequest | None = None) -> None:
    """Compile or load one of DeepSpeed's operators, one process of a node at a time.

    A process that is killed while it compiles leaves torch's lock file behind, and every later start would wait for
    it for ever. Our own lock dies with its holder; whoever holds it knows that a lock file standing there is stale.

    Raises:
        Stopped: asked to stop before it was done; compiling takes longer than many a grace.
    """
    builder = get_accelerator().create_op_builder(builder_name)
    if builder is None or not builder.is_compatible(verbose=False):
        return
    folder = Path(_get_build_directory(builder.name, verbose=False))

    def load() -> None:
        with locked(folder / ".globallocal.lock"):
            (folder / "lock").unlink(missing_ok=True)
            if stop is None or not stop.received:
                builder.load(verbose=False)

    if stop is None:
        load()
        return
    failed: list[BaseException] = []

    def load_and_tell() -> None:
        try:
            load()
        except BaseException as error:
            failed.append(error)

    worker = threading.Thread(target=load_and_tell, name="compiler", daemon=True)
    worker.start()
    while worker.is_alive() and not stop.received:
        worker.join(timeout=0.2)
    if stop.received:
        for child in psutil.Process().children(recursive=True):  # ninja and the compiler
            child.kill()
        raise Stopped
    if failed:
        raise failed[0]


def shutdown() -> None:
    """Leave the process group; a ZeRO-3 process that does not may abort after its work is done.

    Engines that only reference cycles still hold go first: collected after the group, they abort the process.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
