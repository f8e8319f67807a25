"""The settings of a run as a whole: read from a run file and overrides, checked together, all errors at once."""

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from data_prep.errors import UserError
from model.configuration_globallocal import GlobalLocalConfig, setting_problems
from model.presets_globallocal import PRESETS
from pipeline.redact import redact
from pipeline.settings.section import Section, Unknown, plain, short
from pipeline.settings.sections import (
    CheckpointSection,
    DataSection,
    DeepSpeedSection,
    EvaluationSection,
    HealthSection,
    MixturePart,
    ModelSection,
    OptimizerSection,
    Retention,
    RunSection,
    TrackingSection,
    TrainingSection,
)
from pipeline.settings.shipped import find_run_file, missing_run_file


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


def contradictions(config: RunConfig) -> list[str]:
    """One line for every two settings that do not go together; what hangs on a wrong one is passed over."""
    problems = []
    for check in CHECKS:
        try:
            problem = check(config)
        except Unknown:
            continue
        problems += [problem] if problem else []
    return problems


def _best_needs_a_split(config: RunConfig) -> str | None:
    if not config.checkpoint.keep_best or config.evaluation.split is not None:
        return None
    return (
        f"checkpoint.keep_best ({config.checkpoint.keep_best}) needs a validation loss, but evaluation.split is "
        "null; name a split, or set keep_best to 0"
    )


def _prompts_need_a_split(config: RunConfig) -> str | None:
    if not config.evaluation.prompts or config.evaluation.split is not None:
        return None
    return (
        f"evaluation.prompts ({len(config.evaluation.prompts)}) are continued at each evaluation, but "
        "evaluation.split is null; name a split, or set prompts to []"
    )


def _roll_back_needs_spikes(config: RunConfig) -> str | None:
    if config.health.spike_action != "roll_back" or config.health.spike_z_score is not None:
        return None
    return (
        "health.spike_action = roll_back, but health.spike_z_score is null and no spike is looked for; set "
        "spike_z_score, such as 10, or spike_action to none"
    )


def _micro_in_global(config: RunConfig) -> str | None:
    training = config.training
    if training.micro_batch_size <= training.global_batch_size:
        return None
    return (
        f"training.micro_batch_size ({training.micro_batch_size}) is more than training.global_batch_size "
        f"({training.global_batch_size}); lower the first, or raise the second"
    )


def _batches_that_grow(config: RunConfig) -> str | None:
    training = config.training
    sizes = training.batch_sizes
    if all(small < large for small, large in pairwise(sizes)):
        return None
    return (
        f"training.batch_size_warmup: global batches of {', '.join(map(str, sizes[:-1]))} samples, and then "
        f"training.global_batch_size ({sizes[-1]}), do not grow; make each larger than the one before, or leave the "
        "warm-up out"
    )


def _one_length(config: RunConfig) -> str | None:
    steps, epochs = config.training.max_steps, config.training.max_epochs
    if (steps is None) != (epochs is None):
        return None
    return f"training: exactly one of max_steps ({steps}) and max_epochs ({epochs}) must be set"


def _profile_in_length(config: RunConfig) -> str | None:
    training = config.training
    problem = training.profile_problem(training.max_steps) if training.max_steps is not None else None
    return f"training: {problem}" if problem else None


def _decay_of_wsd(config: RunConfig) -> str | None:
    optimizer = config.optimizer
    if (optimizer.schedule == "wsd") == (optimizer.decay_steps is not None):
        return None
    return (
        f"optimizer.schedule = {optimizer.schedule} and optimizer.decay_steps = {optimizer.decay_steps} do not go "
        "together: wsd needs decay_steps, such as a tenth of the run's steps, and other schedules take null"
    )


def _schedule_in_length(config: RunConfig) -> str | None:
    steps = config.training.max_steps
    return None if steps is None else schedule_problem(config.optimizer, steps)


def _small_decay(config: RunConfig) -> str | None:
    optimizer = config.optimizer
    if optimizer.learning_rate * optimizer.weight_decay < 1:
        return None
    return (
        f"optimizer.learning_rate ({optimizer.learning_rate:g}) × optimizer.weight_decay "
        f"({optimizer.weight_decay:g}) must be below 1: a step would turn weights round; lower one"
    )


def _width_of_adamw(config: RunConfig) -> str | None:
    optimizer = config.optimizer
    if optimizer.base_hidden_size is None or optimizer.name == "adamw":
        return None
    return (
        f"optimizer.base_hidden_size ({optimizer.base_hidden_size}) scales AdamW's rate of matrices, which "
        f"optimizer.name = {optimizer.name} moves its own way; set it to null, or name to adamw"
    )


CHECKS: tuple[Callable[[RunConfig], str | None], ...] = (
    *(_best_needs_a_split, _prompts_need_a_split, _roll_back_needs_spikes, _micro_in_global),
    *(_batches_that_grow, _one_length, _profile_in_length, _decay_of_wsd, _schedule_in_length, _small_decay),
    _width_of_adamw,
)


