"""Every setting of a run: typed, with its unit; unknown keys are refused; all errors at once."""

import difflib
import math
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from yaml import YAMLError

from data_prep.errors import UserError
from model.configuration_globallocal import PRESETS, GlobalLocalConfig, setting_problems
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


MOST = 2**40
"""Of steps, samples, tokens: more than any run counts, and safe in 64 bits when multiplied by another count."""
LONGEST_SECONDS = 1e8
"""Three years."""
LARGEST_SEED = 2**31 - 1
"""Room for the rank, which is added, below numpy's 2^32."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def of_its_own_kind(cls, value: Any, info: ValidationInfo) -> Any:
        wanted = other_kind(cls.model_fields[str(info.field_name)].annotation, value)
        if wanted:
            raise ValueError(wanted)
        return value


def other_kind(annotation: Any, value: Any) -> str | None:
    """What is wanted, where pydantic would read `value` as it: `yes` as 1, `"7"` as 7, `1` or `"on"` as true."""
    kinds = set(_kinds(annotation))
    numbers = kinds & {int, float}
    if isinstance(value, bool) and numbers and bool not in kinds:
        return "must be a number, not true or false"
    if isinstance(value, str) and numbers and str not in kinds and value != "auto":
        return "must be a number, not text"
    if Literal["auto"] in kinds and bool in kinds:
        return None if isinstance(value, bool) or value == "auto" else "must be true, false or auto"
    if bool in kinds and not numbers and isinstance(value, int | float | str) and not isinstance(value, bool):
        return "must be true or false"
    if isinstance(value, float) and numbers == {int} and abs(value) >= 2**63:
        return f"must be a whole number below {2**63}"
    if value == "" and Path in kinds:
        return "must be a path, not empty"
    return None


def plain(message: str) -> str:
    """A message of pydantic's as a person would say it."""
    message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if "exceeded maximum size" in message:
        return f"must be a whole number below {2**63}"
    return message[0].lower() + message[1:]


def _kinds(annotation: Any) -> list[Any]:
    """The types that a field takes; what stands inside a list or a tuple is none of them."""
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [annotation]


