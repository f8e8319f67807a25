"""Files read whole, and from the disk."""

import os
from pathlib import Path


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def read(path: Path) -> None:
    """In blocks of 8 MiB, each over the one before."""
    block = bytearray(1 << 23)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def forget(folder: Path) -> None:
    """The files of a folder leave the page cache."""
    for path in files(folder):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
