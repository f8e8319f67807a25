"""A step asks the device once: whether the gradient's norm is a number. Nothing else in it waits for a GPU."""

import json
from pathlib import Path

from tests.pipeline.ranks import Run, run_ranks

PARTS = {
    "stage-0": ["deepspeed.config=ds_configs/zero0.json"],
    "stage-1": ["deepspeed.config=ds_configs/zero1.json", "model.summary_rule=delta"],
    "stage-2": ["deepspeed.config=ds_configs/zero2.json", "training.precision=bf16"],
}


def test_a_step_waits_once_for_the_device(tmp_path: Path, small_dataset: Path) -> None:
    """Steps 2 and 3 of four, of four micro-batches each, which neither log nor evaluate nor save."""
    quiet = ["training.max_steps=4", "training.log_interval_steps=4", "evaluation.split=null"]
    rare = ["checkpoint.interval_steps=4", "tracking.enabled=false"]
    plan = [Run(name, [*settings, *quiet, *rare]) for name, settings in PARTS.items()]
    results = run_ranks(plan, tmp_path, small_dataset, processes=1, program="tests.pipeline.waits")
    assert [result["code"] for result in results] == [0] * len(PARTS), results
    for name in PARTS:
        steps = json.loads((tmp_path / f"{name}.json").read_text())
        assert len(steps) == 4
        for waits in steps[1:3]:
            assert len(waits) == 1, f"{name}: {waits}"
            assert "pipeline/engine/internals.py" in waits[0]
