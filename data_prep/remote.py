"""Reading at a URL (http, https, s3, …) through faults that pass: whoever reads says how many bytes there must be.

Preparing and training read through `stream`: it compares what arrives with what was announced, goes on after
the last byte that came, and gives up in one line with both sizes. Credentials and endpoints are found where
the storage's own clients look (AWS_ENDPOINT_URL, ~/.aws, …).
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from data_prep import retries
from data_prep.errors import UserError
from data_prep.hashing import Digest, hasher

_log = logging.getLogger(__name__)

PIECE_BYTES = 8 << 20  # asked of a storage client in one request; a failed one costs no more than this again
BLOCK_BYTES = 1 << 20
_ATTEMPTS = 8  # in a row without a byte of progress: with the delays below, about a minute
_FIRST_DELAY_SECONDS = 0.5
_LONGEST_DELAY_SECONDS = 30.0
_TIMEOUT_SECONDS = 30  # to connect, and between two bytes of an answer
_SLOW_SECONDS, _SLOWEST_BYTES = 60, 1024  # after so long, an answer must have brought so much per second
_SKIPPED_BYTES = 64 << 20  # of a server that ignores ranges, at most so much is read to get at what was asked for

T = TypeVar("T")


class MissingError(UserError):
    """The server answers, and has no such file."""


class UnreachableError(UserError):
    """Still no whole answer after all tries: nothing is known about the file."""


class _IncompleteError(Exception):
    """An answer of another length than asked for."""


class _StatusError(Exception):
    """An HTTP answer that is no success."""

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        super().__init__(f"HTTP {status} {reason}".strip())


@dataclass(frozen=True)
class FileState:
    """A file as a server describes it: its bytes (None: it does not say), and a mark that changes with its content."""

    num_bytes: int | None
    mark: str


def shown(url: str) -> str:
    """A URL as it may be printed: without its password and query, which may hold secrets."""
    if not url.startswith("http"):
        return url
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def download(url: str, descriptor: int, num_bytes: int, expected: Digest) -> None:
    """Writes a file of known size and hash to a descriptor.

    Raises UserError if it is missing, still unreachable after about a minute, or not the one recorded.
    """
    actual = ""
    for _ in range(2):  # a second time, in case a proxy garbled the first
        digest = hasher(expected.algorithm)
        offset = 0
        for block in stream(url, 0, num_bytes, num_bytes):
            digest.update(block)
            _write(url, descriptor, block, offset)
            offset += len(block)
        actual = digest.hexdigest()
        if actual == expected.hex:
            return
    raise UserError(
        f"{shown(url)}: {expected.algorithm} {actual[:16]}…, expected {expected.hex[:16]}… (changed or damaged); "
        "restore the file, or prepare the dataset again"
    )


def read_whole(url: str, sha256: str | None = None) -> bytes:
    """A whole file of unknown size, in memory; raises as `download`."""
    content = retried(url, lambda: b"".join(_answer(url, None, None, None)))
    actual = hashlib.sha256(content).hexdigest()
    if sha256 is not None and actual != sha256:
        raise UserError(
            f"{shown(url)}: sha256 {actual[:16]}…, expected {sha256[:16]}… (changed or damaged); "
            "restore the file, or prepare the dataset again"
        )
    return content


def read_part(url: str, start: int, stop: int, num_bytes: int) -> bytes:
    """Bytes [start, stop) of a file of known size; raises as `download`."""
    return b"".join(stream(url, start, stop, num_bytes))


def file_size(url: str) -> int | None:
    """Bytes of a file; None if the server does not say. Raises as `download`."""
    return file_state(url).num_bytes


def file_state(url: str) -> FileState:
    """Asks for a file's size and mark, not for its content. Raises as `download`."""

    def request() -> FileState:
        if url.startswith("http"):
            return _http_state(url)
        system, path = storage(url)
        return state_of(system.info(path))

    return retried(url, request)


def state_of(entry: dict[str, Any]) -> FileState:
    """The state of a file in a storage client's listing."""
    mark = next((entry[key] for key in ("ETag", "etag", "LastModified", "mtime", "md5Hash") if entry.get(key)), "")
    return FileState(entry["size"], str(mark))


