"""What two runs are compared by: their losses, their states, a value without its container."""

import json
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.tracking.journal import read_journal
from tests.pipeline.only_weights import only_weights

Runs = dict[str, dict[str, Any]]


def losses_of(folder: Path, run: str, metric: str = "loss/train") -> dict[int, float]:
    """Step → the metric, every bit of it, as it was recorded for MLflow, or without MLflow in the run's own folder.

    A step recorded twice is an error.
    """
    spool, losses = folder / run / "tracking" / "spool.jsonl", dict[int, float]()
    lines = map(json.loads, spool.read_text().splitlines()) if spool.exists() else read_journal(folder / run)
    for line in lines:
        values = line.get("values") or line.get("metrics") or {}  # as the spool and the journal name them
        if metric in values:
            assert line["step"] not in losses
            losses[line["step"]] = values[metric]
    return losses


def plain(value: Any) -> Any:
    """Tensors as dtype, shape and bytes, objects as their attributes, members of enumerations as their values.

    So that == compares every bit.
    """
    if torch.is_tensor(value):
        flat = value.detach().contiguous().view(-1)
        return str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return vars(value) if hasattr(value, "__dict__") else value


def assert_same_state(one: Path, other: Path, apart_from: frozenset[str] = frozenset()) -> None:
    """Every tensor and number of two checkpoints is bitwise the same: weights, optimizer, random state."""
    names = sorted(item.name for item in one.glob("*.pt"))
    assert names == sorted(item.name for item in other.glob("*.pt"))
    assert len(names) >= 3
    with only_weights():
        for name in names:
            left, right = (plain(torch.load(folder / name)) for folder in (one, other))
            # Python's own generator is left out: libraries' threads draw from it, training does not.
            for key in (left.keys() | right.keys()) - {"python"} - apart_from:
                assert left[key] == right[key], f"{name}: {key} differs"


def assert_resumed_is_unbroken(runs: Runs, folder: Path, resumed: str, unbroken: str) -> None:
    """Of two runs of six steps, the one resumed at step 3 with the other's checkpoint."""
    assert runs[unbroken]["code"] == 0, runs[unbroken]
    assert runs[resumed]["code"] == 0, runs[resumed]
    losses = losses_of(folder, unbroken)
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    assert losses_of(folder, resumed) == {step: losses[step] for step in (4, 5, 6)}
    step = Path("checkpoints/step-00000006")
    assert_same_state(folder / unbroken / step, folder / resumed / step)
    log = (folder / resumed / "logs" / "rank-00000.log").read_text()
    assert "resume verified: bitwise (step 3, 24 samples consumed)" in log


def living(folder: Path) -> list[psutil.Process]:
    """The processes that work for a folder, the oldest first."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and str(folder) in " ".join(process.cmdline()):
                found.append(process)
    return sorted(found, key=psutil.Process.create_time)


def said(folder: Path) -> str:
    return "".join(item.read_text() for item in sorted(folder.glob("rank-*.out")))
