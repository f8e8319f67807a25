"""The sizes of the comparison that need a GPU, several runs at a time on it."""

import subprocess
import sys
import time
from typing import Any

from tests.benchmarks.bench_quality import speed, stages
from tests.benchmarks.quality.plan import SIZES, Size
from tests.benchmarks.quality.training import Run, say
from tests.conftest import ROOT

AT_A_TIME = 5  # one alone leaves most of the card idle


def run(sizes: list[Size] | None = None) -> dict[str, Any]:
    """Trains what is missing, and measures the speeds; the runs' results are files (`quality/training.py`)."""
    start = time.perf_counter()
    sizes = sizes or [size for size in SIZES.values() if size.on_gpu]
    for stage in stages(sizes):
        waiting = [item for item in stage() if item.result() is None]
        running: dict[str, subprocess.Popen] = {}
        while waiting or running:
            while waiting and len(running) < AT_A_TIME:
                item = waiting.pop(0)
                running[item.name] = begin(item)
            time.sleep(0.2)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                if code := running.pop(name).returncode:
                    say(f"{name} ended with {code}")
    return {"seconds": time.perf_counter() - start, **{size.name: speed(size) for size in sizes}}


def begin(item: Run) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.bench_quality", "--part", item.name], cwd=ROOT, stdout=sys.stderr
    )
