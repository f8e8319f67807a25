"""What a rank that fails says: the line that the launcher takes as the cause of a restart."""

import platform

import pytest

from launch.jobs.failures import blame
from pipeline.distributed.clock import Clock
from pipeline.train import last_words


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
