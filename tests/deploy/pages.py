"""The commands that README and docs show: which are run as typed, and why the others are not."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WALK = ("index", "your-text", "resume", "mlflow", "one-gpu", "data", "serving", "evaluation", "export")
"""In this order, behind the README; the other pages have no command that is run as typed."""
BLOCK = re.compile(r"^(?:<!-- ([^>]*) -->\n)?```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\$ )?((?:globallocal|deepspeed|make|mlflow|curl|source|python|pip) .*)$", re.MULTILINE)


@dataclass(frozen=True)
class Shown:
    """Commands of a block, and its mark: `not run: REASON`, `dry-run` (run by a test of its own), `output`, or none."""

    page: str
    mark: str
    commands: tuple[str, ...]


def shown(page: Path) -> Iterator[Shown]:
    for mark, block in BLOCK.findall(page.read_text()):
        commands = tuple(COMMAND.findall(block.replace("\\\n", " ")))
        if commands:
            yield Shown(page.stem, mark, commands)


def walked() -> list[str]:
    """Every command without a mark, in the order of the walk."""
    pages = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in WALK)]
    blocks = [block for page in pages if page.exists() for block in shown(page)]
    return [command for block in blocks if not block.mark for command in block.commands]