class RunSection(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=120)
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
    """AdamW (arXiv:1711.05101) under linear warm-up and cosine decay (arXiv:1608.03983)."""

    learning_rate: float = Field(5e-4, gt=0, le=10)
    """The peak, reached after `warmup_steps`."""
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(1e-8, gt=0, le=1)
    weight_decay: float = Field(0.1, ge=0, le=10)
    """Applied to matrices only: norms, biases and scalars are exempt."""
    max_gradient_norm: float = Field(1.0, gt=0, le=1e9)
    """Gradients are scaled down to this global norm."""
    warmup_steps: int = Field(0, ge=0, le=MOST)
    min_learning_rate_ratio: float = Field(0.1, ge=0, le=1)
    """The learning rate of the last step over the peak."""

    @field_validator("betas")
    @classmethod
    def means_that_forget(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("each must be at least 0 and below 1, such as [0.9, 0.95]")
        return betas


class TrainingSection(Section):
    max_steps: int | None = Field(None, ge=1, le=MOST)
    """Optimizer steps. Set this or `max_epochs`."""
    max_epochs: float | None = Field(None, gt=0, le=1e6)
    """Passes over the train split, rounded up to whole steps (the last batch may reach into the next epoch)."""
    global_batch_size: int = Field(16, ge=1, le=2**22)
    """Samples an optimizer step, over all ranks."""
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
    def fits_together(self) -> "RunConfig":
        problems = []
        if self.checkpoint.keep_best and self.evaluation.split is None:
            problems.append(
                f"checkpoint.keep_best ({self.checkpoint.keep_best}) needs a validation loss, but evaluation.split is "
                "null; name a split, or set keep_best to 0"
            )
        if self.evaluation.prompts and self.evaluation.split is None:
            problems.append(
                f"evaluation.prompts ({len(self.evaluation.prompts)}) are continued at each evaluation, but "
                "evaluation.split is null; name a split, or set prompts to []"
            )
        if self.health.spike_action == "roll_back" and self.health.spike_z_score is None:
            problems.append(
                "health.spike_action = roll_back, but health.spike_z_score is null and no spike is looked for; set "
                "spike_z_score, such as 10, or spike_action to none"
            )
        training, optimizer = self.training, self.optimizer
        if training.micro_batch_size > training.global_batch_size:
            problems.append(
                f"training.micro_batch_size ({training.micro_batch_size}) is more than training.global_batch_size "
                f"({training.global_batch_size}); lower the first, or raise the second"
            )
        if training.max_steps is not None and (warm := warmup_problem(optimizer.warmup_steps, training.max_steps)):
            problems.append(warm)
        if optimizer.learning_rate * optimizer.weight_decay >= 1:
            problems.append(
                f"optimizer.learning_rate ({optimizer.learning_rate:g}) × optimizer.weight_decay "
                f"({optimizer.weight_decay:g}) must be below 1: a step would turn weights round; lower one"
            )
        if problems:
            raise ValueError("\n".join(problems))
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


def warmup_problem(warmup_steps: int, steps: int) -> str | None:
    if warmup_steps <= steps:
        return None
    return (
        f"optimizer.warmup_steps ({warmup_steps:,}) is more than the run's {steps:,} steps: the peak would never be "
        "reached; lower it, or train for longer"
    )


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file (its path, or the name of one that the project ships) and apply `section.key=value` overrides.

    Raises:
        UserError: the file cannot be read, or settings are wrong: every problem, one a line.
    """
    try:
        file = OmegaConf.load(find_run_file(Path(path)))
        if not OmegaConf.is_dict(file):
            raise UserError(f"{path}: holds no settings; see launch/runs/quickstart.yaml for the form")
        bad = [item for item in overrides if "=" not in item or item.startswith("-")]
        if bad:
            raise UserError([f"{item!r} is not an override; write section.key=value" for item in bad])
        merged = OmegaConf.merge(file, OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError:
        raise UserError(_missing_file(Path(path))) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except (YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError, RecursionError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: {said[:400]}; see launch/runs/quickstart.yaml for the form") from None
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
        problems += [line for item in error.errors() for line in _explain(item)]
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
    return list(GlobalLocalConfig.__annotations__)


def _model_problems(model: Mapping[Any, Any]) -> list[str]:
    keys = _model_keys()
    problems = [
        _unknown(f"model.{key}", [f"model.{known}" for known in ["preset", *keys]])
        for key in model
        if key != "preset" and key not in keys
    ]
    preset = model.get("preset", "quickstart")
    if isinstance(preset, str) and preset not in PRESETS:
        problems.append(f"model.preset: {short(preset)} is not a preset; known: {', '.join(PRESETS)}")
    return problems + [f"model.{line}" for line in setting_problems({k: v for k, v in model.items() if k in keys})]


def _explain(error: Any) -> list[str]:
    key = ".".join(str(part) for part in error["loc"] if part not in ("location", "mixture"))  # kinds, not keys
    if error["type"] == "extra_forbidden":
        parts = [f"data.dataset.0.{name}" for name in MixturePart.model_fields]
        return [_unknown(key, [*known_keys(), *RunConfig.model_fields, *parts])]
    if error["type"] == "missing":
        return [f"{key} is required"]
    lines = plain(error["msg"]).split("\n")
    if not key:
        return lines
    if isinstance(error["input"], Mapping) and not error["input"].keys() - known_parts(key):
        return [f"{key}: {line}" for line in lines]
    return [f"{key} = {short(error['input'])}: {line}" for line in lines]


def known_parts(key: str) -> set[str]:
    """The keys of a section; none where `key` is a setting."""
    field = RunConfig.model_fields.get(key)
    return set(field.annotation.model_fields) if field else set()  # type: ignore[union-attr]


def short(value: Any) -> str:
    """As Python writes it, cut in the middle where it is long."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlist = _SHORT.maxtuple = 8


def _unknown(key: str, known: Sequence[str]) -> str:
    key = key if len(key) <= 100 else f"{key[:60]}…"
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
    last = key.rsplit(".", 1)[-1]
    near += [item for item in known if item.rsplit(".", 1)[-1] == last and item not in near]
    sections = [item for item in known if "." not in item] or known
    hint = f"; nearest: {', '.join(near)}" if near else f"; known: {', '.join(sections)}"
    return f"unknown key {key!r}{hint}" if not near else f"unknown key {key}{hint}"


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
