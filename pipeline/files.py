"""Locks on files that several processes touch, and what the folder of one step is called."""

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

LOCK_FILE = ".lock"
"""In a run's folder: its holder trains, or changes checkpoints."""


def step_name(step: int) -> str:
    """What a file or folder of one step is called."""
    return f"step-{step:08d}"


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[int | None]:
    """Hold a lock on a file, which is made if it is missing; its descriptor, or None where another process holds it.

    The lock ends with its holder, however that dies.

    Args:
        wait: wait for another holder instead.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)


class HeldError(Exception):
    """Another process holds a lock; the text says who, as far as is known."""


def hold(path: Path, wait_seconds: float = 0.0) -> IO[str]:
    """Takes a lock for as long as the file that is returned is open, and writes into it who holds it.

    The lock ends with its holder, however that dies.

    Args:
        wait_seconds: how long to wait for another holder.

    Raises:
        HeldError: another process holds it.
        OSError: the file system makes no file there, or has no locks.
    """
    file = path.open("a+")
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.seek(0)
                raise HeldError(file.read().strip() or "another process") from None
            time.sleep(0.2)
    file.truncate(0)
    file.write(f"host {platform.node()}, process {os.getpid()}")
    file.flush()
    return file


def is_held(path: Path) -> bool:
    """Whether a process holds the lock, here or on a shared disk; a file that cannot be read is held by nobody."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
