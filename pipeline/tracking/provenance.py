"""Where a run comes from: commit, command line, host, versions, as MLflow tags."""

import contextlib
import getpass
import importlib.metadata
import platform
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from pipeline.redact import redact_arguments

_PACKAGES = ("torch", "deepspeed", "transformers", "mlflow")


def git_commit(file: Path = Path(__file__)) -> str | None:
    """The commit of the repository that tracks `file`, with "-dirty" after it when tracked files differ.

    None outside a repository, or when the file is not tracked (a package installed inside somebody's).
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.resolve().parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        commit = git("rev-parse", "HEAD")
        return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def provenance_tags() -> dict[str, str]:
    """Tags of this process, secrets on the command line redacted; what cannot be found out is left out."""
    tags = {
        "mlflow.source.name": sys.argv[0],
        "mlflow.source.type": "LOCAL",
        "globallocal.command": shlex.join(redact_arguments(sys.orig_argv)),
        "globallocal.host": socket.gethostname(),
        "globallocal.version.python": platform.python_version(),
    }
    for package in ("globallocal", *_PACKAGES):
        try:
            tags[f"globallocal.version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if commit := git_commit():
        tags["mlflow.source.git.commit"] = commit
    with contextlib.suppress(OSError, KeyError):
        tags["mlflow.user"] = getpass.getuser()
    return tags
