"""The place of a dataset: a folder, or a prefix behind any fsspec URL such as s3://bucket/data.

Both publish whole files or none. A folder is locked by the operating system, which releases it when the
process dies. A prefix cannot be: whoever comes last owns it, and an earlier owner stops before its next
journal line. As equal settings give equal bytes, neither can spoil what the other wrote.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from data_prep import remote
from data_prep.errors import UserError

WORK_FOLDER = ".prepare"  # of the dataset: journal and lock; gone when the dataset is finished
BLOCK_BYTES = 1 << 20  # stays in a core's cache from the copy out of the kernel until it is hashed


class Store(Protocol):
    """A place for files. Names may hold one folder: `tokenizer/tokenizer.model`.

    All methods raise UserError, with a remedy, for a full disk, missing rights and the like.
    """

    where: str

    def lock(self) -> None:
        """Makes this process the only writer. Raises UserError if another one is at work."""
        ...

    def unlock(self) -> None: ...

    def publish(self, name: str, content: bytes) -> None:
        """Writes a file, so that at any moment it is absent (or the old one), or whole and durable."""
        ...

    def append(self, name: str, before: bytes, line: bytes) -> None:
        """Adds a line to a file whose content is `before`; durable on return."""
        ...

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is none."""
        ...

    def read_part(self, name: str, start: int, stop: int, num_bytes: int) -> bytes:
        """Bytes [start, stop) of a file of `num_bytes`. Raises UserError if it is missing or shorter."""
        ...

    def read_into(self, name: str, buffer: memoryview, seen: Callable[[memoryview], object]) -> None:
        """Fills `buffer` with a file of that many bytes; `seen` gets each block of it. Raises as `read_part`."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is none."""
        ...

    def sizes(self) -> dict[str, int | None]:
        """Files and folders directly in the store, with their bytes if the listing has them; empty if it has none."""
        ...

    def names(self) -> list[str]:
        """Files and folders directly in the store, sorted."""
        ...

    def remove_work_folder(self) -> None: ...


def open_store(where: str | Path) -> Store:
    """The store at a path or URL; nothing is created yet."""
    if str(where) == "":
        raise UserError("'' names no folder; give one, or a URL")
    if "://" in str(where) and not str(where).startswith("file://"):
        return RemoteStore(str(where))
    return FolderStore(Path(str(where).removeprefix("file://")))


