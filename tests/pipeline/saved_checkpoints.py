"""Checkpoints as ranks write them, without training."""

from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoints import write as checkpoint_io
from pipeline.checkpoints.fingerprint import Fingerprint
from pipeline.checkpoints.folder import SAVING, CheckpointState
from pipeline.checkpoints.retention import prune
from pipeline.evaluation.figures import Evaluation, Figures, HeldOut
from pipeline.files import step_name
from pipeline.settings.sections import Retention


def state(step: int, loss: float | None = None) -> CheckpointState:
    return CheckpointState(
        step=step,
        consumed_samples=step,
        consumed_tokens=step,
        dataset_id="d",
        tokenizer_sha256="t",
        world_size=2,
        zero_stage=2,
        precision="fp32",
        config={},
        mlflow_run_id=None,
        next_batch_hash="",
        logit_fingerprint=Fingerprint(sha256="", values=[]),
        seconds={},
        evaluation=None if loss is None else Evaluation(step, HeldOut(Figures(loss))),
        versions={},
    )


def save(root: Path, step: int, retention: Retention, loss: float | None = None, files: int = 4) -> list[str]:
    """What the ranks' threads do, one after another: write, list, rename, prune."""
    name = step_name(step)
    building = root / f"{SAVING}{name}"
    building.mkdir(parents=True, exist_ok=True)
    written: dict[str, Any] = {}
    for number in range(files):
        content = {"weights": torch.full((1 << 15,), step), "small": torch.arange(number + 1)}
        some, problems = checkpoint_io.write_files(building / name, {f"file-{number}.pt": content})
        if problems:
            return problems
        written |= some
    problems = checkpoint_io.commit(building / name, root / name, state(step, loss), written)
    return problems or prune(root, retention, newest_step=step).problems
