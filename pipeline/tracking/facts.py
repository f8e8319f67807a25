"""What a run is, as it says of itself at each start."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """The figures of a run that turn steps into tokens, operations and time.

    Attributes:
        flops_per_token: operations of training, forward and backward.
    """

    max_steps: int = 0
    tokens_per_step: int = 0
    flops_per_token: float = 0.0
    parameters: int = 0
    ranks: int = 1
    device: str = ""
    precision: str = ""
    zero_stage: int = 0


@dataclass(frozen=True)
class RunFacts:
    """What `open_tracker` is told of a run.

    Attributes:
        name: MLflow's display name.
        params: flattened settings, as resolved; secrets are redacted by the tracker.
        tags: further tags; commit, command, host and versions are added by the tracker.
        datasets: `source`, `name`, `dataset_id` (sha256) and `weight` of each.
        step: where this start begins.
    """

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, Any] = field(default_factory=dict)
    datasets: Sequence[Mapping[str, str]] = ()
    sizes: Sizes = field(default_factory=Sizes)
    model: str = ""
    step: int = 0

    def started(self) -> dict[str, Any]:
        """The facts of the event that a start is, for the journal."""
        datasets = [{"name": item["name"], "dataset_id": item["dataset_id"]} for item in self.datasets]
        return {"run": self.name, "model": self.model, **asdict(self.sizes), "datasets": datasets}
