"""How a rank comes to its turn: started when it is needed, or before that, as a standby with its imports done."""

import os

import psutil

from pipeline.distributed.clock import Clock

STANDBY_VARIABLE = "GLOBALLOCAL_STANDBY"
"""Set for the ranks of a standby: each waits for one byte `GO` on the standard input that they share."""
GO = b"g"
STARTED_VARIABLE = "GLOBALLOCAL_STARTED"
"""When the job was started, in seconds since 1970, by the clock of this machine."""


def take_turn() -> Clock:
    """Return, once it is this rank's turn, with the clock of this start.

    A standby whose launcher has gone is not needed any more, and ends.
    """
    if STANDBY_VARIABLE in os.environ:
        if os.read(0, 1) != GO:
            os._exit(0)
        clock = Clock()
        clock.end_part("standby")
        return clock
    born = psutil.Process().create_time()
    clock = Clock(float(os.environ.get(STARTED_VARIABLE, born)))
    clock.end_part("launcher", born)
    clock.end_part("imports")
    return clock
