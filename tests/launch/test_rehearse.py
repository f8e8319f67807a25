"""A job of many ranks on paper: what fits together passes, what does not is said, and a wrong loader is caught."""

import json
from pathlib import Path

import numpy as np
import pytest

import launch.preflight.rehearse as room
from data_prep.errors import UserError
from launch.cli import main
from launch.preflight.rehearse import Fleet, check_positions, rehearse
from pipeline.config import RunConfig, load_config
from pipeline.data.loader import BatchLayout, micro_batches
from tests.conftest import ROOT

TINY = ["model.hidden_size=64", "model.num_hidden_layers=2", "model.vocab_size=512", "data.dataset=none"]


def run_config(*overrides: str) -> RunConfig:
    return load_config("launch/runs/quickstart.yaml", [*TINY, "training.micro_batch_size=2", *overrides])


def problems_of(config: RunConfig, fleet: Fleet) -> str:
    with pytest.raises(UserError) as caught:
        rehearse(config, fleet, 2, say=lambda line: None)
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3", "zero3_hpz"])
def test_sixty_four_ranks_fit_together(stage: str) -> None:
    config = run_config("training.global_batch_size=256", f"deepspeed.config=ds_configs/{stage}.json")
    result = rehearse(config, Fleet(64, 8, 80), 50, say=lambda line: None)
    assert (result.nodes, result.gradient_accumulation_steps, result.samples) == (8, 2, 12_800)
    assert "64 on 8 nodes" in result.lines()[0]
    assert json.loads(result.to_json())["memory"]["total"] == result.memory.total


def test_what_does_not_fit_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "hpz.json").write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 16}}))
    config = run_config("training.global_batch_size=256", f"deepspeed.config={tmp_path}/hpz.json")
    said = problems_of(config, Fleet(64, 8, 0.001))
    assert "zero_hpz_partition_size (16) must divide the 8 ranks of a node and all 64 ranks" in said
    assert "a rank needs" in said
    assert "a smaller training.micro_batch_size" in said
    said = problems_of(run_config("training.global_batch_size=250"), Fleet(60, 8, 80))
    assert "--ranks 60 leaves a node partly filled with --gpus-per-node 8; nearest: 56 or 64" in said
    assert "global_batch_size (250) must be divisible by micro_batch_size (2) × world_size (60)" in said


def test_what_deepspeed_itself_refuses_is_named_with_its_rank() -> None:
    settings = {"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}
    (problem,) = room._settings_problems(settings, 4)
    assert problem.startswith("DeepSpeed refuses the settings of rank 0: ")
    assert "7" in problem


@pytest.mark.parametrize("wrong", ["twice", "swapped with the next step"])
def test_a_loader_that_reads_wrongly_is_caught(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, right = BatchLayout(8, 2, 2), micro_batches
    check_positions(layout, 4)

    def loader(source, layout, rank, first, skipped):
        for number, batch in enumerate(right(source, layout, rank, first, skipped)):
            if number == 2 and rank == 1:
                batch = np.array([8, 9]) if wrong == "twice" else batch + 8
            yield batch

    monkeypatch.setattr(room, "micro_batches", loader)
    with pytest.raises(AssertionError, match="step 1 is not shared out exactly"):
        check_positions(layout, 4)


DOCUMENTED = [
    line.split("#")[0].strip().removeprefix("globallocal ")
    for page in (*ROOT.glob("docs/*.md"), ROOT / "launch" / "commands" / "run.py")
    for line in page.read_text().splitlines()
    if line.strip().startswith("globallocal rehearse --config launch/runs/")
]


@pytest.mark.parametrize("command", DOCUMENTED)
def test_every_documented_line_runs(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main([*command.split(), "--steps", "1"]) == 0


def test_some_lines_are_documented() -> None:
    assert len(DOCUMENTED) >= 2
