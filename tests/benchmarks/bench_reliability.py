"""What reliability costs, as ratios over doing without it, all in one run; two ranks, fp32, ZeRO-1.

Contenders take turns, and the fastest turn of each counts, so that other work on the machine touches all.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import psutil

from pipeline.settings.section import counted
from tests.benchmarks import restart
from tests.conftest import globallocal
from tests.pipeline.ranks import outputs, start_ranks, wait

PROGRAM = "tests.benchmarks.reliability_ranks"
LARGE_BYTES = 21e9
"""A model whose checkpoint is 8 GB, while it trains and is saved."""
TARGETS = {
    **{f"8 GB per rank.stage {stage}.what_it_takes_longer_over_the_copy": "≤ 1" for stage in (1, 3)},
    "blocked_by_a_background_save_over_a_plain_save": "≤ 0.1",
    "save_bandwidth_over_plain_write_and_fsync": "≥ 0.7",
    "verified_load_bandwidth_over_plain_read": "≥ 0.7",
    "tokens_per_second_over_a_bare_deepspeed_loop": "≥ 0.98",
    "restart.first_step_again_seconds": "≤ 10",
    "a host lost and back.first_step_again_seconds": "≤ 15",
}


def run() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        globallocal("tokenizer", "--source", "sample", "--vocab-size", 512, "--output", folder / "tokenizer")
        globallocal("prepare", "--source", "sample", "--tokenizer", folder / "tokenizer", "--output", folder / "data")
        figures = ranks(folder, "costs", 2)
        back = restart.measure(folder / "runs", folder / "data")
        host = restart.measure_host(folder / "host", folder / "data")
        memory = {counted(count, "rank"): ranks(folder, "memory", count) for count in (1, 2, 4)}
        large = {f"stage {stage}": eight_gigabytes(folder, stage) for stage in (1, 3)}
    losses = {"restart": back, "a host lost and back": host}
    return {**figures, "8 GB per rank": large, **losses, "peak_bytes_of_tensors_over_the_forecast": memory}


def eight_gigabytes(folder: Path, stage: int) -> dict[str, Any]:
    available = psutil.virtual_memory().available
    if available < LARGE_BYTES:
        return {"not measured": f"{available / 1e9:.1f} GB of free memory; {LARGE_BYTES / 1e9:.0f} are needed"}
    return ranks(folder, f"large{stage}", 1)


def ranks(folder: Path, what: str, count: int) -> dict[str, Any]:
    codes = wait(start_ranks(["-m", PROGRAM, str(folder), what], folder, count), folder, 3600)
    assert codes == [0] * count, outputs(folder)
    figures: dict[str, Any] = json.loads((folder / f"{what}.json").read_text())
    return figures


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
