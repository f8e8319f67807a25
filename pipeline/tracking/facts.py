"""What a run is, as it says of itself at each start."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.settings.batches import Ranges, trained


@dataclass(frozen=True)
class Sizes:
    """The figures of a run that turn steps into tokens, operations and time.

    Attributes:
        tokens_per_step: behind a warm-up of the batch size.
        warmup_tokens: (steps, tokens of each) in front.
        flops_per_token: operations of training, forward and backward.
    """

    max_steps: int = 0
    tokens_per_step: int = 0
    warmup_tokens: tuple[tuple[int, int], ...] = ()
    flops_per_token: float = 0.0
    parameters: int = 0
    ranks: int = 1
    device: str = ""
    precision: str = ""
    zero_stage: int = 0

    def tokens(self, step: int, skipped: Ranges = ()) -> int:
        """That the first `step` steps train on; `skipped`: the global batches that they leave out."""
        return trained(step, self.tokens_per_step, self.warmup_tokens, skipped)


@dataclass(frozen=True)
class DatasetUse:
    """One split of one dataset that a run reads.

    Attributes:
        source: folder or URL.
        context: MLflow's word for what it is read for: training or validation.
        weight: its share of the samples.
    """

    name: str
    dataset_id: str
    source: str
    split: str = "train"
    context: str = "training"
    tokens: int = 0
    documents: int = 0
    weight: float = 1.0


@dataclass(frozen=True)
class RunFacts:
    """What `open_tracker` is told of a run.

    Attributes:
        name: MLflow's display name.
        params: flattened settings, as resolved; secrets are redacted by the tracker.
        tags: further tags; commit, command, host and versions are added by the tracker.
        texts: further artifacts, path → text, such as the resolved settings.
        model: its preset.
        about: what the description of the run says, such as {"Model": "small, 45,000,000 parameters"}.
        step: where this start begins.
    """

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, Any] = field(default_factory=dict)
    datasets: Sequence[DatasetUse] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    sizes: Sizes = field(default_factory=Sizes)
    model: str = ""
    about: Mapping[str, str] = field(default_factory=dict)
    step: int = 0

    def described(self) -> dict[str, Any]:
        """What the description of the run is made of, in the spool."""
        return {
            "max_steps": self.sizes.max_steps,
            "tokens_per_step": self.sizes.tokens_per_step,
            "warmup_tokens": self.sizes.warmup_tokens,
            "about": dict(self.about),
        }

    def started(self) -> dict[str, Any]:
        """The facts of the event that a start is, for the journal."""
        datasets = [{"name": item.name, "dataset_id": item.dataset_id, "split": item.split} for item in self.datasets]
        return {"run": self.name, "model": self.model, **asdict(self.sizes), "datasets": datasets}
