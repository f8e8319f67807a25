"""Every setting of a run, section by section, with its unit and its bounds."""

import difflib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

from data_prep.errors import UserError
from model.configuration_globallocal import GlobalLocalConfig
from pipeline.settings.batches import consumed
from pipeline.settings.section import LARGEST_SEED, LONGEST_SECONDS, MOST, Section

CATCHABLE_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP", "SIGCONT", "SIGXCPU")
"""What schedulers and people send; SIGKILL and SIGSTOP cannot be caught, and others mean a crash."""

MOST_PROFILED_STEPS = 50

DEFAULT_CACHE_FOLDER = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "globallocal"
DEFAULT_CACHE_BYTES = 64 << 30


@dataclass(frozen=True)
class Retention:
    """`checkpoint.keep_last`, `keep_every_steps` and `keep_best` of a run's settings."""

    keep_last: int = 3
    keep_every_steps: int | None = None
    keep_best: int = 0


class RunSection(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=120, examples=["quickstart"])
    """Names the run folder and the MLflow run."""
    output_dir: Path | None = None
    """Run folder; `runs/<name>` when absent."""
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    """Seeds the weights, dropout (with the rank added) and, unless `data.order_seed` is set, the sample order."""


class ModelSection(BaseModel):
    """A preset and whatever of `GlobalLocalConfig` differs from it, for example `hidden_size: 512`."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    preset: str = Field("quickstart", max_length=100)
    """One of the model presets; `globallocal estimate --help` lists them."""

    @property
    def overrides(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def build(self, **from_dataset: Any) -> GlobalLocalConfig:
        """The model's configuration; what the dataset fixes (vocabulary, special ids) is passed in, where it is known.

        Raises:
            UserError: a value that the model refuses.
        """
        try:
            end: dict[str, Any] = {"eos_token_id": 0}  # every tokenizer has one; which does not matter to sizes
            return GlobalLocalConfig.from_preset(self.preset, **end | from_dataset | self.overrides)
        except (ValueError, TypeError) as error:
            raise UserError(f"model: {error}") from None


class MixturePart(Section):
    """One dataset of a mixture."""

    dataset: str
    """Folder, or URL (s3://, https://, …), of a prepared dataset."""
    weight: float = Field(gt=0, allow_inf_nan=False)
    """Its share of the samples is this over the sum of all weights."""


class DataSection(Section):
    dataset: Annotated[
        Annotated[str, Tag("location")] | Annotated[tuple[MixturePart, ...], Tag("mixture")],
        Discriminator(lambda value: "location" if isinstance(value, str) else "mixture"),
    ] = Field(examples=["data/quickstart"])
    """Folder, or URL (s3://, https://, …), of a prepared dataset; or a mixture: a list of {dataset, weight}."""
    sequence_length: int = Field(512, ge=1, le=2**31 - 1)
    """Tokens a sample; chosen here, not when the data is prepared."""
    train_split: str = Field("train", min_length=1, max_length=100)
    order_seed: int | None = Field(None, ge=0, le=2**63 - 1)
    """Keys the permutation of samples; `run.seed` when absent."""
    window_tokens: int | None = Field(None, ge=1, le=MOST)
    """null permutes all samples of an epoch. Set it where a remote dataset is larger than the cache: samples are
    then permuted in windows of about so many tokens, of which two must fit; 2^30 mix well and need about 6 GiB."""
    cache_dir: Path | None = None
    """Where a node keeps the shards of remote datasets; `~/.cache/globallocal` when absent."""
    cache_bytes: int = Field(DEFAULT_CACHE_BYTES, ge=1, le=2**63 - 1)
    """What they may take together; the least recently used go first."""
    verify: Literal["hashes", "sizes", "none"] = "hashes"
    """What is checked of every shard before step 0, the work shared by all ranks. Shards of remote datasets are
    always hashed when they are downloaded."""

    @field_validator("dataset")
    @classmethod
    def not_empty(cls, dataset: str | tuple[MixturePart, ...]) -> str | tuple[MixturePart, ...]:
        if not dataset or (isinstance(dataset, str) and len(dataset) > 4096):
            raise ValueError("must name a folder, a URL, or at least one {dataset, weight}")
        return dataset


class OptimizerSection(Section):
    """AdamW (arXiv:1711.05101) or Muon under linear warm-up, and a schedule behind it."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` (arXiv:2502.16982) moves hidden matrices by orthogonal updates, as long as AdamW's usual ones, so that all
    else here serves both; embedding, head, router keys, gates, convolutions, norms and biases stay with AdamW."""
    learning_rate: float = Field(5e-4, gt=0, le=10)
    """The peak, reached after `warmup_steps`."""
    base_hidden_size: int | None = Field(None, ge=1, le=MOST)
    """The width at which `learning_rate` was found. In a wider model matrices over the hidden state (not embedding,
    convolution taps, norms and biases) learn more slowly, by `base_hidden_size` over its `hidden_size`, and decay as
    much; in a narrower one faster. null: one rate for all."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Of Muon's averaged gradient; `betas` and `epsilon` are AdamW's."""
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(1e-8, gt=0, le=1)
    weight_decay: float = Field(0.1, ge=0, le=10)
    """Applied to matrices only: norms, biases and scalars are exempt."""
    max_gradient_norm: float = Field(1.0, gt=0, le=1e9)
    """Gradients are scaled down to this global norm."""
    warmup_steps: int = Field(0, ge=0, le=MOST)
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """Behind the warm-up: a half cosine, a straight line, or `wsd` (warm-up, steady, decay), which holds the peak up to
    the last `decay_steps`: from any checkpoint of the steady part a run goes on to any `training.max_steps`."""
    decay_steps: int | None = Field(None, ge=1, le=MOST)
    """Of `wsd`: how many steps at the end the learning rate falls; a tenth to a fifth of the run is usual."""
    min_learning_rate_ratio: float = Field(0.1, ge=0, le=1)
    """The learning rate of the last step over the peak."""

    @field_validator("betas")
    @classmethod
    def means_that_forget(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("each must be at least 0 and below 1, such as [0.9, 0.95]")
        return betas


class WarmUpStage(Section):
    """Steps with a smaller global batch."""

    steps: int = Field(ge=1, le=MOST)
    global_batch_size: int = Field(ge=1, le=2**22)


class TrainingSection(Section):
    max_steps: int | None = Field(None, ge=1, le=MOST)
    """Optimizer steps. Set this or `max_epochs`."""
    max_epochs: float | None = Field(None, gt=0, le=1e6)
    """Passes over the train split, rounded up to whole steps (the last batch may reach into the next epoch)."""
    init_from: Path | None = None
    """An exported model whose weights a new run begins with, instead of random ones: other data, another sequence
    length, the same vocabulary and architecture. A run that goes on from a checkpoint does not look at it."""
    global_batch_size: int = Field(16, ge=1, le=2**22)
    """Samples an optimizer step, over all ranks."""
    batch_size_warmup: tuple[WarmUpStage, ...] = ()
    """The first steps have smaller global batches: a list of {steps, global_batch_size}, each larger than the one
    before, `global_batch_size` behind them all."""
    micro_batch_size: int = Field(4, ge=1, le=2**22)
    """Samples a rank holds at once; gradient_accumulation_steps = global / (micro × world size)."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """`auto`: bf16 where the hardware multiplies it, else fp32; what was chosen is printed."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the model's blocks for training. `auto`: on a GPU, at ZeRO stages 0 to 2; what was chosen is printed."""
    log_interval_steps: int = Field(10, ge=1, le=MOST)
    stop_signals: tuple[str, ...] = ("SIGTERM", "SIGUSR1", "SIGINT")
    """At one of these, on any rank, all ranks save and leave with exit code 75: start it again to go on. SIGTERM and
    SIGUSR1, which launchers send, always are."""
    preemption_grace_seconds: float = Field(90, gt=0, le=LONGEST_SECONDS)
    """From the first signal on: what cannot be finished in this time (a step, a save) is not begun."""
    max_seconds: float | None = Field(None, gt=0, le=LONGEST_SECONDS)
    """Time budget of one start; when it is spent the run leaves as if it had received a signal then."""
    hang_timeout_seconds: float = Field(1800, gt=0, le=LONGEST_SECONDS)
    """A rank that does not move for so long ends the run with exit code 76; four times as long up to its first step."""
    peak_teraflops_per_device: float | None = Field(None, gt=0, le=1_000_000, allow_inf_nan=False)
    """What MFU is a part of, in 10^12 operations per second; null: the data sheet's rate for the card's name and
    the run's precision, and no MFU where none is known."""
    profile: str | None = None
    """FIRST-LAST: these steps are traced on every rank (docs/cluster.md, "Where the time goes"); null: none."""

    def steps(self, num_samples: int) -> int:
        """Optimizer steps of the run, for a train split of so many samples."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.max_epochs is not None
        samples, steps = self.max_epochs * num_samples, 0
        for length, size in self.warmup:
            if samples <= length * size:
                return steps + math.ceil(samples / size)
            samples, steps = samples - length * size, steps + length
        return steps + math.ceil(samples / self.global_batch_size)

    @property
    def warmup(self) -> tuple[tuple[int, int], ...]:
        """`batch_size_warmup` as (steps, samples of each)."""
        return tuple((stage.steps, stage.global_batch_size) for stage in self.batch_size_warmup)

    def samples(self, steps: int) -> int:
        """Samples of the first so many steps."""
        return consumed(steps, self.global_batch_size, self.warmup)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Every size that the global batch has, in order."""
        return (*(size for _, size in self.warmup), self.global_batch_size)

    @field_validator("stop_signals")
    @classmethod
    def signals_that_can_be_taken(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        refused = [name for name in names if name not in CATCHABLE_SIGNALS]
        if refused:
            raise ValueError(f"cannot take {', '.join(refused)}; known: {', '.join(CATCHABLE_SIGNALS)}")
        if not {"SIGTERM", "SIGUSR1"} <= set(names):
            raise ValueError("must hold SIGTERM and SIGUSR1, with which launchers stop a job")
        return names

    @field_validator("profile", mode="before")
    @classmethod
    def first_and_last(cls, value: Any) -> Any:
        if value is not None:
            ends = re.fullmatch(r"([1-9]\d*)-([1-9]\d*)", str(value))
            if not ends or int(ends[1]) > int(ends[2]):
                raise ValueError("write FIRST-LAST, such as 5-7")
            if (count := int(ends[2]) - int(ends[1]) + 1) > MOST_PROFILED_STEPS:
                raise ValueError(f"{count} steps are more than a browser shows; at most {MOST_PROFILED_STEPS}")
        return value

    @property
    def profiled_steps(self) -> range:
        first, _, last = (self.profile or "1-0").partition("-")
        return range(int(first), int(last) + 1)

    def profile_problem(self, max_steps: int) -> str | None:
        """A line where steps are to be traced that the run does not have."""
        if not self.profile or self.profiled_steps[-1] <= max_steps:
            return None
        return f"profile ({self.profile}) reaches past the last step ({max_steps:,}); choose from 1 to {max_steps:,}"


class CheckpointSection(Section):
    interval_steps: int = Field(1000, ge=1, le=MOST)
    """The last step is always saved too."""
    background: bool = True
    """Training goes on while a checkpoint is written, from a copy of this rank's state in host memory; false: no
    copy, and training waits."""
    keep_last: int = Field(3, ge=1, le=MOST)
    """Newest checkpoints kept; the newest verified one is never deleted."""
    keep_every_steps: int | None = Field(None, ge=1, le=MOST)
    """Checkpoints at multiples of this are kept for ever."""
    keep_best: int = Field(0, ge=0, le=MOST)
    """So many of the lowest validation loss are kept, among those saved at a step that was evaluated."""
    resume: str = Field("auto", min_length=1, max_length=4096)
    """`auto`: the newest verified checkpoint of this run, a fresh start only where there is none;
    `none`: a fresh start, refused where checkpoints stand; else the folder of one checkpoint, refused where the run
    has later ones. It is where the job begins: a restart by its launcher goes on from what it has saved since."""

    @field_validator("resume")
    @classmethod
    def no_near_word(cls, resume: str) -> str:
        word = resume.strip().lower()
        near = difflib.get_close_matches(word, ("auto", "none"), n=1, cutoff=0.7)
        if resume not in ("auto", "none") and near and not Path(resume).exists():
            raise ValueError(f"must be auto, none or the folder of a checkpoint; nearest: {near[0]}")
        return resume


class HealthSection(Section):
    """What is done about bad numbers; docs/reliability.md tells what each choice costs."""

    non_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is inf or NaN, on any rank: `stop` ends the run before the optimizer moves; `skip`
    leaves the global batch out, the step is taken with the next one."""
    max_skipped_steps: int = Field(5, ge=1, le=MOST)
    """More bad batches in a row than this end the run under `skip`: then it is not the data."""
    spike_z_score: float | None = Field(10.0, gt=0, le=1e9)
    """A loss this many robust deviations above its recent median is a spike, and so is a gradient norm in two steps
    in a row; null: not looked for."""
    spike_action: Literal["none", "dump", "roll_back"] = "dump"
    """`dump`: write what the batch was; `roll_back`: also go back to the newest verified checkpoint and leave the
    batches around the spike out."""
    max_roll_backs: int = Field(3, ge=1, le=MOST)
    """A spike after so many roll backs ends the run."""


class EvaluationSection(Section):
    split: str | None = Field("valid", min_length=1, max_length=100)
    """null: no evaluation."""
    interval_steps: int = Field(1000, ge=1, le=MOST)
    """The last step is always evaluated too."""
    max_samples: int | None = Field(None, ge=1, le=MOST)
    """The first so many samples of the split; all when absent."""
    prompts: tuple[str, ...] = ()
    """Continued by sampling at each evaluation; the texts go to MLflow and the log."""
    max_new_tokens: int = Field(48, ge=1, le=100_000)


class TrackingSection(Section):
    enabled: bool = True
    experiment: str | None = Field(None, min_length=1, max_length=200)
    """MLflow experiment; MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID when absent, else `globallocal`."""
    uri: str | None = Field(None, min_length=1, max_length=2000)
    """MLflow tracking URI; MLFLOW_TRACKING_URI when absent, else `sqlite:///mlflow.db` in the working folder."""
    routers_per_layer: bool = False
    """Metrics of every layer's routers too, not only their minimum, mean and maximum over the layers."""


class DeepSpeedSection(Section):
    config: Path = Path("ds_configs/zero2.json")
    """DeepSpeed's own knobs. Batch sizes, precision, optimizer and clipping are set in this file, not there."""
