"""The project's version and requirements, installed or only on the path."""

import importlib.metadata
import tomllib
from pathlib import Path
from typing import Any


def version() -> str:
    """The version of the installed project, else of the checkout."""
    try:
        return importlib.metadata.version("globallocal")
    except importlib.metadata.PackageNotFoundError:
        return str(_checkout()["version"])


def requirements() -> list[str]:
    """The packages that the project requires, as `torch>=2.8`."""
    try:
        return importlib.metadata.requires("globallocal") or []
    except importlib.metadata.PackageNotFoundError:
        return list(_checkout()["dependencies"])


def _checkout() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
    return project
