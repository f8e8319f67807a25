"""`globallocal tokenizer` on much text: seconds and memory, at a gigabyte and at ten."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import ROOT

GIGABYTES = (1, 10)
TRAINING_BYTES = 20_000_000
LOOK_SECONDS = 0.1


def measure(folder: Path, text: Path) -> dict[str, Any]:
    """The text's files stand in folders again and again: one copy on the disk, read as often as there are names."""
    shutil.copytree(text, folder / "once", copy_function=shutil.copyfile)
    figures = {f"{gigabytes} GB": of(folder, gigabytes * 1e9) for gigabytes in GIGABYTES}
    least, most = (figures[f"{gigabytes} GB"]["peak_megabytes"] for gigabytes in GIGABYTES)
    return {**figures, f"peak memory at {GIGABYTES[1]} GB over {GIGABYTES[0]} GB": most / least}


def of(folder: Path, size: float) -> dict[str, float]:
    path, output = folder / f"{size:.0f}", folder / f"{size:.0f}-tokenizer"
    files = sorted((folder / "once").glob("train_*.txt"))
    for number in range(round(size / sum(file.stat().st_size for file in files))):
        (path / f"{number:04d}").mkdir(parents=True)
        for file in files:
            os.link(file, path / f"{number:04d}" / file.name)
    words = ("tokenizer", "--source", "files", "--path", path, "--vocab-size", 16384, "--output", output)
    begin, peak = time.perf_counter(), 0
    with open(folder / "said", "w+") as said:
        command = [sys.executable, "-m", "launch", *words, "--training-bytes", TRAINING_BYTES]
        done = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=said, stderr=said)
        while done.poll() is None:
            peak = max(peak, held_bytes(done.pid))
            time.sleep(LOOK_SECONDS)
        seconds, text = time.perf_counter() - begin, (folder / "said").read_text()
    assert done.returncode == 0, text
    return {"seconds": seconds, "peak_megabytes": peak / 1e6, "lines_with_the_time_left": text.count(" s left")}


def held_bytes(pid: int) -> int:
    """Memory of a process and all below it, pages that several hold counted for each."""
    held = 0
    with suppress(psutil.Error):
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            with suppress(psutil.Error):
                held += process.memory_info().rss
    return held
