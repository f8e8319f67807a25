"""A job on this machine: the devices that it is given, and its port."""

import socket
from pathlib import Path

import pytest

from data_prep.errors import UserError
from launch.jobs import local
from launch.jobs.environment import deepspeed_env
from launch.jobs.failures import blame, first_cause
from launch.jobs.local import LocalRun
from launch.jobs.restarts import Failure, Verdict, record, recorded
from pipeline.config import load_config
from pipeline.tracking.restarts import RESTARTS_FILE, restart_tags

CONFIG = Path("launch/runs/quickstart.yaml")


def run_of(processes: int | None = None, port: int | None = None) -> LocalRun:
    return LocalRun(CONFIG, (), load_config(CONFIG), processes, port)


def test_the_devices_that_are_visible_are_those_that_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "local_devices", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    both, one = run_of().job(29500), run_of(1).job(29500)
    assert both.environment == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert one.environment == {"CUDA_VISIBLE_DEVICES": "2"}
    # DeepSpeed's launcher drops the variable where it is told a number.
    assert not [word for word in (*both.command, *one.command) if word.startswith("--num")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1,GPU-2")
    with pytest.raises(UserError, match="takes device numbers, such as 2,3"):
        run_of().job(29500)


def test_two_jobs_at_once_have_two_ports_and_a_taken_one_is_a_line() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--master-port {port} is taken"):
            run_of(2, port).start([])
    assert run_of(2).port is None


def test_the_users_own_variables_may_hold_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("# network\n\nNCCL_DEBUG=INFO\nexport WORDS=a b=c\n")
    assert deepspeed_env() == {"NCCL_DEBUG": "INFO", "WORDS": "a b=c"}
    (tmp_path / ".deepspeed_env").write_text("NCCL DEBUG\n")
    with pytest.raises(UserError, match="line 1: 'NCCL DEBUG' is no NAME=value; correct or remove it"):
        deepspeed_env()


def test_the_rank_that_left_without_a_word_is_to_blame_not_the_one_that_missed_it() -> None:
    lines = [
        "globallocal: rank 0 on host failed in training: RuntimeError: Connection reset by peer",
        "[2026-01-01 00:00:00] [ERROR] [launch.py:325:sigkill_handler] ['python', '-u', 'train.py', "
        "'--local_rank=1', '--config', 'x.yaml'] exits with return code = 3",
    ]
    cause = first_cause([told for told in map(blame, lines) if told])
    assert cause is not None
    assert cause.what == "local rank 1 failed (exit code 3)"


def test_a_torn_line_of_the_restarts_is_passed_over(tmp_path: Path) -> None:
    record(tmp_path, Failure("first", 3, 1), Verdict(True, "again"), "job")
    with open(tmp_path / RESTARTS_FILE, "a") as file:
        file.write('{"time": 1, "cau')
    record(tmp_path, Failure("second", 4, 1), Verdict(True, "again"), "job")
    assert [failure.cause for failure in recorded(tmp_path, "job")] == ["first", "second"]
    assert restart_tags(tmp_path)["globallocal.restarts"] == "2"
