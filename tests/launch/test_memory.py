"""The memory forecast against what real ranks hold while they train."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.preflight.estimate import Machine, estimate
from pipeline.config import load_config
from tests.launch.small_model import MODEL
from tests.pipeline.ranks import outputs, start_ranks, wait
from tests.variants import some_of

STAGES = (0, 1, 2, 3)
MUON_STAGES = some_of([2], [0, 1, 3])


@pytest.fixture(scope="module")
def knobs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A JSON a stage, with buckets in proportion to a small model, so that no part hides the others."""
    folder, files = tmp_path_factory.mktemp("knobs"), {}
    for stage in STAGES:
        zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 300_000, "allgather_bucket_size": 300_000}
        if stage == 3:
            del zero["allgather_bucket_size"]
            zero |= {"stage3_prefetch_bucket_size": 100_000, "stage3_param_persistence_threshold": 1000}
        files[stage] = folder / f"zero{stage}.json"
        files[stage].write_text(json.dumps({"zero_optimization": zero}))
    return files


TABLE = [(1, some_of([2], [0, 1, 3])), (2, some_of([0, 2], [1, 3])), (4, some_of([1, 3], [0, 2]))]
"""Ranks, and the stages on so many."""


@pytest.mark.parametrize(("ranks", "stages"), TABLE)
def test_the_forecast_is_within_a_tenth_of_what_training_holds(
    ranks: int, stages: list[int], knobs: dict[int, Path], tmp_path: Path
) -> None:
    plan = {str(stage): [*MODEL, f"deepspeed.config={knobs[stage]}"] for stage in stages}
    if ranks == 2:
        plan |= {f"{stage}, muon": [*plan[str(stage)], "optimizer.name=muon"] for stage in MUON_STAGES}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    arguments = ["-m", "tests.launch.memory_ranks", str(tmp_path / "plan.json"), str(tmp_path / "result.json")]
    codes = wait(start_ranks(arguments, tmp_path, ranks), tmp_path, 600)
    assert codes == [0] * ranks, outputs(tmp_path)
    measured = json.loads((tmp_path / "result.json").read_text())
    forecasts = {}
    for name, overrides in plan.items():
        result = estimate(load_config("launch/runs/quickstart.yaml", overrides), Machine(ranks=ranks))
        forecasts[name] = result.memory[result.zero_stage].total
    assert forecasts == pytest.approx(measured, rel=0.1)
