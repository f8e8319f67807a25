"""Walk README and docs as typed, in an empty folder elsewhere: with the wheel, and with a clone of the checkout.

    make release-check                        # packages installed anew: some minutes
    make release-check ARGS=--beside          # packages of this environment

What is not run is marked in the page, with the reason. The one thing that is typed otherwise: trainings are shorter.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_prep.sources.documents import ReadCounts
from data_prep.sources.sample import SampleArticles
from tests.conftest import ROOT
from tests.deploy.packages import (
    build_sdist,
    build_wheel,
    environment_beside_this,
    environment_from_nothing,
    run,
)
from tests.deploy.pages import walked

SHORTER = (
    (r"(globallocal train .*?)training\.max_steps=\d+", r"\1training.max_steps=30"),
    (r"^(globallocal train +--config launch/runs/quickstart\.yaml)$", r"\1 training.max_steps=40"),
)
PART_CHARACTERS = 4000
"""Of an article, one file: so many files that a hundredth of them is some."""
FINE = {"globallocal doctor": (0, 1), "globallocal config diff": (0, 1)}
"""Exit codes of commands that say with 1 that they found something; of the others 0 alone is fine."""


def main(beside: bool) -> int:
    with tempfile.TemporaryDirectory(prefix="globallocal-release-") as name:
        folder = Path(name)
        wheel, sdist = build_wheel(folder), build_sdist(folder)
        say(f"built {wheel.name} and {sdist.name}")
        install = environment_beside_this if beside else environment_from_nothing
        extras = "" if beside else "[sample]"
        python = install(folder / "wheel", f"{wheel}{extras}")
        run(python, "-c", "import launch; assert 'site-packages' in launch.__file__", cwd=folder)
        other = environment_beside_this(folder / "sdist", sdist)
        assert installed(other) == installed(python), "the sdist installs other files than the wheel"
        say("the sdist installs the files of the wheel")
        failed = walk("wheel", python, texts(folder / "wheel-walk"))
        clone = folder / "checkout"
        run("git", "clone", "--quiet", ROOT, clone)
        python = install(folder / "editable", "--editable", f"{clone}{extras}")
        failed += walk("checkout", python, texts(clone))
    for line in failed:
        say(f"FAILED {line}")
    return 1 if failed else 0


def installed(python: Path) -> set[str]:
    (packages,) = python.parents[1].glob("lib/python*/site-packages")
    return {
        str(path.relative_to(packages))
        for room in ("data_prep", "model", "pipeline", "launch", "ds_configs")
        for path in (packages / room).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def texts(folder: Path) -> Path:
    """The working folder, with what the pages take for yours: texts, books, prompts."""
    for name in ("texts", "books"):
        (folder / name).mkdir(parents=True)
    counts = ReadCounts()
    documents = [item for task in SampleArticles().tasks("train") for item in task.documents(counts)]
    for number, document in enumerate(documents):
        for part, begin in enumerate(range(0, len(document.text), PART_CHARACTERS)):
            text = document.text[begin : begin + PART_CHARACTERS]
            (folder / "texts" / f"{number:03d}-{part:02d}.txt").write_text(text)
    for path in sorted((folder / "texts").glob("00?-*.txt")):
        shutil.copy(path, folder / "books")
    shutil.copy(folder / "texts" / "010-00.txt", folder / "held-out.txt")
    (folder / "prompts.txt").write_text("The history of\nIn the year\n")
    return folder


def walk(what: str, python: Path, folder: Path) -> list[str]:
    """Each command once, in a shell, in order; those that fail, with the end of what they said."""
    failed = []
    environment = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    for command in dict.fromkeys(walked()):
        typed = command
        for pattern, shorter in SHORTER:
            typed = re.sub(pattern, shorter, typed)
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", typed],
            cwd=folder,
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        fine = next((codes for start, codes in FINE.items() if typed.startswith(start)), (0,))
        say(f"{what}: {time.monotonic() - began:4.0f} s, exit code {done.returncode}: {typed}")
        if done.returncode not in fine:
            failed.append(f"{what}: {typed}\n{done.stdout[-1500:]}")
    return failed


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main("--beside" in sys.argv[1:]))
