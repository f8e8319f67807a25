"""Files that several processes touch, or that must survive a crash: locks, and whole or nothing at all."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


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


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` as a whole: after a crash it holds the old text or the new."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
