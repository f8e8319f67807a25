"""Run files and DeepSpeed files that the project ships, found by path or by name."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
"""Where the project lies: a checkout, or site-packages."""
RUN_FILES = "launch/runs"
DEEPSPEED_FILES = "ds_configs"


def find_shipped(path: Path, folder: str, suffix: str) -> Path:
    """A file as a person names it: its path, its path in the project, or the name alone of one that the project ships.

    Args:
        folder: where the project keeps such files: `launch/runs`, `ds_configs`.
        suffix: theirs, so that `quickstart` and `zero2` are names.
    """
    by_name = [PROJECT / folder / f"{path}{suffix}"] if path.parent == Path() and not path.suffix else []
    return next((item for item in (path, PROJECT / path, *by_name) if item.is_file()), path)


def find_run_file(path: Path) -> Path:
    return find_shipped(path, RUN_FILES, ".yaml")


def missing_run_file(path: Path) -> str:
    """One line: there is no such run file, and which there are."""
    here = {str(item) for item in path.parent.glob("[!.]*.yaml")}
    shipped = {f"{RUN_FILES}/{item.name}" for item in (PROJECT / RUN_FILES).glob("[!.]*.yaml")}
    return f"{path}: no such file; there are: {', '.join(sorted(here | shipped))}"
