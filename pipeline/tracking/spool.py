"""An append-only file of JSON lines that one process writes while a thread of it reads.

Records survive SIGKILL as soon as `append` returns (they are in the page cache), and a line cut by a crash
is terminated on opening and skipped when reading. A full disk does not raise: lines wait in memory, in
order, and are written with the next append that succeeds.
"""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]

_READ_BYTES = 1 << 20


class Spool:
    """Args:
        path: the file; its folder must exist. Created when missing.

    Raises:
        OSError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._lock = threading.Lock()
        self._waiting = bytearray()
        self.write_error: OSError | None = None
        size = self.size_bytes
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            os.write(self._descriptor, b"\n")

    @property
    def size_bytes(self) -> int:
        return os.fstat(self._descriptor).st_size

    @property
    def waiting_bytes(self) -> int:
        """What could not be written yet and is held in memory."""
        return len(self._waiting)

    def append(self, record: Record) -> None:
        """Writes one line. On an OSError the line waits in memory and `write_error` is set."""
        line = json.dumps(record, separators=(",", ":"), allow_nan=False)
        with self._lock:
            self._waiting += line.encode("ascii") + b"\n"
            try:
                while self._waiting:
                    written = os.write(self._descriptor, self._waiting)
                    del self._waiting[:written]
                self.write_error = None
            except OSError as error:
                self.write_error = error

    def read(self, offset: int) -> Iterator[tuple[Record | None, int]]:
        """Whole lines from byte `offset` on: (record, offset behind it); None for a damaged line."""
        rest = b""
        while block := os.pread(self._descriptor, _READ_BYTES, offset + len(rest)):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                offset += len(line) + 1
                yield _parse(line), offset

    def close(self) -> None:
        os.close(self._descriptor)


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record else None
