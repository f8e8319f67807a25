"""The next start of a job, made ready while the present one trains: after a failure its imports are done already.

Its processes wait for a word on the standard input that they share: on one machine each rank for a byte, before it
meets the others and touches a device (`pipeline/distributed/turn.py`); over hosts DeepSpeed's runner for its arguments
(`warm_runner.py`). Where this process vanishes they read the end of it instead, and leave.
"""

import subprocess
from contextlib import suppress
from dataclasses import dataclass

from launch.jobs.session import Launch, end_session, start_session


@dataclass(frozen=True)
class Standby:
    """A job that waits for its turn.

    Attributes:
        launch: what `run_session` is given, with `process`, once it is its turn.
    """

    launch: Launch
    process: "subprocess.Popen[bytes]"

    @classmethod
    def of(cls, launch: Launch) -> "Standby":
        return cls(launch, start_session(launch, subprocess.PIPE))

    def go(self, word: bytes) -> bool:
        """Let it run. False where it has ended meanwhile; what was left of it is then ended too."""
        assert self.process.stdin is not None
        with suppress(OSError):
            if self.process.poll() is None:
                self.process.stdin.write(word)
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
