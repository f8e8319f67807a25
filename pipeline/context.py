"""What the parts of a run share, and what never changes while it runs."""

from dataclasses import dataclass
from typing import Any

from model.configuration_globallocal import GlobalLocalConfig
from pipeline.config import RunConfig
from pipeline.data.corpus import Corpus
from pipeline.data.loader import BatchLayout
from pipeline.data.samples import Source
from pipeline.distributed.world import World
from pipeline.settings.batches import Ranges, trained


@dataclass(frozen=True)
class RunContext:
    """The settings of a run, the ranks that train it, and what the two come to; `fitting.py` makes it.

    Attributes:
        source: the samples of the training split, in order.
        layout: how the samples of a step are shared out among the ranks.
        model: the model's configuration.
        deepspeed: the merged DeepSpeed configuration.
        steps: optimizer steps of the whole run.
        precision: fp32, bf16 or fp16; never `auto`.
        stage: of ZeRO.
        compiled: whether the model's blocks are compiled.
    """

    config: RunConfig
    world: World
    corpus: Corpus
    source: Source
    layout: BatchLayout
    model: GlobalLocalConfig
    deepspeed: dict[str, Any]
    steps: int
    precision: str
    stage: int
    compiled: bool

    @property
    def tokens_per_step(self) -> int:
        """Behind a warm-up of the batch size."""
        return self.layout.global_batch_size * self.config.data.sequence_length

    def tokens_after(self, step: int, skipped: Ranges = ()) -> int:
        """Tokens that the first `step` steps train on; `skipped`: the global batches that they leave out."""
        samples = trained(step, self.layout.global_batch_size, self.layout.warmup, skipped)
        return samples * self.config.data.sequence_length
