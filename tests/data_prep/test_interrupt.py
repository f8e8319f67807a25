"""Ctrl-C: one line that says what the same command does next, exit code 130, nobody left; whatever it was at."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from data_prep.engines import ProcessEngine
from data_prep.errors import UserError
from data_prep.sources.documents import ReadCounts  # noqa: F401  imported once here, not in the time of the first test
from tests.conftest import ROOT
from tests.data_prep.conftest import sentences
from tests.pipeline.servers_fixture import wait_until


@pytest.fixture(scope="module")
def long_document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One document of 120 MB, each word another, which takes any encoder its time, and a short one."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "a.txt").write_text(random.Random(0).randbytes(54_500_000).hex(" ", 5), encoding="utf-8")
    (folder / "b.txt").write_text("short", encoding="utf-8")
    return folder


def interrupted(at_work, *arguments: object) -> tuple[int, str]:
    """Exit code and stderr of a command that gets SIGINT, as from a terminal, once `at_work(its children)`."""
    command = [sys.executable, "-m", "launch", *map(str, arguments)]
    pipe = subprocess.PIPE
    job = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    family: list[psutil.Process] = []

    def busy() -> bool:
        assert job.poll() is None, job.communicate()
        family[:] = psutil.Process(job.pid).children(recursive=True)
        return at_work(family)

    wait_until(busy, 120)
    os.killpg(job.pid, signal.SIGINT)
    _, errors = job.communicate(timeout=60)
    assert psutil.wait_procs(family, timeout=20)[1] == []
    return job.returncode, errors


def working(seconds: float):
    """Whether one of the processes has worked so long."""

    def busy(family: list[psutil.Process]) -> bool:
        times = []
        for process in family:
            try:
                times.append(process.cpu_times().user)
            except psutil.Error:
                times.append(0.0)
        return any(time > seconds for time in times)

    return busy


@pytest.mark.parametrize("workers", [1, 2])
def test_prepare_ends_at_once_in_the_middle_of_a_long_document(workers, long_document, tokenizer_folder, tmp_path):
    output = tmp_path / "dataset"
    options = ("--source", "files", "--path", long_document, "--tokenizer", tokenizer_folder, "--output", output)
    code, errors = interrupted(working(3), "prepare", *options, "--workers", workers)
    line = f"interrupted: {output}: what is finished stays; the same command goes on from there"
    assert (code, errors.splitlines()[-1:]) == (130, [line])
    assert "Traceback" not in errors
    assert not (output / "manifest.json").exists()


def test_prepare_on_ray_ends_at_once_and_leaves_no_cluster(long_document, tokenizer_folder, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="--engine ray needs Ray: pip install ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    output = tmp_path / "dataset"
    options = ("--source", "files", "--path", long_document, "--tokenizer", tokenizer_folder, "--output", output)

    def at_work(family: list[psutil.Process]) -> bool:
        return working(3)([process for process in family if name_of(process).startswith("ray::")])

    code, errors = interrupted(at_work, "prepare", *options, "--engine", "ray")
    line = f"interrupted: {output}: what is finished stays; the same command goes on from there"
    assert (code, errors.splitlines()[-1:]) == (130, [line])
    assert "Traceback" not in errors
    assert not (output / "manifest.json").exists()


def test_an_error_ends_workers_that_are_in_the_middle_of_large_results():
    def first_results() -> None:
        with ProcessEngine(2).start(large_result) as run:
            for count, _ in enumerate(run(range(1_000))):
                if count == 4:
                    raise KeyboardInterrupt

    before = set(threading.enumerate())
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            first_results()
    assert set(threading.enumerate()) <= before  # one that still read would keep the command from ending


def test_a_worker_killed_in_the_middle_of_a_result_is_said(monkeypatch):
    monkeypatch.setattr("data_prep.engines.LOOK_SECONDS", 0.5)
    with pytest.raises(UserError, match="a worker process was killed"), ProcessEngine(2).start(half_result) as run:
        list(run(range(8)))


def half_result(number: int) -> bytes:
    """As if the kernel killed the worker while it writes its result."""
    if number == 3:
        Connection._send = write_half_and_die  # type: ignore[attr-defined]
    return bytes(1_000_000)


def write_half_and_die(connection: Connection, content: bytes) -> None:
    if len(content) > 100_000:
        os.write(connection.fileno(), content[:5])
        os.kill(os.getpid(), signal.SIGKILL)
    os.write(connection.fileno(), content)


def large_result(_: int) -> bytes:
    return bytes(10_000_000)


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_training_a_tokenizer_ends_at_once_and_writes_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(sentences(5, 200_000)), encoding="utf-8")
    output = tmp_path / "tokenizer"
    options = ("--source", "files", "--path", tmp_path / "a.txt", "--model-type", "unigram", "--output", output)
    code, errors = interrupted(working(3), "tokenizer", *options)
    assert (code, errors) == (130, f"interrupted: {output}: nothing was written; the same command begins anew\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]
