"""Every setting of a run: typed, with its unit; unknown keys are refused; all errors at once."""

import difflib
import inspect
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator
from yaml import YAMLError

from data_prep.errors import UserError
from model.configuration_globallocal import PRESETS, GlobalLocalConfig
from pipeline.redact import redact

CATCHABLE_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP", "SIGCONT", "SIGXCPU")
"""What schedulers and people send; SIGKILL and SIGSTOP cannot be caught, and others mean a crash."""

MOST_PROFILED_STEPS = 50

PROJECT = Path(__file__).resolve().parents[1]
"""Where the project lies: a checkout, or site-packages."""
RUN_FILES = "launch/runs"
DEEPSPEED_FILES = "ds_configs"

DEFAULT_CACHE_FOLDER = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "globallocal"
DEFAULT_CACHE_BYTES = 64 << 30


@dataclass(frozen=True)
class Retention:
    """`checkpoint.keep_last`, `keep_every_steps` and `keep_best` of a run's settings."""

    keep_last: int = 3
    keep_every_steps: int | None = None
    keep_best: int = 0


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RunSection(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run folder and the MLflow run."""
    output_dir: Path | None = None
    """Run folder; `runs/<name>` when absent."""
    seed: int = Field(0, ge=0)
    """Seeds the weights, dropout (with the rank added) and, unless `data.order_seed` is set, the sample order."""


class ModelSection(BaseModel):
    """A preset and whatever of `GlobalLocalConfig` differs from it, for example `hidden_size: 512`."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    preset: str = "quickstart"
    """One of the model presets; `globallocal estimate --help` lists them."""

    @property
    def overrides(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def build(self, **from_dataset: Any) -> GlobalLocalConfig:
        """The model's configuration; what the dataset fixes (vocabulary, special ids) is passed in.

        Raises:
            UserError: a value that the model refuses.
        """
        try:
            return GlobalLocalConfig.from_preset(self.preset, **{**from_dataset, **self.overrides})
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
    ]
    """Folder, or URL (s3://, https://, …), of a prepared dataset; or a mixture: a list of {dataset, weight}."""
    sequence_length: int = Field(512, ge=1)
    """Tokens a sample; chosen here, not when the data is prepared."""
    train_split: str = "train"
    order_seed: int | None = Field(None, ge=0)
    """Keys the permutation of samples; `run.seed` when absent."""
    window_tokens: int | None = Field(None, ge=1)
    """null permutes all samples of an epoch. Set it where a remote dataset is larger than the cache: samples are
    then permuted in windows of about so many tokens, of which two must fit; 2^30 mix well and need about 6 GiB."""
    cache_dir: Path | None = None
    """Where a node keeps the shards of remote datasets; `~/.cache/globallocal` when absent."""
    cache_bytes: int = Field(DEFAULT_CACHE_BYTES, ge=1)
    """What they may take together; the least recently used go first."""
    verify: Literal["hashes", "sizes", "none"] = "hashes"
    """What is checked of every shard before step 0, the work shared by all ranks. Shards of remote datasets are
    always hashed when they are downloaded."""

    @field_validator("dataset")
    @classmethod
    def not_empty(cls, dataset: str | tuple[MixturePart, ...]) -> str | tuple[MixturePart, ...]:
        if not dataset:
            raise ValueError("name a folder, a URL, or at least one {dataset, weight}")
        return dataset


class OptimizerSection(Section):
    """AdamW (arXiv:1711.05101) under linear warm-up and cosine decay (arXiv:1608.03983)."""

    learning_rate: float = Field(5e-4, gt=0)
    """The peak, reached after `warmup_steps`."""
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    """Applied to matrices only: norms, biases and scalars are exempt."""
    max_gradient_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    warmup_steps: int = Field(0, ge=0)
    min_learning_rate_ratio: float = Field(0.1, ge=0, le=1)
    """The learning rate of the last step over the peak."""


class TrainingSection(Section):
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps. Set this or `max_epochs`."""
    max_epochs: float | None = Field(None, gt=0)
    """Passes over the train split, rounded up to whole steps (the last batch may reach into the next epoch)."""
    global_batch_size: int = Field(16, ge=1)
    """Samples an optimizer step, over all ranks."""
    micro_batch_size: int = Field(4, ge=1)
    """Samples a rank holds at once; gradient_accumulation_steps = global / (micro × world size)."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """`auto`: bf16 where the hardware multiplies it, else fp32; what was chosen is printed."""
    log_interval_steps: int = Field(10, ge=1)
    stop_signals: tuple[str, ...] = ("SIGTERM", "SIGUSR1", "SIGINT")
    """At one of these, on any rank, all ranks save and leave with exit code 75: start it again to go on. SIGTERM and
    SIGUSR1, which launchers send, always are."""
    preemption_grace_seconds: float = Field(90, gt=0)
    """From the first signal on: what cannot be finished in this time (a step, a save) is not begun."""
    max_seconds: float | None = Field(None, gt=0)
    """Time budget of one start; when it is spent the run leaves as if it had received a signal then."""
    hang_timeout_seconds: float = Field(1800, gt=0)
    """A rank that does not move for so long ends the run with exit code 76; four times as long up to its first step."""
    peak_teraflops_per_device: float | None = Field(None, gt=0, allow_inf_nan=False)
    """What MFU is a part of, in 10^12 operations per second; null: the data sheet's rate for the card's name and
    the run's precision, and no MFU where none is known."""
    profile: str | None = None
    """FIRST-LAST: these steps are traced on every rank (docs/cluster.md, "Where the time goes"); null: none."""

    def steps(self, num_samples: int) -> int:
        """Optimizer steps of the run, for a train split of so many samples."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.max_epochs is not None
        return math.ceil(self.max_epochs * num_samples / self.global_batch_size)

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

    def check_profile(self, max_steps: int) -> None:
        """Raises ValueError where steps are to be traced that the run does not have."""
        if self.profile and self.profiled_steps[-1] > max_steps:
            raise ValueError(
                f"profile ({self.profile}) reaches past the last step ({max_steps:,}); choose from 1 to {max_steps:,}"
            )

    @model_validator(mode="after")
    def one_length(self) -> "TrainingSection":
        if (self.max_steps is None) == (self.max_epochs is None):
            raise ValueError(
                f"exactly one of max_steps ({self.max_steps}) and max_epochs ({self.max_epochs}) must be set"
            )
        if self.max_steps is not None:
            self.check_profile(self.max_steps)
        return self


class CheckpointSection(Section):
    interval_steps: int = Field(1000, ge=1)
    """The last step is always saved too."""
    background: bool = True
    """Training goes on while a checkpoint is written, from a copy of this rank's state in host memory; false: no
    copy, and training waits."""
    keep_last: int = Field(3, ge=1)
    """Newest checkpoints kept; the newest verified one is never deleted."""
    keep_every_steps: int | None = Field(None, ge=1)
    """Checkpoints at multiples of this are kept for ever."""
    keep_best: int = Field(0, ge=0)
    """So many of the lowest validation loss are kept, among those saved at a step that was evaluated."""
    resume: str = "auto"
    """`auto`: the newest verified checkpoint of this run, a fresh start only where there is none;
    `none`: a fresh start, refused where checkpoints stand; else the folder of one checkpoint, refused where the run
    has later ones. It is where the job begins: a restart by its launcher goes on from what it has saved since."""


class HealthSection(Section):
    """What is done about bad numbers; docs/reliability.md tells what each choice costs."""

    non_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is inf or NaN, on any rank: `stop` ends the run before the optimizer moves; `skip`
    leaves the global batch out, the step is taken with the next one."""
    max_skipped_steps: int = Field(5, ge=1)
    """More bad batches in a row than this end the run under `skip`: then it is not the data."""
    spike_z_score: float | None = Field(30.0, gt=0)
    """A loss or gradient norm this many robust deviations above its recent median is a spike; null: not looked for."""
    spike_action: Literal["none", "dump", "roll_back"] = "dump"
    """`dump`: write what the batch was; `roll_back`: also go back to the newest verified checkpoint and leave the
    batches around the spike out."""
    max_roll_backs: int = Field(3, ge=1)
    """A spike after so many roll backs ends the run."""


class EvaluationSection(Section):
    split: str | None = "valid"
    """null: no evaluation."""
    interval_steps: int = Field(1000, ge=1)
    """The last step is always evaluated too."""
    max_samples: int | None = Field(None, ge=1)
    """The first so many samples of the split; all when absent."""
    prompts: tuple[str, ...] = ()
    """Continued by sampling at each evaluation; the texts go to MLflow and the log."""
    max_new_tokens: int = Field(48, ge=1)


class TrackingSection(Section):
    enabled: bool = True
    experiment: str = "globallocal"
    uri: str | None = None
    """MLflow tracking URI; MLFLOW_TRACKING_URI when absent, else `sqlite:///mlflow.db` in the working folder."""


class DeepSpeedSection(Section):
    config: Path = Path("ds_configs/zero2.json")
    """DeepSpeed's own knobs. Batch sizes, precision, optimizer and clipping are set in this file, not there."""


class RunConfig(Section):
    run: RunSection
    model: ModelSection = ModelSection()
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection
    checkpoint: CheckpointSection = CheckpointSection()
    health: HealthSection = HealthSection()
    evaluation: EvaluationSection = EvaluationSection()
    tracking: TrackingSection = TrackingSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()

    @model_validator(mode="after")
    def best_is_measured(self) -> "RunConfig":
        if self.checkpoint.keep_best and self.evaluation.split is None:
            raise ValueError(
                f"checkpoint.keep_best ({self.checkpoint.keep_best}) needs a validation loss, but evaluation.split is "
                "null; name a split, or set keep_best to 0"
            )
        return self

    @property
    def run_folder(self) -> Path:
        return self.run.output_dir or Path("runs") / self.run.name

    @property
    def checkpoints(self) -> Path:
        return self.run_folder / "checkpoints"

    @property
    def retention(self) -> Retention:
        section = self.checkpoint
        return Retention(section.keep_last, section.keep_every_steps, section.keep_best)

    @property
    def order_seed(self) -> int:
        return self.run.seed if self.data.order_seed is None else self.data.order_seed

    def flat(self) -> dict[str, Any]:
        """Dotted keys, as given on the command line, without secrets: {"training.max_steps": 100, …}."""
        return flatten(redact(self.model_dump(mode="json")))

    def save(self, path: Path) -> None:
        """Write the settings as YAML, without secrets."""
        OmegaConf.save(OmegaConf.create(redact(self.model_dump(mode="json"))), path)


def find_shipped(path: Path, folder: str, suffix: str) -> Path:
    """A file as a person names it: its path, its path in the project, or the name alone of one that the project ships.

    Args:
        folder: where the project keeps such files: `launch/runs`, `ds_configs`.
        suffix: theirs, so that `quickstart` and `zero2` are names.
    """
    by_name = [PROJECT / folder / f"{path}{suffix}"] if path.parent == Path() and not path.suffix else []
    return next((item for item in (path, PROJECT / path, *by_name) if item.is_file()), path)


def find_run_file(path: Path) -> Path:
    return find_shipped(path, RUN_FILES, ".yaml")


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file (its path, or the name of one that the project ships) and apply `section.key=value` overrides.

    Raises:
        UserError: the file cannot be read, or settings are wrong: every problem, one a line.
    """
    try:
        file = OmegaConf.load(find_run_file(Path(path)))
        bad = [item for item in overrides if "=" not in item or item.startswith("-")]
        if bad:
            raise UserError([f"{item!r} is not an override; write section.key=value" for item in bad])
        merged = OmegaConf.merge(file, OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError:
        raise UserError(_missing_file(Path(path))) from None
    except (YAMLError, OmegaConfBaseException, OSError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no settings; see launch/runs/quickstart.yaml for the form")
    return validate(values, str(path))


def validate(values: Mapping[Any, Any], origin: str) -> RunConfig:
    """Settings as nested mappings → RunConfig; `origin` names them in the UserError."""
    problems: list[str] = []
    config = None
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += [_explain(item) for item in error.errors()]
    model = values.get("model")
    if isinstance(model, Mapping):
        problems += _model_problems(model)
    if problems or config is None:
        raise UserError([f"{origin}: {problem}" for problem in problems])
    return config


def known_keys() -> list[str]:
    """Every dotted key that a run file may hold, those of the model included."""
    keys = []
    for section, field in RunConfig.model_fields.items():
        annotation = field.annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        keys += [f"{section}.{key}" for key in annotation.model_fields]
    return keys + [f"model.{key}" for key in _model_keys()]


def _model_keys() -> list[str]:
    parameters = inspect.signature(GlobalLocalConfig).parameters.values()
    return [item.name for item in parameters if item.kind is not item.VAR_KEYWORD and item.name != "self"]


def _model_problems(model: Mapping[Any, Any]) -> list[str]:
    problems = [
        _unknown(f"model.{key}", [f"model.{known}" for known in ["preset", *_model_keys()]])
        for key in model
        if key != "preset" and key not in _model_keys()
    ]
    preset = model.get("preset", "quickstart")
    if preset not in PRESETS:
        problems.append(f"model.preset: {preset!r} is not a preset; known: {', '.join(PRESETS)}")
    return problems


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"] if part not in ("location", "mixture"))  # kinds, not keys
    if error["type"] == "extra_forbidden":
        parts = [f"data.dataset.0.{name}" for name in MixturePart.model_fields]
        return _unknown(key, [*known_keys(), *RunConfig.model_fields, *parts])
    if error["type"] == "missing":
        return f"{key} is required"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], Mapping):
        return f"{key}: {message}"
    return f"{key} = {error['input']!r}: {message[0].lower()}{message[1:]}"


def _unknown(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
    last = key.rsplit(".", 1)[-1]
    near += [item for item in known if item.rsplit(".", 1)[-1] == last and item not in near]
    hint = f"; nearest: {', '.join(near)}" if near else f"; known: {', '.join(known)}"
    return f"unknown key {key}{hint}"


def _missing_file(path: Path) -> str:
    here = {str(item) for item in path.parent.glob("[!.]*.yaml")}
    shipped = {f"{RUN_FILES}/{item.name}" for item in (PROJECT / RUN_FILES).glob("[!.]*.yaml")}
    return f"{path}: no such file; there are: {', '.join(sorted(here | shipped))}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
