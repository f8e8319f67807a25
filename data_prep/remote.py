"""Reading a file at a URL (http, https, s3, …) to the end, through faults that pass.

Credentials and endpoints are found where the storage's own clients look (AWS_ENDPOINT_URL, ~/.aws, …).
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from data_prep.errors import UserError

_log = logging.getLogger(__name__)

PIECE_BYTES = 8 << 20  # asked for in one request; a failed one costs no more than this again
_ATTEMPTS = 8  # in a row without a byte of progress: with the delays below, about a minute
_FIRST_DELAY_SECONDS = 0.5
_LONGEST_DELAY_SECONDS = 30.0
_TIMEOUT_SECONDS = 30  # to connect, and between two bytes of an answer

T = TypeVar("T")


class MissingError(UserError):
    """The server answers, and has no such file."""


class UnreachableError(UserError):
    """Still no whole answer after all tries: nothing is known about the file."""


class _IncompleteError(Exception):
    """An answer of another length than asked for."""


def download(url: str, descriptor: int, num_bytes: int, sha256: str) -> None:
    """Writes a file of known size and hash to a descriptor.

    Raises UserError if it is missing, still unreachable after about a minute, or not the one recorded.
    """
    actual = ""
    for _ in range(2):  # a second time, in case a proxy garbled the first
        digest = hashlib.sha256()
        offset = 0
        for piece in _pieces(url, 0, num_bytes, num_bytes):
            digest.update(piece)
            _write(url, descriptor, piece, offset)
            offset += len(piece)
        actual = digest.hexdigest()
        if actual == sha256:
            return
    raise UserError(
        f"{url}: sha256 {actual[:16]}…, expected {sha256[:16]}… (changed or damaged); "
        "restore the file, or prepare the dataset again"
    )


def read_whole(url: str, sha256: str | None = None) -> bytes:
    """A whole file of unknown size, in memory; raises as `download`."""
    content = _retried(url, lambda: _request(url, None, None))
    actual = hashlib.sha256(content).hexdigest()
    if sha256 is not None and actual != sha256:
        raise UserError(
            f"{url}: sha256 {actual[:16]}…, expected {sha256[:16]}… (changed or damaged); "
            "restore the file, or prepare the dataset again"
        )
    return content


def read_part(url: str, start: int, stop: int, num_bytes: int) -> bytes:
    """Bytes [start, stop) of a file of known size; raises as `download`."""
    return b"".join(_pieces(url, start, stop, num_bytes))


def file_size(url: str) -> int | None:
    """Bytes of a file; None if the server does not say. Raises as `download`."""

    def request() -> int | None:
        system, path = _system(url)
        size: int | None = system.info(path)["size"]
        return size

    return _retried(url, request)


def _pieces(url: str, start: int, stop: int, num_bytes: int) -> Iterator[bytes]:
    """Bytes [start, stop), some at a time; all of them at once from a server that ignores ranges."""
    while start < stop:
        end = min(start + PIECE_BYTES, stop)

        def request(start: int = start, end: int = end) -> bytes:
            piece = _request(url, start, end)
            if len(piece) == num_bytes:
                return piece[start:stop]
            if len(piece) != end - start:
                raise _IncompleteError(f"{start + len(piece):,} bytes, expected {num_bytes:,} (truncated or changed)")
            return piece

        piece = _retried(url, request)
        yield piece
        start += len(piece)


def _write(url: str, descriptor: int, piece: bytes, offset: int) -> None:
    view = memoryview(piece)
    try:
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
    except OSError as error:
        raise UserError(f"{url}: cannot be cached ({error.strerror}); free some space") from None


def _retried(url: str, request: Callable[[], T]) -> T:
    """What a request gives, asked again while its faults may pass."""
    fault = ""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return request()
        except UserError:
            raise
        except Exception as error:  # every storage client has exceptions of its own
            fault = _passing_fault(url, error)
        if attempt < _ATTEMPTS:
            delay = min(_LONGEST_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2 ** (attempt - 1))
            delay *= random.uniform(0.75, 1.25)  # so that a thousand nodes do not come back at once
            _log.warning("%s: %s; try %d of %d in %.1f s", url, fault, attempt + 1, _ATTEMPTS, delay)
            time.sleep(delay)
    raise UnreachableError(
        f"{url}: {fault}, after {_ATTEMPTS} tries; check the server and your access to it, or restore the file there"
    )


def _passing_fault(url: str, error: Exception) -> str:
    """One line for an error that may pass; raises UserError for one that will not."""
    if isinstance(error, _IncompleteError):
        return str(error)
    if url.startswith("http") and isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # asked for a size, the client calls every fault of the server "not found"
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) or status == 404:
        raise MissingError(f"{url}: missing; restore the file, or prepare the dataset again") from None
    if isinstance(error, PermissionError) or status in (401, 403):
        raise UserError(f"{url}: not allowed; check the credentials for it") from None
    return f"{type(error).__name__} {error}".strip()


def _request(url: str, start: int | None, stop: int | None) -> bytes:
    system, path = _system(url)
    data: bytes = system.cat_file(path, start=start, end=stop)
    return data


def _system(url: str) -> tuple[Any, str]:
    """The storage's client, and the file's path in its words."""
    from fsspec.core import url_to_fs

    try:
        found: tuple[Any, str] = url_to_fs(url, **_storage_options(url))
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {error} (for s3:// run `pip install globallocal[s3]`)") from None
    return found


def _storage_options(url: str) -> dict[str, Any]:
    """Time limits in each client's own words: without them a silent server would be waited for, for ever."""
    protocol = url.partition("://")[0]
    if protocol in ("http", "https"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT_SECONDS, sock_read=_TIMEOUT_SECONDS)
        return {"client_kwargs": {"timeout": limits}}
    if protocol == "s3":
        return {"config_kwargs": {"connect_timeout": _TIMEOUT_SECONDS, "read_timeout": _TIMEOUT_SECONDS}}
    return {}
