"""Started by `doctor` on every host at once, by path: how fast the hosts talk to each other.

`python bandwidth.py RANK WORLD_SIZE MASTER_ADDRESS PORT`: over NCCL where there are GPUs, else over gloo. Rank 0 prints
one JSON object: {"backend": …, "all_reduce": rate, "pairs": [[rank, rank, rate], …]}, rates in 10^9 bits per second.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.distributed as dist

from launch.hosts import node

MESSAGE_BYTES = 32 << 20
REPEATS = 3
PARTNERS = 3
"""Hosts that each host is paired with: enough to tell a slow host from a slow partner."""
CONNECT_SECONDS = 30


def rounds(world_size: int) -> list[list[tuple[int, int]]]:
    """Pairs of ranks that talk at the same time, no rank twice in a round: the first rounds of a round robin."""
    size = world_size + world_size % 2
    made = []
    for turn in range(min(PARTNERS, size - 1)):
        circle = [size - 1, *((turn + place) % (size - 1) for place in range(size - 1))]
        pairs = [(circle[place], circle[size - 1 - place]) for place in range(size // 2)]
        made.append([(min(pair), max(pair)) for pair in pairs if max(pair) < world_size])
    return made


def gigabits(count: float, seconds: float) -> float:
    return round(8e-9 * count / seconds, 3)


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of one call, the first one (which connects) left out."""
    work()
    started = time.perf_counter()
    for _ in range(REPEATS):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / REPEATS


def main(rank: int, world_size: int, address: str, port: int) -> None:
    interface = node.interface(address)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, interface)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=CONNECT_SECONDS),
    )
    data = torch.zeros(MESSAGE_BYTES // 4, device=device)
    seconds = timed(device, lambda: dist.all_reduce(data))
    # A ring sends and receives 2 (n - 1) / n of the message at each host.
    all_reduce = gigabits(MESSAGE_BYTES * 2 * (world_size - 1) / world_size, seconds)
    mine = []
    for pairs in rounds(world_size):
        for low, high in pairs:
            if rank in (low, high):
                seconds = timed(device, partial(exchange, data, rank == low, high if rank == low else low))
                if rank == low:
                    mine.append((low, high, gigabits(2 * MESSAGE_BYTES, seconds)))
        dist.barrier()
    gathered: list[list[tuple[int, int, float]]] = [[] for _ in range(world_size)]
    dist.all_gather_object(gathered, mine)
    if rank == 0:
        measured = [pair for part in gathered for pair in part]
        print(json.dumps({"backend": dist.get_backend(), "all_reduce": all_reduce, "pairs": measured}))
    dist.destroy_process_group()


def exchange(data: torch.Tensor, first: bool, partner: int) -> None:
    """There and back again."""
    if first:
        dist.send(data, partner)
        dist.recv(data, partner)
    else:
        dist.recv(data, partner)
        dist.send(data, partner)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
