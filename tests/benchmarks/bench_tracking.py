"""What tracking costs: steps per second with it over those without, in one run; two ranks, the model of quickstart.

Both take turns in pairs, and the median of the pairs counts, so that other work on the machine touches both.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.bench_reliability import ranks
from tests.conftest import globallocal

TARGETS = {"steps_per_second_with_tracking_over_without": "≥ 0.995"}


def run() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        globallocal("tokenizer", "--source", "sample", "--vocab-size", 4096, "--output", folder / "tokenizer")
        globallocal("prepare", "--source", "sample", "--tokenizer", folder / "tokenizer", "--output", folder / "data")
        return ranks(folder, "tracking", 2)


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
