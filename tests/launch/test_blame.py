"""Who failed, from lines that the real launchers printed."""

import pytest

from launch.jobs.failures import Blame, blame, first_cause

DEEPSPEED = (
    "[2026-11-25 14:24:59,597] [ERROR] [launch.py:259:sigkill_handler] ['/venv/bin/python3', '-u', "
    "'/project/pipeline/train.py', '--local_rank=1', '--config', '/shared/tiny.yaml'] exits with return code = "
)
RESET = "globallocal: rank 0 on n0 failed in backward: RuntimeError: Read error [10.77.0.12]: Connection reset by peer"


@pytest.mark.parametrize(
    ("line", "node", "what", "certain"),
    [
        (DEEPSPEED + "-9", "", "local rank 1 ended by signal 9", True),
        ("10.77.0.11: " + DEEPSPEED + "1", "10.77.0.11", "local rank 1 on 10.77.0.11 failed (exit code 1)", False),
        ("pdsh@vm: n1: ssh exited with exit code 255", "n1", "node n1 failed (exit code 255)", True),
        ("pdsh@vm: n1: ssh exited with exit code 1", "n1", "node n1 failed (exit code 1)", False),
        ("srun: error: s1: task 1: Killed", "s1", "rank 1 on s1 failed: Killed", True),
        (
            "srun: error: s1: tasks 8-15: Exited with exit code 1",
            "s1",
            "rank 8-15 on s1 failed: Exited with exit code 1",
            False,
        ),
        (RESET, "n0", RESET.removeprefix("globallocal: "), False),
        (
            "0: hang: rank 3 (host n1, process 77) has not moved for 600 s in backward, after step 4",
            "n1",
            "hang: rank 3 (host n1, process 77) has not moved for 600 s in backward, after step 4",
            True,
        ),
        (
            "n1: globallocal: rank 3 on n1 failed in data: OSError: No space left on device",
            "n1",
            "rank 3 on n1 failed in data: OSError: No space left on device",
            True,
        ),
    ],
)
def test_a_failure_is_read_from_a_line(line: str, node: str, what: str, certain: bool) -> None:
    assert blame(line) == Blame(node, what, certain)


@pytest.mark.parametrize(
    "line",
    [
        "n0: step 5/40  loss 6.2",
        DEEPSPEED + "75",
        "pdsh@vm: n1: ssh exited with exit code 75",
        "srun: error: s0: task 0: Exited with exit code 75",
        "srun: error: s0: task 0: Terminated",
        "srun: Force Terminated StepId=2.1",
    ],
)
def test_progress_and_ends_on_request_blame_nobody(line: str) -> None:
    assert blame(line) is None


def test_what_follows_from_a_dead_node_is_not_its_cause() -> None:
    lines = [RESET, "pdsh@vm: n0: ssh exited with exit code 1", "pdsh@vm: n1: ssh exited with exit code 255"]
    cause = first_cause([item for item in map(blame, lines) if item])
    assert cause is not None
    assert cause.node == "n1"
    assert first_cause([]) is None