def stream(url: str, start: int, stop: int, num_bytes: int) -> Iterator[bytes]:
    """Bytes [start, stop) of a file of `num_bytes`, as they arrive; raises as `download`."""
    first, failures = start, 0
    while start < stop:
        try:
            for block in _answer(url, start, stop, num_bytes, first):
                yield block
                start, failures = start + len(block), 0
            if start < stop:
                raise _IncompleteError(f"{start:,} bytes, expected {num_bytes:,} (truncated or changed)")
        except UserError:
            raise
        except Exception as error:  # every storage client has exceptions of its own
            failures += 1
            beyond = getattr(error, "errno", None) == errno.EINVAL  # what s3fs says of a range after the last byte
            short = _IncompleteError(f"{start:,} bytes, expected {num_bytes:,} (truncated or changed)")
            _wait(url, short if beyond else error, failures)


def _write(url: str, descriptor: int, block: bytes, offset: int) -> None:
    view = memoryview(block)
    try:
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
    except OSError as error:
        raise UserError(f"{shown(url)}: cannot be cached ({error.strerror}); free some space") from None


def retried(url: str, request: Callable[[], T]) -> T:
    """Makes a request for a URL, and makes it again while its faults may pass; returns the answer."""
    return retries.retried(request, lambda error, failures: _wait(url, error, failures))


def _wait(url: str, error: Exception, failures: int) -> None:
    """Sleeps before the next try; raises UserError if it would be in vain, or there were enough."""
    fault = _passing_fault(url, error)
    if failures >= _ATTEMPTS:
        raise UnreachableError(
            f"{shown(url)}: {fault}, after {_ATTEMPTS} tries; check the server and your access to it, "
            "or restore the file there"
        ) from None
    delay = min(_LONGEST_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2 ** (failures - 1))
    delay *= random.uniform(0.75, 1.25)  # so that a thousand nodes do not come back at once
    _log.warning("%s: %s; try %d of %d in %.1f s", shown(url), fault, failures + 1, _ATTEMPTS, delay)
    time.sleep(delay)


def _passing_fault(url: str, error: Exception) -> str:
    """One line for an error that may pass; raises UserError for one that will not."""
    name, text = type(error).__name__, _reason(url, error)
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        raise MissingError(f"{shown(url)}: missing; restore the file, or prepare the dataset again") from None
    if isinstance(error, PermissionError) or status in (401, 403):
        raise UserError(f"{shown(url)}: not allowed; check the credentials for it") from None
    if "Credentials" in name:
        raise UserError(
            f"{shown(url)}: no credentials ({text}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or fill ~/.aws"
        ) from None
    if name in ("InvalidURL", "LocationParseError", "TooManyRedirects", "SSLError", "NoSuchBucket"):
        raise UserError(f"{shown(url)}: cannot be read ({text}); check the URL") from None
    if status is not None and 400 <= status < 500 and status not in (408, 416, 425, 429):
        raise UserError(f"{shown(url)}: the server refuses ({text}); check the URL and your access to it") from None
    return text if isinstance(error, (_IncompleteError, _StatusError, KeyError)) else f"{name} {text}".strip()


def _reason(url: str, error: Exception) -> str:
    """The words of an exception, in one short line that repeats no secret of the URL."""
    inner = error.args[0] if error.args else None
    if reason := getattr(inner, "reason", None):  # of a failed connection, without the request around it
        return str(reason).rpartition(": ")[2][:200]
    if isinstance(error, KeyError):  # of a storage client
        return f"an answer that does not say its {error.args[0]}"
    text = re.sub(r"with url: \S+", "", str(error).replace(url, shown(url)))
    return " ".join(text.split())[:200]


def _answer(
    url: str, start: int | None, stop: int | None, num_bytes: int | None, first: int | None = None
) -> Iterator[bytes]:
    """One try at bytes [start, stop), in order, as far as it gets; all there are where they are None."""
    if url.startswith("http"):
        yield from _http_answer(url, start or 0, stop, num_bytes, first or 0)
        return
    system, path = storage(url)
    if start is None or stop is None:
        yield system.cat_file(path)
        return
    for begin in range(start, stop, PIECE_BYTES):
        end = min(begin + PIECE_BYTES, stop)
        piece: bytes = system.cat_file(path, start=begin, end=end)
        if len(piece) != end - begin:  # no part of what was asked for, and an empty one would read as the end
            raise _IncompleteError(f"{begin + len(piece):,} bytes, expected {num_bytes:,} (truncated or changed)")
        yield piece


