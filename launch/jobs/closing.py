"""What is done when a job has ended: its report is written, MLflow is told, the person reads what it came to.

`python -m launch.jobs.closing RUN CODE` does it from a job script.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import UserError
from data_prep.store import publish_file
from launch.report.read import is_run, read_run
from launch.report.words import REPORT_FILE, closing
from pipeline.exit_codes import PREEMPTED, USER_ERROR

if TYPE_CHECKING:
    from pipeline.config import RunConfig

SECONDS = 20.0
"""Within which MLflow takes what is left."""


def close(settings: "RunConfig", code: int) -> None:
    """The end of a job that is not started again.

    Where rank 0 had no time to say so, MLflow learns here that the run has failed. Of a job that was refused nothing is
    said, so that its errors stand last.

    Args:
        code: the job's exit code.
    """
    folder = settings.run_folder
    if code == USER_ERROR or not is_run(folder):
        return
    files = [REPORT_FILE] if write_report(folder) else []
    if settings.tracking.enabled:
        tell_mlflow(settings, files, failed=code not in (0, PREEMPTED))
    print("\n" + "\n".join(closing(read_run(folder))), flush=True)


def write_report(folder: Path) -> bool:
    """False where the disk does not take it, which is said."""
    from launch.report.page import page  # plotly: a second that no start of a job should wait for

    try:
        publish_file(folder / REPORT_FILE, page([read_run(folder)]).encode())
    except OSError as error:
        print(f"{folder / REPORT_FILE}: {error.strerror}; the report is not written", flush=True)
        return False
    return True


def tell_mlflow(settings: "RunConfig", files: list[str], failed: bool) -> None:
    """Give it files of the run folder, and a status where the ranks have not closed the run themselves."""
    from pipeline.tracking.opening import settle_run

    try:
        status = ("FAILED", "failed") if failed else ("KILLED", "lost")
        settle_run(settings.tracking, settings.run_folder, *status, files, SECONDS, _silent)
    except UserError as error:
        print(f"tracking: {error}", flush=True)


def _silent(line: str) -> None:
    """The ranks have said where the run is; what does not arrive is sent at its next start."""


def main(run_folder: Path, code: int) -> int:
    from pipeline.config import load_config

    saved = run_folder / "config.yaml"
    if not saved.exists():  # no rank came so far as to write it
        return 0
    try:
        close(load_config(saved, []), code)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
