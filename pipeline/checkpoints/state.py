"""Where a run stands between two steps: what a checkpoint keeps of it besides tensors and the order of the data."""

from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from pipeline.evaluation.figures import Evaluation
from pipeline.health.state import HealthState


class Origin(BaseModel):
    """The exported model whose weights a run began with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str
    sha256: dict[str, str]
    """Of each file of weights."""


@dataclass(frozen=True)
class TrainState:
    """Saving takes it, resuming and rolling back give it; the defaults are a fresh start.

    Attributes:
        step: optimizer steps taken.
        loss_sums: rank by rank, what the next logged mean of the losses already holds (`LossMeter.sums`).
        evaluation: the latest held-out measurement.
        pending_evaluation: this step's evaluation was due and is not done: a stop came before its end.
        health: what the run remembers of bad numbers, and which global batches it leaves out.
        seconds: by phase, over all starts (`Clock.seconds`).
        begun_from: None where the weights began at random.
    """

    step: int = 0
    loss_sums: list[list[float]] = field(default_factory=list)
    evaluation: Evaluation | None = None
    pending_evaluation: bool = False
    health: HealthState = field(default_factory=HealthState)
    seconds: dict[str, float] = field(default_factory=dict)
    begun_from: Origin | None = None
