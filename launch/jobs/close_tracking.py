"""MLflow learns that a job has failed for good, where rank 0 had no time to say so.

`python -m launch.jobs.close_tracking RUN` does it from a job script.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import UserError
from pipeline.exit_codes import PREEMPTED, USER_ERROR

if TYPE_CHECKING:
    from pipeline.config import RunConfig


def failed_for_good(code: int) -> bool:
    """Whether a job that ended with this code, and is not started again, has failed."""
    return code not in (0, USER_ERROR, PREEMPTED)


def settle(settings: "RunConfig", run_folder: Path) -> None:
    """Give the MLflow run of a run folder the status FAILED; one that the ranks have closed keeps its own."""
    if settings.tracking.enabled:
        from pipeline.tracking.opening import settle_run

        settle_run(settings.tracking, run_folder, "FAILED", "failed")


def main(run_folder: Path) -> int:
    from pipeline.config import load_config

    saved = run_folder / "config.yaml"
    if not saved.exists():  # no rank came so far as to write it
        return 0
    try:
        settle(load_config(saved, []), run_folder)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
