"""docs/cluster.md shows what `launch --dry-run` prints, for each way to launch."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from launch.cli import main
from launch.jobs.environment import FORWARDED
from tests.conftest import ROOT

DOC = ROOT / "docs" / "cluster.md"
BLOCKS = re.findall(r"<!-- dry-run -->\n```\n\$ globallocal (.*)\n((?s:.*?))```", DOC.read_text())


def neutral(text: str, folder: Path) -> str:
    """The same on every machine: the project in /shared/globallocal, started from there."""
    text = text.replace(str(Path(sys.executable).parent), "/shared/globallocal/.venv/bin")
    text = text.replace(Path(sys.executable).name, "python")
    text = text.replace(str(ROOT), "/shared/globallocal").replace(str(folder), "/shared/globallocal")
    return re.sub(r"(GLOBALLOCAL_JOB=)[0-9a-f]{16}", r"\g<1>0123456789abcdef", text)


def test_every_way_is_shown() -> None:
    assert [word for command, _ in BLOCKS for word in ("--local", "--hostfile", "--slurm") if word in command] == [
        "--local",
        "--hostfile",
        "--slurm",
    ]


@pytest.mark.parametrize(("command", "shown"), BLOCKS)
def test_the_page_shows_what_is_printed(
    command: str,
    shown: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in os.environ:
        if FORWARDED.match(name):
            monkeypatch.delenv(name)
    if "--slurm" not in command:
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        monkeypatch.setenv("OMP_NUM_THREADS", "8")
    (hosts,) = re.findall(r"```\n((?:\S+ slots=\d+\n)+)```", DOC.read_text())
    (tmp_path / "hostfile").write_text(hosts)
    shutil.copytree(ROOT / "launch" / "runs", tmp_path / "launch" / "runs")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 0
    assert neutral(capsys.readouterr().out, tmp_path) == shown
    assert not (tmp_path / "runs").exists(), "a dry run writes nothing"
