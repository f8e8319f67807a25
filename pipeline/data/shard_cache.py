"""Files from a URL in a folder that the ranks of a node share: downloaded once, checked, within a budget.

A cached file is named by its hash, so it can be neither stale nor mixed up. It is downloaded under a lock
(once per node, however many ranks ask), checked, and only then given its name. When the budget is full, the
least recently used go; a file that a rank still has open stays readable until it is closed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

from data_prep.errors import UserError
from data_prep.hashing import Digest
from data_prep.remote import download
from pipeline.files import locked

_log = logging.getLogger(__name__)
_NAME_LENGTHS = (64, 69)  # hex digits of a hash, and the same with ".part"


class ShardCache:
    """Files by their hashes in a folder of this node, together no larger than a budget.

    Args:
        folder: on a local disk; made if it is missing. Several jobs may share it.
        budget_bytes: downloads under way included.
    """

    def __init__(self, folder: str | Path, budget_bytes: int) -> None:
        self.folder = Path(folder)
        self.budget_bytes = budget_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cache folder {self.folder}: cannot be made ({error.strerror})") from None

    def open(self, url: str, digest: Digest, num_bytes: int) -> int:
        """A read-only descriptor of the file at `url`, downloaded first if need be.

        Raises UserError if it is missing there, still wrong after retries, or does not fit.
        """
        while (descriptor := self._open_cached(digest, num_bytes)) is None:
            self.fetch(url, digest, num_bytes)
        return descriptor

    def fetch(self, url: str, digest: Digest, num_bytes: int, wait: bool = True) -> None:
        """Makes sure that the file is cached, and marks it as used now.

        Args:
            wait: whether to wait for another process that is downloading it.
        """
        try:
            while not self._is_cached(digest, num_bytes):
                with locked(self.folder / f"{digest.hex}.part", wait) as descriptor:
                    if descriptor is None:
                        return  # another process is at it
                    self._fill(descriptor, url, digest, num_bytes)
        except OSError as error:
            raise UserError(
                f"cache {self.folder}: cannot be used ({error.strerror}); choose another data.cache_dir"
            ) from None

    def _fill(self, descriptor: int, url: str, digest: Digest, num_bytes: int) -> None:
        """Downloads into the locked file and names it; leaves the loop of `fetch` to see what came of it."""
        part = self.folder / f"{digest.hex}.part"
        if not _is_file(part, descriptor):
            return  # another process finished it, or gave up, while this one waited for the lock
        if (self.folder / digest.hex).exists():
            part.unlink()
            return
        try:
            self._reserve(descriptor, num_bytes)
            download(url, descriptor, num_bytes, digest)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        with locked(self.folder / "budget.lock", wait=True):  # whoever counts the files misses none between its names
            part.replace(self.folder / digest.hex)

    def _is_cached(self, digest: Digest, num_bytes: int) -> bool:
        descriptor = self._open_cached(digest, num_bytes)
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is not None

    def touch(self, digest: Digest) -> bool:
        """Marks a file as used now; False if it is not cached."""
        now = time.time_ns()
        try:
            os.utime(self.folder / digest.hex, ns=(now, now))
        except FileNotFoundError:
            return False
        return True

    def _open_cached(self, digest: Digest, num_bytes: int) -> int | None:
        path = self.folder / digest.hex
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size != num_bytes:  # a cache may heal itself: the truth is at the URL
            _log.warning("%s: cached file has another size than recorded; it is downloaded again", path)
            path.unlink(missing_ok=True)
            os.close(descriptor)
            return None
        self.touch(digest)  # what "recently used" means, to every process of the node
        return descriptor

    def _reserve(self, descriptor: int, num_bytes: int) -> None:
        """Claims room for a download by giving its file the final size; removes the least recently used."""
        with locked(self.folder / "budget.lock", wait=True):
            os.ftruncate(descriptor, 0)
            files = self._files()
            total_bytes = num_bytes + sum(size for _, size, _ in files)
            disk = os.fstatvfs(descriptor)
            missing_bytes = num_bytes - disk.f_bavail * disk.f_frsize  # others may have filled the disk
            for _, size, path in sorted(files):
                if total_bytes <= self.budget_bytes and missing_bytes <= 0:
                    break
                if _remove_idle(path):
                    total_bytes -= size
                    missing_bytes -= size
            if total_bytes > self.budget_bytes:
                raise UserError(
                    f"cache {self.folder}: budget {self.budget_bytes:,} bytes, but the files in use and the next "
                    f"one ({num_bytes:,} bytes) need {total_bytes:,}; raise data.cache_bytes"
                )
            try:
                os.posix_fallocate(descriptor, 0, num_bytes)
            except OSError as error:
                raise UserError(
                    f"cache {self.folder}: no room for {num_bytes:,} bytes ({error.strerror}); "
                    "free some space, or name a data.cache_dir on another disk"
                ) from None

    def _files(self) -> list[tuple[int, int, Path]]:
        """(last use, bytes, path) of every file, those being downloaded included."""
        files: list[tuple[int, int, Path]] = []
        for entry in os.scandir(self.folder):
            if len(entry.name) in _NAME_LENGTHS:
                with contextlib.suppress(FileNotFoundError):
                    files.append((entry.stat().st_mtime_ns, entry.stat().st_size, Path(entry.path)))
        return files


def _is_file(path: Path, descriptor: int) -> bool:
    """Whether the path still names the file that was opened."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_idle(path: Path) -> bool:
    """Removes a cached file, unless it is being downloaded: what a dead process left half-way goes too."""
    if path.suffix != ".part":
        path.unlink(missing_ok=True)
        return True
    with locked(path, wait=False) as descriptor:
        if descriptor is None:
            return False
        path.unlink(missing_ok=True)
    return True