def schedule_problem(optimizer: OptimizerSection, steps: int) -> str | None:
    warmup, decay = optimizer.warmup_steps, optimizer.decay_steps or 0
    if warmup + decay <= steps:
        return None
    if not decay:
        return (
            f"optimizer.warmup_steps ({warmup:,}) is more than the run's {steps:,} steps: the peak would never be "
            "reached; lower it, or train for longer"
        )
    return (
        f"optimizer.warmup_steps ({warmup:,}) and optimizer.decay_steps ({decay:,}) are together more than the run's "
        f"{steps:,} steps; lower one, or train for longer"
    )


@dataclass(frozen=True)
class Reading:
    """What was found in a run file.

    Attributes:
        config: what is right of it; a setting that is wrong is missing, and raises `Unknown` where it is asked for.
        problems: one line for everything that is wrong.
    """

    config: RunConfig
    problems: list[str]

    def whole(self) -> RunConfig:
        """Raises UserError where anything is wrong."""
        if self.problems:
            raise UserError(self.problems)
        return self.config


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file (its path, or the name of one that the project ships) and apply `section.key=value` overrides.

    Raises:
        UserError: the file cannot be read, or settings are wrong: every problem, one per line.
    """
    return read_config(path, overrides).whole()


def read_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Reading:
    """As `load_config`, for those who look for further problems of the run before they refuse it.

    Raises:
        UserError: the file cannot be read.
    """
    if Path(path).is_dir() and not find_run_file(Path(path)).is_file():
        raise UserError(f"{path}: a folder, not a run file; the settings of a run are in its config.yaml")
    try:
        file = OmegaConf.load(find_run_file(Path(path)))
        if not OmegaConf.is_dict(file):
            raise UserError(f"{path}: holds no settings; see launch/runs/quickstart.yaml for the form")
        bad = [item for item in overrides if "=" not in item or item.startswith("-")]
        merged = OmegaConf.merge(file, OmegaConf.from_dotlist([item for item in overrides if item not in bad]))
        values = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError:
        raise UserError(missing_run_file(Path(path))) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except (YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError, RecursionError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: {said[:400]}; see launch/runs/quickstart.yaml for the form") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no settings; see launch/runs/quickstart.yaml for the form")
    read = read_values(values, str(path))
    return Reading(
        read.config, [f"{item!r} is not an override; write section.key=value" for item in bad] + read.problems
    )


def validate(values: Mapping[Any, Any], origin: str) -> RunConfig:
    """Settings as nested mappings → RunConfig; `origin` names them in the UserError."""
    return read_values(values, origin).whole()


def read_values(values: Mapping[Any, Any], origin: str) -> Reading:
    """Settings as nested mappings; `origin` names them in the problems."""
    problems: list[str] = []
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += [line for item in error.errors() for line in _explain(item)]
        config = _right_part(values, error.errors())
    model = values.get("model")
    if isinstance(model, Mapping) and (of_model := _model_problems(model)):
        problems += of_model
        config = config.model_copy()
        config.__dict__.pop("model", None)
    problems += contradictions(config)
    return Reading(config, [f"{origin}: {problem}" for problem in problems])


def _right_part(values: Mapping[Any, Any], errors: Sequence[Any]) -> RunConfig:
    """The settings that are right. A key that nobody knows may be meant for its nearest, which is then missing too."""
    wrong: dict[str, set[str]] = {}
    for item in errors:
        section, *rest = (str(part) for part in item["loc"])
        wrong.setdefault(section, set()).update(rest[:1])
        if item["type"] == "extra_forbidden":
            near = _nearest(".".join((section, *rest)), [*known_keys(), *RunConfig.model_fields])
            meant, _, key = (near or [""])[0].partition(".")
            if not key and meant not in values:
                wrong.setdefault(meant, set())
            elif key and key not in (values.get(meant) or {}):
                wrong.setdefault(meant, set()).add(key)
    sections: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        kind, given, faults = field.annotation, values.get(name, {}), wrong.get(name)
        if not isinstance(given, Mapping) or (name in wrong and not faults):
            continue  # it is wrong as a whole
        if isinstance(kind, type) and issubclass(kind, Section):
            sections[name] = kind.right_part(given, faults or (), name)
        elif not faults:
            sections[name] = ModelSection.model_validate(given)
    config = RunConfig.model_construct(**sections)
    for name in RunConfig.model_fields.keys() - sections:
        config.__dict__.pop(name, None)
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


def _nearest(key: str, known: Sequence[str]) -> list[str]:
    """Keys that are written like it, the nearest first, and those of the same name in other sections."""
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
    last = key.rsplit(".", 1)[-1]
    return near + [item for item in known if item.rsplit(".", 1)[-1] == last and item not in near]


def _unknown(key: str, known: Sequence[str]) -> str:
    key = key if len(key) <= 100 else f"{key[:60]}…"
    near = _nearest(key, known)
    sections = [item for item in known if "." not in item] or known
    hint = f"; nearest: {', '.join(near)}" if near else f"; known: {', '.join(sections)}"
    return f"unknown key {key!r}{hint}" if not near else f"unknown key {key}{hint}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
