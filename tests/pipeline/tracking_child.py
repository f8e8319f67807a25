"""A process that logs like a training run, for tests that kill it.

Arguments: tracking URI, run folder, first step, last step, seconds between steps, status at the end.
"""

import sys
import time
from pathlib import Path

from pipeline.tracking.facts import RunFacts
from pipeline.tracking.opening import open_tracker


class Config:
    enabled = True
    experiment = "tests"
    uri = sys.argv[1]


def say(line: str) -> None:
    print(line, flush=True)


folder, first, last, pause, status = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6]
tracker = open_tracker(Config(), folder, RunFacts("killed", {"lr": 0.1}), say=say)
for step in range(first, last):
    tracker.log_metrics({"loss": step / 2, "gradient_norm": 1.0}, step)
    say(f"step {step}")
    time.sleep(float(pause))
tracker.log_text("the end", "samples/end.txt")
say(f"delivered {tracker.close(status, deadline_seconds=float(sys.argv[7]))}")
