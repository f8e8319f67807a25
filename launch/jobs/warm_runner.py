"""DeepSpeed's runner as a standby: its imports are done, and it waits for the arguments of its command.

They come as one line of JSON on standard input, since hosts and port are known only when it is needed. At the end of
standard input, as where `globallocal` has gone, it leaves.
"""

import json
import sys
from collections.abc import Sequence

COMMAND = (sys.executable, "-m", "launch.jobs.warm_runner")


def order(command: Sequence[str]) -> bytes:
    """The line that makes the waiting runner do what the `deepspeed …` command would do."""
    return json.dumps(command[1:]).encode() + b"\n"


def main() -> None:
    from deepspeed.launcher import runner

    if line := sys.stdin.readline():
        runner.main(json.loads(line))


if __name__ == "__main__":
    main()
