"""The next start of a job, made ready while the present one trains: after a failure its imports are done already.

DeepSpeed's launchers and the ranks are started as ever; each rank then waits, before it meets the others and touches a
device, for a byte on its standard input (`pipeline/distributed/turn.py`). Where this process vanishes they read the end
of it instead, and leave.
"""

import subprocess
from contextlib import suppress
from dataclasses import dataclass, replace

from launch.jobs.session import Launch, end_session, start_session
from pipeline.distributed.turn import GO, STANDBY_VARIABLE


@dataclass(frozen=True)
class Standby:
    """A job that waits for its turn.

    Attributes:
        launch: what `run_session` is given, with `process`, once it is its turn.
    """

    launch: Launch
    process: "subprocess.Popen[bytes]"
    ranks: int

    @classmethod
    def of(cls, launch: Launch, ranks: int) -> "Standby":
        """Start a job of so many ranks on this machine as a standby."""
        launch = replace(launch, environment={**launch.environment, STANDBY_VARIABLE: "1"})
        return cls(launch, start_session(launch, subprocess.PIPE), ranks)

    def go(self) -> bool:
        """Let it run. False where it has ended meanwhile; what was left of it is then ended too."""
        assert self.process.stdin is not None
        with suppress(OSError):
            if self.process.poll() is None:
                self.process.stdin.write(GO * self.ranks)
                self.process.stdin.close()
                return True
        self.end()
        return False

    def end(self) -> None:
        """It is not needed."""
        assert self.process.stdin is not None
        end_session(self.process.pid, patience_seconds=0)
        with suppress(OSError):
            self.process.stdin.close()
        self.process.wait()