class FolderStore:
    """A local (or mounted) folder."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._folder = folder
        self._lock = FileLock(folder / WORK_FOLDER / "lock")

    def lock(self) -> None:
        work = self._folder / WORK_FOLDER
        with explained_write_errors(work):
            work.mkdir(parents=True, exist_ok=True)
            sync_folder(self._folder)
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                raise UserError(
                    f"{self.where}: another preparation is writing into this folder; wait for it, or "
                    "choose another folder"
                ) from None

    def unlock(self) -> None:
        self._lock.release()

    def publish(self, name: str, content: bytes) -> None:
        path = self._folder / name
        with explained_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            publish_file(path, content)

    def append(self, name: str, before: bytes, line: bytes) -> None:
        path = self._folder / name
        with explained_write_errors(path), open(path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if not before:
            sync_folder(path.parent)

    def read(self, name: str) -> bytes | None:
        with explained_read_errors(self.where):
            try:
                return (self._folder / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def read_part(self, name: str, start: int, stop: int, num_bytes: int) -> bytes:
        path = self._folder / name
        with _explained_part(path), open(path, "rb") as file:
            file.seek(start)
            content = file.read(stop - start)
        if len(content) < stop - start:
            raise _truncated(path, start + len(content), num_bytes)
        return content

    def read_into(self, name: str, buffer: memoryview, seen: Callable[[memoryview], object]) -> None:
        path, at = self._folder / name, 0
        with _explained_part(path), open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer[at : at + BLOCK_BYTES]):
                seen(buffer[at : at + count])
                at += count
        if at < len(buffer):
            raise _truncated(path, at, len(buffer))

    def size(self, name: str) -> int | None:
        path = self._folder / name
        return path.stat().st_size if path.exists() else None

    def sizes(self) -> dict[str, int | None]:
        return {name: self.size(name) for name in self.names()}

    def names(self) -> list[str]:
        if self._folder.exists() and not self._folder.is_dir():
            raise UserError(f"{self.where}: a file, not a folder; choose another output")
        return sorted(path.name for path in self._folder.iterdir()) if self._folder.exists() else []

    def remove_work_folder(self) -> None:
        shutil.rmtree(self._folder / WORK_FOLDER, ignore_errors=True)


class RemoteStore:
    """A prefix of an object store."""

    OWNER = f"{WORK_FOLDER}/owner"

    def __init__(self, url: str) -> None:
        import fsspec

        self.where = url.rstrip("/")
        self._nonce = secrets.token_hex(8).encode()
        with explained_read_errors(self.where):
            self._filesystem, self._prefix = fsspec.core.url_to_fs(self.where, use_listings_cache=False)

    def _path(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def lock(self) -> None:
        self.publish(self.OWNER, self._nonce)

    def unlock(self) -> None: ...

    def publish(self, name: str, content: bytes) -> None:
        with explained_write_errors(f"{self.where}/{name}"):
            self._filesystem.pipe_file(self._path(name), content)

    def append(self, name: str, before: bytes, line: bytes) -> None:
        if self.read(self.OWNER) != self._nonce:
            raise UserError(
                f"{self.where}: another preparation took over this prefix, and this one stops; "
                "wait for the other, or choose another prefix"
            )
        self.publish(name, before + line)

    def read(self, name: str) -> bytes | None:
        try:
            return remote.read_whole(f"{self.where}/{name}")
        except remote.MissingError:
            return None

    def read_part(self, name: str, start: int, stop: int, num_bytes: int) -> bytes:
        return remote.read_part(f"{self.where}/{name}", start, stop, num_bytes)

    def read_into(self, name: str, buffer: memoryview, seen: Callable[[memoryview], object]) -> None:
        at = 0
        for block in remote.stream(f"{self.where}/{name}", 0, len(buffer), len(buffer)):
            buffer[at : at + len(block)] = block
            seen(buffer[at : at + len(block)])
            at += len(block)

    def size(self, name: str) -> int | None:
        try:
            return remote.file_size(f"{self.where}/{name}")
        except remote.MissingError:
            return None

    def sizes(self) -> dict[str, int | None]:
        with explained_read_errors(self.where):
            try:
                listing: list[dict[str, Any]] = self._filesystem.ls(self._prefix, detail=True)
            except Exception as error:
                if isinstance(error, FileNotFoundError) or self.where.startswith("http"):  # which need not list
                    return {}
                raise
            return {entry["name"].rstrip("/").rsplit("/", 1)[1]: entry["size"] for entry in listing}

    def names(self) -> list[str]:
        return sorted(self.sizes())

    def remove_work_folder(self) -> None:
        with explained_write_errors(self.where):
            self._filesystem.rm(self._path(WORK_FOLDER), recursive=True)


def publish_file(path: Path, content: bytes) -> None:
    """Replaces `path` as a whole: after a crash it holds what it held before, or `content`, and goes on doing so."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames and new files in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained_part(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fault = "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{path}: {fault}; restore the file, or prepare the dataset again") from None


def _truncated(path: Path, actual: int, expected: int) -> UserError:
    return UserError(
        f"{path}: {actual:,} bytes, expected {expected:,} (truncated); restore the file, or prepare the dataset again"
    )


@contextmanager
def explained_write_errors(where: Path | str) -> Iterator[None]:
    """Turns the operating system's refusals into lines with a remedy."""
    try:
        yield
    except OSError as error:
        remedies = {
            errno.ENOSPC: "the disk is full: free some space",
            errno.EDQUOT: "the disk quota is used up: free some space",
            errno.EROFS: "the file system is read-only: choose another folder",
            errno.EACCES: "no permission to write there: choose another folder, or change its permissions",
            errno.EPERM: "no permission to write there: choose another folder, or change its permissions",
            errno.ENOTDIR: "part of the path is a file: choose another folder",
            errno.EEXIST: "part of the path is a file: choose another folder",
        }
        other = f"{error.strerror or error}: check the path, the disk and your access to it"
        remedy = remedies.get(error.errno or 0, other)
        raise UserError(
            f"{where}: cannot be written; {remedy}. What is finished stays; the same command goes on from there"
        ) from error


@contextmanager
def explained_read_errors(where: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{where}: cannot be read ({error}); check the path and your access to it") from error
