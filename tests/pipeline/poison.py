"""Global batches that do harm: their losses or gradients are changed as they pass, so that no product code has to know.

The harm hangs on the samples, not on the step: it is the same whenever they are read, and gone where they are left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np

from pipeline.health.guard import Guard


@dataclass(frozen=True)
class Poison:
    """
    Attributes:
        batches: global batches, each with what it does: `nan loss`; `inf loss`, whose gradients stay finite;
            `inf gradient`, with finite losses; `spike`, losses and gradients fifty times as large.
        rank, micro_batch: whose part of the global batch it is; a spike is on every rank and micro-batch.
        times: how often each does it; a transient fault where it is 1.
    """

    batches: dict[str, str]
    rank: int = 1
    micro_batch: int = 1
    times: int = 1_000_000


@contextmanager
def poisoned(poison: Poison) -> Iterator[None]:
    """Every guard that is built meanwhile watches a poisoned model."""

    def build(*arguments: Any, **named: Any) -> Guard:
        guard = Guard(*arguments, **named)
        _inject(guard, poison)
        return guard

    with mock.patch("pipeline.build.Guard", build):
        yield


def _inject(guard: Guard, poison: Poison) -> None:
    harm: dict[bytes, str] = {}
    layout, source = guard.context.layout, guard.context.source
    for batch, what in poison.batches.items():
        for micro_batch in range(layout.gradient_accumulation_steps):
            if what == "spike" or (guard.world.rank, micro_batch) == (poison.rank, poison.micro_batch):
                start = layout.position(int(batch), micro_batch, guard.world.rank, 0)
                rows = source.read(source.sample_indices(np.arange(start, start + 1)))
                harm[rows[0, :-1].tobytes()] = what
    done: dict[bytes, int] = {}
    factor = [1.0]

    def after_forward(module: Any, arguments: Any, named: Any, output: Any) -> Any:
        key = named["input_ids"][0].numpy().tobytes()
        what = harm.get(key) if done.get(key, 0) < poison.times else None
        done[key] = done.get(key, 0) + 1
        factor[0] = float("inf") if what == "inf gradient" else 1.0
        if what == "nan loss":
            output.loss, output.language_loss = output.loss * float("nan"), output.language_loss * float("nan")
        elif what == "inf loss":
            output.loss, output.language_loss = output.loss + float("inf"), output.language_loss + float("inf")
        elif what == "spike":
            output.loss, output.language_loss = output.loss * 50, output.language_loss * 50
        return output

    guard.engine.module.register_forward_hook(after_forward, with_kwargs=True)
    for name, parameter in guard.engine.module.named_parameters():
        if name.endswith("layers.1.feed_forward.projection.weight") or name == "lm_head.weight":
            parameter.register_hook(lambda gradient: gradient * factor[0])
