"""An evaluation after training, told to the MLflow run that trained the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import UserError

if TYPE_CHECKING:
    from launch.evaluation.harness import Scored
    from launch.evaluation.measurement import Measurement
    from pipeline.export.load import Loaded


def run_of(loaded: Loaded, path: Path) -> Path:
    """The run folder that the model is of.

    Raises:
        UserError: it is of none, MLflow knows no run of it, or it is being trained.
    """
    from pipeline.tracking.opening import check_recordable

    if loaded.checkpoint is None:
        raise UserError(f"--record: {path} is an export, which does not name its run; give the run or its checkpoint")
    folder = loaded.checkpoint.absolute().parent.parent
    check_recordable(folder)
    return folder


def record(run_folder: Path, found: Measurement | Scored, say: Callable[[str], None]) -> None:
    """Names of their own, `evaluated/…`, at the checkpoint's step; what training measured stays as it is."""
    from pipeline.tracking.opening import record_afterwards

    assert found.step is not None
    record_afterwards(run_folder, found.step, found.values(), (found.table, found.rows(), found.key), say)
