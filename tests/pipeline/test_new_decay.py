"""What a resumed run changes of its optimizer is used, and not only said; of the checkpoint it keeps copies."""

from pathlib import Path

import pytest

from pipeline.export.load import load_model
from tests.pipeline.moments import Moment
from tests.pipeline.ranks import Run, outputs, run_ranks


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_new_weight_decay_is_used_and_the_checkpoint_let_go(stage: int, small_dataset: Path, tmp_path: Path) -> None:
    same = [f"deepspeed.config=ds_configs/zero{stage}.json", "evaluation.split=null", "tracking.enabled=false"]
    plan = [
        Run("old", same),
        Run("new", [*same, "optimizer.weight_decay=10"], "old/step-00000003", Moment("backward", rank=0, do=("maps",))),
    ]
    results = run_ranks(plan, tmp_path, small_dataset, 1)
    assert [result["problems"] for result in results] == [[], []]
    last = [load_model(tmp_path / run / "checkpoints" / "step-00000006").model for run in ("old", "new")]
    old, new = (model.model.embed_tokens.weight.norm() for model in last)
    assert new < 0.99 * old
    mapped = outputs(tmp_path)
    assert "/libtorch" in mapped
    assert "/step-00000003/" not in mapped  # a file on a network may be gone by the next step
