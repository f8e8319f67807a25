"""One DeepSpeed configuration out of two files that may not contradict each other."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import UserError
from pipeline.config import load_config
from pipeline.data import BatchLayout
from pipeline.engine import deepspeed_config, zero_stage

LAYOUT = BatchLayout(global_batch_size=16, micro_batch_size=4, world_size=2)


def merged(tmp_path: Path, knobs: Any, precision: str = "fp32") -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(knobs if isinstance(knobs, str) else json.dumps(knobs))
    config = load_config("launch/runs/quickstart.yaml", [f"deepspeed.config={path}"])
    return deepspeed_config(config, LAYOUT, precision)


def problems_of(tmp_path: Path, knobs: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        merged(tmp_path, knobs)
    return caught.value.problems


def test_the_run_fills_in_what_it_owns(tmp_path: Path) -> None:
    settings = merged(tmp_path, {"zero_optimization": {"stage": 2}}, "bf16")
    assert settings["train_batch_size"] == 16
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 1.0
    assert settings["bf16"] == {"enabled": True}
    assert settings["fp16"] == {"enabled": False}
    assert zero_stage(settings) == 2


def test_auto_and_equal_values_are_welcome(tmp_path: Path) -> None:
    knobs = {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": 2,
        "optimizer": "auto",
        "bf16": {"enabled": "auto"},
    }
    assert merged(tmp_path, knobs)["gradient_accumulation_steps"] == 2


def test_every_contradiction_is_told_naming_both_sides(tmp_path: Path) -> None:
    knobs = {"train_batch_size": 32, "fp16": {"enabled": True}, "optimizer": {"type": "Lamb"}, "gradient_clipping": 5}
    problems = "\n".join(problems_of(tmp_path, knobs))
    assert "train_batch_size = 32, but training.global_batch_size gives 16" in problems
    assert "fp16 = enabled: True, but training.precision gives enabled: False" in problems
    assert "optimizer is set there, and by `optimizer` in the run file" in problems
    assert "gradient_clipping = 5, but optimizer.max_gradient_norm gives 1.0" in problems
    assert len(problems.splitlines()) == 4


@pytest.mark.parametrize(
    ("knobs", "line"),
    [
        ({"zero_optimisation": {}}, "unknown key zero_optimisation; nearest: zero_optimization"),
        ("{", "Expecting property name"),
        ("[]", "must hold a JSON object, holds a list"),
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage = "auto" cannot be filled in'),
    ],
)
def test_what_deepspeed_would_ignore_is_refused(tmp_path: Path, knobs: Any, line: str) -> None:
    (problem,) = problems_of(tmp_path, knobs)
    assert line in problem


def test_a_missing_json_names_those_that_are_there() -> None:
    config = load_config("launch/runs/quickstart.yaml", ["deepspeed.config=ds_configs/zero9.json"])
    with pytest.raises(UserError, match=r"ds_configs/zero9\.json: no such file; there are: .*zero2\.json"):
        deepspeed_config(config, LAYOUT, "fp32")
