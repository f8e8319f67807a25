"""`python -m tests.alone COMMAND…`: a command on an island, and what it leaves there.

The island has processes, /tmp and /dev/shm of its own, so that nothing else on the machine is met or taken for the
command's. What still runs or lies in /dev/shm ten seconds after the command is named, and ends it with code 1; what it
wrote into /tmp is thrown away (where the project does not lie there itself). Namespaces want root and util-linux;
without them the command just runs.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

UNSHARE = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private")
PATIENCE_SECONDS = 10


def main(command: list[str]) -> int:
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the command, which ends in its own way
    if command[0] == "--on-the-island":
        return island(Path(command[1]), command[2:])
    if os.geteuid() != 0 or not shutil.which("unshare") or subprocess.run([*UNSHARE, "true"]).returncode:
        print("processes and shared memory left behind are not looked for: that needs root and util-linux", flush=True)
        return subprocess.run(command).returncode
    with tempfile.TemporaryDirectory(prefix="tests-", ignore_cleanup_errors=True) as folder:
        there = [sys.executable, "-m", "tests.alone", "--on-the-island", folder, *command]
        return subprocess.run([*UNSHARE, *there]).returncode


def island(temporary: Path, command: list[str]) -> int:
    """The first process of the namespaces: it inherits whoever loses his parent."""
    if not any(Path(place).is_relative_to("/tmp") for place in (Path.cwd(), sys.prefix, Path.home())):
        temporary.chmod(0o1777)
        subprocess.run(["mount", "--bind", str(temporary), "/tmp"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm"], check=True)
    job = subprocess.Popen(command)  # kept: one that is let go buries its child itself
    code = end_of(job.pid)
    left: list[str] = []
    for _ in range(PATIENCE_SECONDS):
        left = leftovers()
        if not left:
            break
        time.sleep(1)
    if left:
        print("left behind:", *left, sep="\n  ", flush=True)
    return code or bool(left)


def end_of(pid: int) -> int:
    """The exit code of a child; other children, orphans of others, are buried on the way."""
    while True:
        ended, status = os.wait()
        if ended == pid:
            return os.waitstatus_to_exitcode(status)


def leftovers() -> list[str]:
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                break
        except ChildProcessError:
            break
    running = [process for process in psutil.process_iter() if process.pid != os.getpid()]
    return [
        *(f"process {process.pid}: {' '.join(process.cmdline())[:300]}" for process in running),
        *(f"/dev/shm/{item.name}" for item in Path("/dev/shm").iterdir()),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
