"""Bad numbers: what a run remembers of them, and what is decided about them. Pure functions; `guard.py` acts.

Legend: a step is taken when the optimizer moves; a global batch is the samples of one step, numbered by its place in
the data (`batches.data_step`).
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise

from pydantic import BaseModel, ConfigDict

from pipeline.settings.batches import Ranges, merge_ranges

WINDOW_STEPS = 128
"""Steps that a spike is compared with; before a quarter of them are known, nothing is one."""
SMALLEST_LOSS_DEVIATION = 0.01
"""A deviation below this part of the median is taken as this: a flat curve must not make noise a spike."""
SMALLEST_NORM_DEVIATION = 1.0
"""Likewise of gradient norms, which have heavy tails: a single batch of a healthy run has a norm of fifty times the
median and leaves no trace in the loss (`tests/pipeline/healthy_curves`), since clipping takes its force away. So a norm
is a spike at the second step in a row."""
MAX_OVERFLOWS_IN_A_ROW = 40
"""fp16: halving a loss scale of 2^32 down to 1 takes 33."""


class RollBack(BaseModel):
    """A decision: from a spike back to a checkpoint, leaving out the global batches [first_batch, last_batch)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    """The step that spiked."""
    to_step: int
    """Of the checkpoint gone back to."""
    first_batch: int
    last_batch: int


class HealthState(BaseModel):
    """What the decisions depend on; part of every checkpoint, so that a resumed run decides as the unbroken one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    skipped_batches: Ranges = ()
    """Global batches that the run leaves out."""
    bad_batches: int = 0
    """Left out for a loss or gradient that was not finite."""
    bad_in_a_row: int = 0
    overflows: int = 0
    """fp16: steps without an update because the scaled gradient overflowed."""
    overflows_in_a_row: int = 0
    losses: tuple[float, ...] = ()
    """Of the latest steps, at most WINDOW_STEPS, the newest last; nats, over the global batch."""
    gradient_norms: tuple[float, ...] = ()
    """Likewise, before clipping."""
    spiking: bool = False
    """The latest step was a spike: what follows it at once is the same event."""
    roll_backs: tuple[RollBack, ...] = ()

    def applied(self) -> "HealthState":
        """After a step that moved the optimizer."""
        if not (self.bad_in_a_row or self.overflows_in_a_row):
            return self
        return self.model_copy(update={"bad_in_a_row": 0, "overflows_in_a_row": 0})

    def remembering(self, loss: float, gradient_norm: float, spiking: bool) -> "HealthState":
        """With the numbers of one more step."""
        return self.model_copy(
            update={
                "losses": (*self.losses, loss)[-WINDOW_STEPS:],
                "gradient_norms": (*self.gradient_norms, gradient_norm)[-WINDOW_STEPS:],
                "spiking": spiking,
            }
        )

    def overflowed(self) -> "HealthState":
        """After a step without an update, for fp16's loss scale."""
        return self.model_copy(
            update={"overflows": self.overflows + 1, "overflows_in_a_row": self.overflows_in_a_row + 1}
        )

    def without_batch(self, batch: int) -> "HealthState":
        """After a global batch with a number that is not finite: it is left out, the step is still to be taken."""
        return self.model_copy(
            update={
                "skipped_batches": merge_ranges([*self.skipped_batches, (batch, batch + 1)]),
                "bad_batches": self.bad_batches + 1,
                "bad_in_a_row": self.bad_in_a_row + 1,
            }
        )

    def with_decisions(self, decided: Iterable[RollBack]) -> "HealthState":
        """With every roll back that was ever decided; the same one twice is one."""
        roll_backs = tuple(dict.fromkeys([*self.roll_backs, *decided]))
        ranges = [(item.first_batch, item.last_batch) for item in roll_backs]
        return self.model_copy(
            update={
                "skipped_batches": merge_ranges([*self.skipped_batches, *ranges]),
                "roll_backs": roll_backs,
            }
        )


def robust_z_score(value: float, history: Sequence[float], smallest: float = SMALLEST_LOSS_DEVIATION) -> float:
    """How many robust standard deviations `value` lies above the median of `history`.

    The deviation is that of steps from their neighbours: 1.4826 · median |x(t) − x(t−1)| / √2, which is a normal
    distribution's standard deviation, and which neither a falling curve nor an outlier moves much (the median of
    absolute deviations as in Iglewicz and Hoaglin 1993, "How to Detect and Handle Outliers").

    Args:
        smallest: the deviation is at least this part of the |median|.
    """
    median = statistics.median(history)
    changes = [abs(after - before) for before, after in pairwise(history)]
    deviation = 1.4826 * statistics.median(changes) / math.sqrt(2)
    return (value - median) / max(deviation, smallest * abs(median), 1e-12)


def find_spike(state: HealthState, loss: float, gradient_norm: float, z_score: float | None) -> str | None:
    """What of a finite step is a spike, in words; None where nothing is, or the history is too short to tell."""
    if z_score is None or len(state.losses) < WINDOW_STEPS // 4:
        return None
    found = []
    for name, value, history, smallest in (
        ("loss", loss, state.losses, SMALLEST_LOSS_DEVIATION),
        ("gradient norm", min(gradient_norm, state.gradient_norms[-1]), state.gradient_norms, SMALLEST_NORM_DEVIATION),
    ):
        score = robust_z_score(value, history, smallest)
        if score > z_score:
            median = statistics.median(history)
            found.append(
                f"{name} {value:.4g} is {score:.0f} robust deviations above the median {median:.4g} of the last "
                f"{len(history)} steps (health.spike_z_score {z_score:g})"
            )
    return "; ".join(found) or None


def decide_roll_back(
    state: HealthState, step: int, batch: int, to_step: int, to_batch: int, max_roll_backs: int
) -> RollBack | None:
    """Which global batches to leave out after a spike; None where one checkpoint was gone back to often enough.

    The batch that spiked, the one before it, whose update may be the cause, and the one behind it; with each further
    roll back to the same checkpoint twice as many on either side, nothing before the checkpoint's own next batch.
    Leaving out the batches around a spike is what PaLM did (arXiv:2204.02311, section 5.1).

    Args:
        step, batch: the step that spiked and the global batch it read.
        to_step, to_batch: the checkpoint, and the batch that follows it.
    """
    earlier = sum(item.to_step == to_step for item in state.roll_backs)
    if earlier >= max_roll_backs:
        return None
    margin = 2**earlier
    first, last = max(to_batch, batch - margin), batch + margin + 1
    return RollBack(step=step, to_step=to_step, first_batch=first, last_batch=last)


def plain_number(value: float) -> float | str:
    """For JSON, which knows neither inf nor NaN."""
    return value if math.isfinite(value) else str(value)
