"""Losses averaged over micro-batches and ranks, time by phase and by rank, throughput."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from pipeline.distributed.clock import Clock
from pipeline.distributed.world import World


class LossMeter:
    """Means over micro-batches and ranks; sums stay on the device until they are read.

    Attributes:
        step: of each micro-batch of the step that is being taken, float64 [2] on the device: its language and its
            diversity loss.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.step: list[torch.Tensor] = []

    @torch.no_grad()
    def add(self, language_loss: torch.Tensor, diversity_loss: torch.Tensor) -> None:
        self.step.append(torch.stack([language_loss.detach().double(), diversity_loss.detach().double()]))

    def end_step(self, taken: bool) -> None:
        """Count the step's micro-batches; or forget them, where the step was not taken."""
        if taken:
            one = torch.ones(1, dtype=torch.float64, device=self.sums.device)
            for losses in self.step:
                self.sums += torch.cat([losses, one])
        self.step = []

    def reset(self) -> None:
        self.step = []
        self.sums.zero_()

    def restore(self, by_rank: Sequence[Sequence[float]], world: World) -> None:
        """Go on with the sums that a checkpoint holds; another number of ranks gives all of them to rank 0."""
        if len(by_rank) == world.size:
            self.sums.copy_(torch.tensor(by_rank[world.rank], dtype=torch.float64))
        elif by_rank and world.is_main:
            self.sums.copy_(torch.tensor(by_rank, dtype=torch.float64).sum(0))

    def read(self) -> dict[str, float]:
        """Means since the last read, over all ranks; a collective."""
        sums = self.sums.clone()
        dist.all_reduce(sums)
        self.sums.zero_()
        language, diversity, count = sums.tolist()
        return {"train/language_loss": language / count, "train/diversity_loss": diversity / count}


class RouterMeter:
    """Health of the routers over a log interval and all ranks; stays on the device until it is read."""

    def __init__(self) -> None:
        self.parts: dict[str, torch.Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def add(self, statistics: dict[str, torch.Tensor]) -> None:
        for name in ("gate_mean", "pool_hit_rate", "pool_usage"):
            part = statistics[name].float()
            self.parts[name] = self.parts[name] + part if self.count else part.clone()
        self.count += 1

    def reset(self) -> None:
        """Begin the interval anew: what was added holds numbers that are not finite, or of steps gone back from."""
        self.count = 0

    def read(self) -> dict[str, float]:
        """Per layer the mean gate (1 is local, 0 global), and per router what a micro-batch uses of the pool (hit
        rate), and of the whole interval the entropy and the share of dead rows, which no token chose; a collective.
        """
        sums = torch.cat([self.parts[name].flatten() for name in self.parts])
        dist.all_reduce(sums)
        shapes = self.parts.values()
        pieces = sums.split([part.numel() for part in shapes])
        gate, hit_rate, usage = (piece.view_as(part) for piece, part in zip(pieces, shapes, strict=True))
        batches = self.count * dist.get_world_size()
        entropy = torch.special.entr(usage / usage.sum(dim=-1, keepdim=True).clamp_min(1e-8)).sum(dim=-1)
        dead = (usage == 0).float().mean(dim=-1)
        per_router = torch.stack([hit_rate / batches, entropy, dead], dim=-1).tolist()
        self.count = 0
        result = {}
        for layer, (mean_gate, routers) in enumerate(zip((gate / batches).tolist(), per_router, strict=True)):
            result[f"router/layer_{layer:02d}/gate_mean"] = mean_gate
            for router, values in zip(("attention", "block"), routers, strict=True):
                for name, value in zip(("hit_rate", "entropy_nats", "dead_rows"), values, strict=True):
                    result[f"router/layer_{layer:02d}/{router}_{name}"] = value
        return result


class StepTimes:
    """Each rank's seconds a step, phase by phase, between two readings: who is slow, and where."""

    PHASES = ("data", "forward", "backward", "step")

    def __init__(self, clock: Clock, step: int) -> None:
        self.clock, self.step = clock, step
        self.marks = self._seconds()

    def _seconds(self) -> list[float]:
        return [self.clock.seconds.get(name, 0.0) for name in self.PHASES]

    def read(self, step: int) -> list[float]:
        """Seconds a step in each phase since the last reading, of this rank."""
        now, steps = self._seconds(), step - self.step
        means = [(a - b) / steps for a, b in zip(now, self.marks, strict=True)]
        self.marks, self.step = now, step
        return means


def straggler(seconds: Sequence[Sequence[float]]) -> tuple[dict[str, float], str]:
    """Metrics of the ranks' step times, and a line where one rank holds up the others, else "".

    Whoever is late in one phase lets the others wait in a later one. So the slowest rank is that of the first phase
    whose spread over the ranks is at least half the largest.

    Args:
        seconds: [ranks][phases], in the order of `StepTimes.PHASES`.
    """
    totals = [sum(row) for row in seconds]
    columns = list(zip(*seconds, strict=True))
    spreads = [max(column) - min(column) for column in columns]
    phase = next(index for index, spread in enumerate(spreads) if spread >= max(spreads) / 2)
    slowest = columns[phase].index(max(columns[phase]))
    metrics = {"time/step_seconds_max": max(totals), "time/step_seconds_min": min(totals)}
    for name, column in zip(("data", "forward", "backward", "optimizer"), columns, strict=True):
        metrics[f"time/{name}_seconds_max"] = max(column)
    metrics["time/slowest_rank"] = float(slowest)
    if spreads[phase] < 0.3 * max(totals):
        return metrics, ""
    typical = sorted(columns[phase])[(len(seconds) - 1) // 2]
    name = StepTimes.PHASES[phase]
    return metrics, f"rank {slowest} is slow in {name}: {columns[phase][slowest]:.2f} s a step, others {typical:.2f} s"


class Throughput:
    """Tokens per training second between two readings."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.tokens, self.mark = clock, 0, clock.seconds["training"]

    def reset(self) -> None:
        self.tokens, self.mark = 0, self.clock.seconds["training"]

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