def _http_answer(url: str, start: int, stop: int | None, num_bytes: int | None, first: int) -> Iterator[bytes]:
    ranged = start > 0 or stop != num_bytes
    with _http("GET", url, {"Range": f"bytes={start}-{stop - 1}"} if ranged and stop else {}) as answer:
        length = answer.headers.get("Content-Length", "")
        announced = int(length) if length.isdigit() else None
        skip, left = 0, None if stop is None else stop - start
        if answer.status_code == 206:
            content_range = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", "").strip())
            if content_range and int(content_range[1]) != start:
                raise _IncompleteError(f"bytes from {int(content_range[1]):,} on, asked were those from {start:,} on")
            if content_range and content_range[2] not in ("*", str(num_bytes)):
                raise _IncompleteError(
                    f"{int(content_range[2]):,} bytes, expected {num_bytes:,} (truncated or changed)"
                )
        else:
            if num_bytes is not None and announced not in (None, num_bytes):
                raise _IncompleteError(f"{announced:,} bytes, expected {num_bytes:,} (truncated or changed)")
            if first > _SKIPPED_BYTES:
                raise UserError(
                    f"{shown(url)}: the server answers no ranges, which this kind of file needs above "
                    f"{_SKIPPED_BYTES >> 20} MiB; download it, and give the local path"
                )
            skip = start
        got = 0
        for block in _blocks(answer):
            got += len(block)
            block = block[max(0, skip - (got - len(block))) :]
            if left is not None:
                block = block[:left]
                left -= len(block)
            if block:
                yield block
            if left == 0:
                return
        if left is None and announced is not None and got != announced:
            raise _IncompleteError(f"{got:,} bytes, announced were {announced:,} (cut)")


def _blocks(answer: Any) -> Iterator[bytes]:
    """A body as it arrives, as far as it gets; raises if that is hardly at all."""
    from urllib3.exceptions import HTTPError, IncompleteRead

    waited, got = 0.0, 0
    while True:
        began = time.monotonic()
        try:
            block: bytes = answer.raw.read1(BLOCK_BYTES, decode_content=False)
        except HTTPError as error:
            if got or isinstance(error.__cause__ or error, IncompleteRead):
                return  # the caller compares sizes
            raise
        if not block:
            return
        yield block
        waited, got = waited + time.monotonic() - began, got + len(block)
        if waited > _SLOW_SECONDS and got < waited * _SLOWEST_BYTES:
            raise UnreachableError(
                f"{shown(answer.url)}: {got:,} bytes in {waited:.0f} s, too slow to go on; "
                "check the server, or download the file and give the local path"
            )


def _http(method: str, url: str, headers: dict[str, str]) -> Any:
    """An answer of which no byte of the body was read; raises `_StatusError` for one that is no success."""
    import requests

    answer = requests.request(
        method,
        url,
        headers={"Accept-Encoding": "identity", **headers},
        timeout=_TIMEOUT_SECONDS,
        stream=True,
        allow_redirects=True,
    )
    if answer.status_code not in (200, 206):
        answer.close()
        if total := re.fullmatch(r"bytes \*/(\d+)", answer.headers.get("Content-Range", "")):
            raise _IncompleteError(f"{int(total[1]):,} bytes, fewer than were there (truncated or changed)")
        raise _StatusError(answer.status_code, answer.reason or "")
    if answer.headers.get("Content-Encoding", "identity") != "identity" and not re.search(r"\.(gz|zst)$", shown(url)):
        answer.close()
        raise UserError(
            f"{shown(url)}: the server compresses its answer, asked not to; download it, and give the local path"
        )
    return answer


def _http_state(url: str) -> FileState:
    try:
        answer = _http("HEAD", url, {})
        if "Content-Length" not in answer.headers:
            raise _StatusError(405, "")
    except (_StatusError, UserError):  # some servers know GET alone; what it says of the fault counts
        answer = _http("GET", url, {})
    with answer:
        length = answer.headers.get("Content-Length", "")
        mark = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        return FileState(int(length) if length.isdigit() else None, mark)


def storage(url: str) -> tuple[Any, str]:
    """The storage's client, and the file's path in its words."""
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    if url.startswith("s3://"):  # in its own words: without them a silent server would be waited for, for ever
        waits = {"connect_timeout": _TIMEOUT_SECONDS, "read_timeout": _TIMEOUT_SECONDS}
        options = {"config_kwargs": {**waits, "retries": {"total_max_attempts": 1}}}
    try:
        found: tuple[Any, str] = url_to_fs(url, **options)
        found[0].retries = 1  # s3fs's own, and botocore's above: each would multiply the tries made here
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{shown(url)}: {error}; known are http://, https:// and s3:// (`pip install 'globallocal[s3]'`)"
        ) from None
    return found
