"""Where a run comes from: commit, command line, host, versions, as MLflow tags and artifacts."""

import contextlib
import getpass
import importlib.metadata
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pipeline.redact import redact_arguments, redact_lines

MOST_DIFF_BYTES = 1_000_000
_PACKAGES = ("torch", "deepspeed", "transformers", "mlflow")


def _git(file: Path, *arguments: str) -> str:
    command = ["git", "-C", str(file.resolve().parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=20)
    return done.stdout.strip()


def git_commit(file: Path = Path(__file__)) -> str | None:
    """The commit of the repository that tracks `file`, with "-dirty" after it when tracked files differ.

    None outside a repository, or when the file is not tracked (a package installed inside somebody's).
    """
    try:
        _git(file, "ls-files", "--error-unmatch", file.name)
        commit = _git(file, "rev-parse", "HEAD")
        return f"{commit}-dirty" if _git(file, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def git_diff(file: Path = Path(__file__)) -> str:
    """What differs from that commit, in lines that hold no secret; "" where nothing does, or there is no repository."""
    try:
        _git(file, "ls-files", "--error-unmatch", file.name)
        top = Path(_git(file, "rev-parse", "--show-toplevel"))
        diff = redact_lines(_git(top / "any", "diff", "HEAD"))
    except (OSError, subprocess.SubprocessError):
        return ""
    cut = f"\n… {len(diff) - MOST_DIFF_BYTES:,} characters more\n" if len(diff) > MOST_DIFF_BYTES else ""
    return diff[:MOST_DIFF_BYTES] + cut


@cache
def environment_lock() -> str:
    """Every installed package and its version, a line each, as pip takes them; no place that one was installed from."""
    read = [item.metadata for item in importlib.metadata.distributions()]  # parsed anew each time it is asked for
    named = sorted({str(one["Name"]): str(one["Version"]) for one in read if one["Name"]}.items())
    return "".join(f"{name}=={version}\n" for name, version in named)


def provenance_texts() -> dict[str, str]:
    """Artifacts of this process: path → text."""
    texts = {
        "environment/command.txt": shlex.join(redact_arguments(sys.orig_argv)) + "\n",
        "environment/requirements.txt": environment_lock(),
    }
    if diff := git_diff():
        texts["environment/uncommitted.diff"] = diff + "\n"
    return texts


def _versions() -> Iterator[str]:
    """One tag: MLflow's page shows what a run is below its tags."""
    yield f"python {platform.python_version()}"
    for package in ("globallocal", *_PACKAGES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield f"{package} {importlib.metadata.version(package)}"


def provenance_tags() -> dict[str, str]:
    """Tags of this process, secrets on the command line redacted; what cannot be found out is left out."""
    tags = {
        "mlflow.source.name": sys.argv[0],
        "mlflow.source.type": "LOCAL",
        "globallocal.command": shlex.join(redact_arguments(sys.orig_argv)),
        "globallocal.host": socket.gethostname(),
        "globallocal.versions": ", ".join(_versions()),
    }
    if commit := git_commit():
        tags["mlflow.source.git.commit"] = commit
    with contextlib.suppress(OSError, KeyError):
        tags["mlflow.user"] = getpass.getuser()
    return tags
