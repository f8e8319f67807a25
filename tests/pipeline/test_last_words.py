"""What a rank that fails says: the line that the launcher takes as the cause of a restart."""

import logging
import platform
import sys
from pathlib import Path

import pytest

from launch.jobs.failures import blame
from pipeline.distributed.clock import Clock
from pipeline.train import TerminalFormatter, last_words


def test_the_innermost_phase_is_named() -> None:
    clock = Clock()
    with pytest.raises(OSError, match="No space") as caught, clock.phase("training"), clock.phase("data"):
        raise OSError(28, "No space\nleft")
    said = last_words(caught.value, 3)
    assert said == f"globallocal: rank 3 on {platform.node()} failed in data: OSError: [Errno 28] No space left"
    cause = blame(f"10.0.0.7: {said}\n")
    assert cause is not None
    assert (cause.node, cause.what, cause.certain) == (platform.node(), said.removeprefix("globallocal: "), True)


def test_outside_of_every_phase_it_is_the_start() -> None:
    assert "failed in start: ValueError: x" in last_words(ValueError("x"), 0)


def test_a_rank_that_lost_another_says_so_and_is_no_cause() -> None:
    reset = RuntimeError("[.../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:40966. GLHF!")
    said = last_words(reset, 0)
    assert said.endswith(
        "failed in start: another rank has gone: RuntimeError: Connection closed by peer [127.0.0.1]:40966"
    )
    cause = blame(said)
    assert cause is not None
    assert not cause.certain


def test_the_terminal_gets_one_line_and_the_log_the_traceback(tmp_path: Path) -> None:
    try:
        raise ValueError("x")
    except ValueError as error:
        record = logging.LogRecord("", logging.CRITICAL, "", 0, last_words(error, 1), (), sys.exc_info())
    assert "Traceback" in logging.Formatter().format(record)  # the file comes first, and the record keeps its text
    line = TerminalFormatter(tmp_path / "rank-00001.log").format(record)
    assert line.splitlines() == [line]
    assert line.endswith(f"failed in start: ValueError: x (traceback: {tmp_path}/rank-00001.log)")
    cause = blame(line + "\n")
    assert cause is not None
    assert cause.what.endswith("failed in start: ValueError: x")
