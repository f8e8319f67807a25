"""The tests whose tables of variants `make test` and `make cluster` shorten, with all of them."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.variants import ALL


def run(folder: Path) -> dict[str, object]:
    shortened = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "import some_of" in path.read_text()]
    here = [path for path in shortened if "cluster" not in path.parts]
    hosts = [path for path in shortened if "cluster" in path.parts]
    return {
        "on this machine, tests passed": passed(folder, here, "--numprocesses=2"),
        "over hosts, tests passed": passed(folder, hosts, "-m", "cluster"),
    }


def passed(folder: Path, files: list[Path], *options: str) -> int:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--basetemp={folder / 'tests'}", *map(str, files)],
        cwd=ROOT,
        env=os.environ | {ALL: "all"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return int(re.findall(r"(\d+) passed", done.stdout)[-1])
