"""The JSON schema of a run file, made of the types that check it; editors complete from it and mark mistakes."""

import inspect
import re
import textwrap
from typing import Any

from pydantic import TypeAdapter

from launch.settings.origins import FROM_THE_DATASET
from model.configuration_globallocal import GlobalLocalConfig
from model.presets_globallocal import PRESETS
from model.values_globallocal import CHOICES, DERIVED, LARGEST, RANGES
from pipeline.config import RunConfig


def run_schema() -> dict[str, Any]:
    """As JSON Schema 2020-12."""
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **RunConfig.model_json_schema(),
        "title": "Run file of GlobalLocal",
    }
    model = schema["$defs"]["ModelSection"]
    model["additionalProperties"] = False
    model["properties"]["preset"]["enum"] = list(PRESETS)
    model["properties"] |= {name: _model_setting(name) for name in GlobalLocalConfig.__annotations__}
    return schema


def model_descriptions() -> dict[str, str]:
    """What the model's own documentation says of its settings, by name."""
    text = textwrap.dedent(inspect.getdoc(GlobalLocalConfig) or "")
    arguments = text.partition("Args:\n")[2].partition("\n\nRaises:")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE)
    return {name: " ".join(said.split()) for name, said in found}


_DILATIONS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 1, "maximum": LARGEST}}
_BOUNDS: dict[str, dict[str, Any]] = {
    "dropout": {"minimum": 0, "exclusiveMaximum": 1},
    "conv_dilations": {"anyOf": [_DILATIONS, {"type": "array", "minItems": 1, "items": _DILATIONS}]},
    "activation_checkpointing": {"pattern": "^(none|full|selective|deepspeed|every-[1-9][0-9]{0,8})$"},
}
"""Of the settings whose values are neither in a range nor a few words."""


def _model_setting(name: str) -> dict[str, Any]:
    annotation = GlobalLocalConfig.__annotations__[name]
    made: dict[str, Any] = {"type": "number"} if annotation == float | int else TypeAdapter(annotation).json_schema()
    if name in RANGES:
        lowest, highest = RANGES[name]
        made |= {"minimum": lowest, "maximum": highest}
        if name in DERIVED:
            made = {"anyOf": [{"const": 0}, made]}
    elif name in CHOICES:
        made["enum"] = list(CHOICES[name])
    made |= _BOUNDS.get(name, {})
    said = model_descriptions().get(name, "")
    if name in FROM_THE_DATASET:
        said = f"{said} The dataset fixes it; leave it out.".strip()
    return {**made, **({"description": said} if said else {})}
