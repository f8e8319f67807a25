"""Losses averaged over micro-batches and ranks, time by phase, throughput."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


class LossMeter:
    """Means over micro-batches and ranks; sums stay on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, language_loss: torch.Tensor, diversity_loss: torch.Tensor) -> None:
        one = torch.ones((), dtype=torch.float64, device=self.sums.device)
        self.sums += torch.stack([language_loss.detach().double(), diversity_loss.detach().double(), one])

    def read(self) -> dict[str, float]:
        """Means since the last read, over all ranks; a collective."""
        sums = self.sums.clone()
        dist.all_reduce(sums)
        self.sums.zero_()
        language, diversity, count = sums.tolist()
        return {"train/language_loss": language / count, "train/diversity_loss": diversity / count}


class Clock:
    """Seconds by phase, over all starts of a run: training is not charged for saving."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds = {"training": 0.0, "evaluation": 0.0, "saving": 0.0, **(seconds or {})}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


class Throughput:
    """Tokens per training second between two readings."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.tokens, self.mark = clock, 0, clock.seconds["training"]

    def read(self) -> float:
        now = self.clock.seconds["training"]
        rate = self.tokens / max(now - self.mark, 1e-9)
        self.tokens, self.mark = 0, now
        return rate


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 10 min, 4 d 3 h."""
    whole = round(seconds)
    for unit, size, lower, lower_size in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // lower_size:02d} {lower}"
    return f"{whole} s"
