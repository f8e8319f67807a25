"""What a run that goes on compares with its checkpoint."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from model.presets_globallocal import PRESETS
from pipeline.checkpoints.folder import read_state
from pipeline.checkpoints.resume import compare, model_then
from pipeline.distributed.world import World
from pipeline.fitting import fit
from tests.pipeline.one_file_run import OneFileRun


def test_a_preset_that_has_changed_since_is_named_and_can_be_set_back(
    small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = OneFileRun(tmp_path / "run", small_dataset)
    folder = run.save(3)
    saved = read_state(folder)

    def problems(**model: Any) -> list[str]:
        section = run.config.model.model_copy(update=model)
        config, cpu = run.config.model_copy(update={"model": section}), torch.device("cpu")
        context = fit(config, 1, "fp32", cpu).context(config, World(0, 0, 1, cpu, None), "fp32")
        return compare(saved, context, model_then(folder, saved))[0]

    assert problems() == []
    monkeypatch.setitem(PRESETS, "quickstart", PRESETS["quickstart"] | {"dropout": 0.25, "conv_kernel_size": 4})
    refused = "a resumed run may not change it; set it back, or choose another run.name"
    assert problems() == [f"model.conv_kernel_size 3 → 4: {refused}", f"model.dropout 0.0 → 0.25: {refused}"]
    assert problems(dropout=0.0, conv_kernel_size=3) == []
    shutil.rmtree(tmp_path / "run" / "model")  # as of a checkpoint that was moved alone
    assert problems() == []
