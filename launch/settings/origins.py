"""Every setting of a run file or a run folder, with where its value comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from data_prep.errors import UserError
from model.configuration_globallocal import GlobalLocalConfig
from model.presets_globallocal import PRESETS
from pipeline.config import RunConfig, flatten, load_config
from pipeline.settings.shipped import find_run_file

CONFIG_FILE = "config.yaml"
FROM_THE_DATASET = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
"""Settings of the model that nobody writes: the dataset and `data.sequence_length` fix them."""
COMMENT_COLUMN = 50


@dataclass(frozen=True)
class Setting:
    """A value, without secrets, and its origin: `default`, `preset NAME`, `derived`, `FILE:LINE` or `command line`."""

    value: Any
    origin: str


def settings_of(run: Path, overrides: Sequence[str] = ()) -> dict[str, Setting]:
    """Every setting by its dotted key, in the order of the sections.

    A run folder keeps all settings, those that nobody gave too: of these a value that equals the default is called so.

    Args:
        run: a run file, the name of a shipped one, or a run folder.

    Raises:
        UserError: the file is not there, or settings are wrong: one line for each.
    """
    is_run = run.is_dir()
    file = run / CONFIG_FILE if is_run else find_run_file(run)
    if is_run and not file.is_file():
        raise UserError(f"{run}: holds no {CONFIG_FILE}, so it is no run folder; globallocal runs FOLDER lists runs")
    config = load_config(file if is_run else run, overrides)
    given = {key: f"{_near(file)}:{line}" for key, line in _lines(file).items()}
    for item in overrides:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([item]))
        given |= dict.fromkeys(flatten(parsed), "command line")
    values, defaults = config.flat(), _defaults()
    found = {}
    for key, value in values.items():
        untouched = is_run and given.get(key) != "command line" and key in defaults and value == defaults[key]
        if key.partition(".")[0] != "model":
            found[key] = Setting(value, "default" if untouched else given.get(key, "default"))
        elif key == "model.preset":  # all of the model stands behind it
            found[key] = Setting(value, given.get(key, "default"))
            found |= _model(config, given)
    return found


def differences(one: Mapping[str, Setting], other: Mapping[str, Setting]) -> dict[str, tuple[Any, Any]]:
    """The values of each key that differ; None where a side has no such key."""
    pairs = {}
    for key in [*one, *(key for key in other if key not in one)]:
        values = tuple(side[key].value if key in side else None for side in (one, other))
        if values[0] != values[1]:
            pairs[key] = (values[0], values[1])
    return pairs


def to_yaml(settings: Mapping[str, Setting]) -> str:
    """A run file of all settings, the origin of each in a comment."""
    lines, section = [], ""
    for key, setting in settings.items():
        here, _, name = key.partition(".")
        if here != section:
            lines.append(f"{here}:")
            section = here
        lines.append(f"{f'  {name}: {flow(setting.value)}':<{COMMENT_COLUMN}}  # {setting.origin}")
    return "\n".join(lines)


def flow(value: Any) -> str:
    """As YAML has it, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=2**31, allow_unicode=True, sort_keys=False)
    return text.strip().removesuffix("...").strip()


def _model(config: RunConfig, given: Mapping[str, str]) -> dict[str, Setting]:
    """The whole model: what the preset says, what replaces it, and what the model derives from its sizes."""
    built = config.model.build()
    preset, replaced = PRESETS[config.model.preset], config.model.overrides
    found = {}
    for name in GlobalLocalConfig.__annotations__:
        key = f"model.{name}"
        if name in replaced:
            found[key] = Setting(replaced[name], given.get(key, "default"))
        elif name not in FROM_THE_DATASET:
            value = getattr(built, name)
            derived = getattr(GlobalLocalConfig, name, None) == 0 != value  # 0 stands for what follows from others
            origin = f"preset {config.model.preset}" if name in preset else "derived" if derived else "default"
            found[key] = Setting(value, origin)
    return found


def _defaults() -> dict[str, Any]:
    """The default of every setting that has one."""
    found: dict[str, Any] = {}
    for section, field in RunConfig.model_fields.items():
        for name, item in field.annotation.model_fields.items():  # type: ignore[union-attr]
            if not item.is_required():
                found[f"{section}.{name}"] = item.default
    return {key: list(value) if isinstance(value, tuple) else _plain(value) for key, value in found.items()}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _lines(file: Path) -> dict[str, int]:
    """The line of each dotted key of a run file, counted from 1."""
    found: dict[str, int] = {}

    def walk(node: yaml.Node | None, prefix: str) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            found[f"{prefix}{key.value}"] = key.start_mark.line + 1
            walk(value, f"{prefix}{key.value}.")

    walk(yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader), "")
    return found


def _near(file: Path) -> str:
    """Relative where it stands below the working folder."""
    inside = file.absolute().is_relative_to(Path.cwd())
    return os.path.relpath(file) if inside else str(file)
