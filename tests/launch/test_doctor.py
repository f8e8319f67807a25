"""What doctor says of a run before anything is started."""

import importlib.metadata
from pathlib import Path

import pytest

from data_prep.errors import UserError
from launch.preflight import doctor
from pipeline.checkpoints.space import checkpoint_bytes, readable
from pipeline.config import load_config
from pipeline.data.corpus import open_corpus
from pipeline.export.load import build_model_config


def test_the_room_on_the_disk_is_what_the_run_itself_asks_for(small_dataset: Path, tmp_path: Path) -> None:
    settings = [
        f"data.dataset={small_dataset}",
        f"run.output_dir={tmp_path / 'run'}",
        "training.precision=fp32",
        "training.max_steps=1000",
        "checkpoint.interval_steps=10",
        "checkpoint.keep_last=2",
        "checkpoint.keep_best=1",
        "checkpoint.keep_every_steps=500",
        "deepspeed.config=ds_configs/zero3.json",
    ]
    config = load_config("launch/runs/quickstart.yaml", settings)
    model = build_model_config(config, open_corpus(config.data))
    one = readable(checkpoint_bytes(model, "adamw", 3, "fp32", 4))
    finding = doctor.disk(config, ranks=4)
    assert finding.level == "ok"
    assert finding.found.startswith(f"up to 6 checkpoints of about {one}, ")


def test_a_disk_without_room_for_all_that_is_kept(small_dataset: Path, tmp_path: Path) -> None:
    settings = [f"data.dataset={small_dataset}", f"run.output_dir={tmp_path}"]
    settings += ["training.max_steps=1000000", "checkpoint.interval_steps=1", "checkpoint.keep_every_steps=1"]
    with pytest.raises(UserError, match="free, but the run keeps up to 1000001 checkpoints of about"):
        doctor.disk(load_config("launch/runs/quickstart.yaml", settings), ranks=2)


def test_on_the_path_and_not_installed_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.requires

    def absent(name: str) -> list[str] | None:
        if name == "globallocal":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    findings = list(doctor.packages())
    assert "torch " in findings[-1].found
