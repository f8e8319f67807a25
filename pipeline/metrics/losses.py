"""Losses and figures of the routers, averaged over micro-batches and ranks."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

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
        return {"loss/train": language / count, "router/diversity_loss": diversity / count}


class RouterMeter:
    """Health of the routers over a log interval and all ranks; stays on the device until it is read.

    Args:
        per_layer: read every layer's figures too, not their minimum, mean and maximum alone.
    """

    def __init__(self, per_layer: bool = False) -> None:
        self.per_layer = per_layer
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
        """Of each figure the minimum, mean and maximum over all layers and their routers; a collective.

        `gate` is the mean gate of a layer (1 is local, 0 global); `hit_rate` the part of the pool that a micro-batch
        uses; `entropy_nats` of the rows' use over the interval, `dead_rows` the part of them that no token chose.
        """
        sums = torch.cat([self.parts[name].flatten() for name in self.parts])
        dist.all_reduce(sums)
        shapes = self.parts.values()
        pieces = sums.split([part.numel() for part in shapes])
        gate, hit_rate, usage = (piece.view_as(part) for piece, part in zip(pieces, shapes, strict=True))
        batches = self.count * dist.get_world_size()
        self.count = 0
        entropy = torch.special.entr(usage / usage.sum(dim=-1, keepdim=True).clamp_min(1e-8)).sum(dim=-1)
        figures = {
            "gate": gate / batches,
            "hit_rate": hit_rate / batches,
            "entropy_nats": entropy,
            "dead_rows": (usage == 0).float().mean(dim=-1),
        }
        names, summaries = list(figures), [_minimum_mean_maximum(figure) for figure in figures.values()]
        result: dict[str, float] = {}
        for name, values in zip(names, torch.stack(summaries).tolist(), strict=True):
            result |= {f"router/{name}_{what}": value for what, value in zip(SUMMARY, values, strict=True)}
        return result | (_per_layer(figures) if self.per_layer else {})


SUMMARY = ("min", "mean", "max")


def _minimum_mean_maximum(figure: torch.Tensor) -> torch.Tensor:
    return torch.stack([figure.min(), figure.mean(), figure.max()])


def _per_layer(figures: dict[str, torch.Tensor]) -> dict[str, float]:
    """`router/layer_00/gate`, and of both routers of the layer `router/layer_00/attention_hit_rate`, …."""
    result: dict[str, float] = {}
    for name, figure in figures.items():
        for layer, values in enumerate(figure.tolist()):
            named = {name: values} if name == "gate" else _of_routers(name, values)
            result |= {f"router/layer_{layer:02d}/{key}": value for key, value in named.items()}
    return result


def _of_routers(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{router}_{name}": value for router, value in zip(("attention", "block"), values, strict=False)}
