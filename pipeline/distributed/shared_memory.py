"""What DeepSpeed's CPU collectives leave in /dev/shm: a buffer of 69 MB per rank, which it never removes."""

import os
import time
from contextlib import suppress
from pathlib import Path

FOLDER = Path("/dev/shm")
NAME = "deepspeed_allreduce_buffer"
STALE_SECONDS = 600
"""A younger one may belong to a start that has not mapped it yet."""


def remove_own(rank: int) -> None:
    """Call it when all ranks have mapped each other's: the memory lives as long as they do, the name goes now."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    (FOLDER / f"{NAME}_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)


def sweep() -> None:
    """Remove this user's old ones that no process has mapped: of starts that were killed before `remove_own`."""
    now = time.time()
    old = []
    for path in FOLDER.glob(f"{NAME}_{os.getuid()}_*"):
        with suppress(OSError):
            if now - path.stat().st_mtime > STALE_SECONDS:
                old.append(path)
    if old:
        mapped = _mapped()
        for path in old:
            if path.name not in mapped:
                path.unlink(missing_ok=True)


def _mapped() -> set[str]:
    """Names of the buffers that living processes of this user hold."""
    names = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            for line in maps.read_text(errors="replace").splitlines():
                if NAME in line:
                    names.add(line.rstrip().rsplit("/", 1)[-1].removesuffix(" (deleted)"))
    return names
