"""The hashes that protect bytes: blake3 for what is written now, sha256 for what earlier versions wrote.

What identifies (a dataset, a text, a tokenizer) is named by its sha256 all the same: names must not move.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from blake3 import blake3

Algorithm = Literal["blake3", "sha256"]
ALGORITHM: Algorithm = "blake3"
"""Of what is written here."""
ALGORITHMS: tuple[Algorithm, ...] = (ALGORITHM, "sha256")


class Hasher(Protocol):
    def update(self, data: bytes | memoryview, /) -> Any: ...
    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class Digest:
    """The hash that bytes must have, as hex digits."""

    algorithm: Algorithm
    hex: str


def hasher(algorithm: Algorithm = ALGORITHM, all_cores: bool = False) -> Hasher:
    """
    Args:
        all_cores: blake3 shares a large piece among them; sha256 cannot.
    """
    if algorithm == "sha256":
        return hashlib.sha256()
    return blake3(max_threads=blake3.AUTO if all_cores else 1)


def digest_of(content: bytes | memoryview, algorithm: Algorithm = ALGORITHM) -> Digest:
    hashed = hasher(algorithm)
    hashed.update(content)
    return Digest(algorithm, hashed.hexdigest())


def check_file(path: Path, expected_bytes: int | None, digest: Digest | None, where: str | None = None) -> list[str]:
    """One line for a file that is missing, of another size or of another hash; none if it is whole.

    Args:
        where: its name in that line, if it is not `path`.
    """
    where = where or str(path)
    try:
        actual_bytes = path.stat().st_size
        problems = [] if expected_bytes is None else check_size(where, actual_bytes, expected_bytes)
        if problems or digest is None:
            return problems
        return check_hash(where, hash_file(path, digest.algorithm), digest)
    except FileNotFoundError:
        return check_size(where, None, 0)
    except OSError as error:
        return [f"{where}: cannot be read ({error.strerror}); restore the file, or prepare the dataset again"]


def check_size(where: str, actual: int | None, expected: int) -> list[str]:
    """One line if a file is missing (None) or of another size."""
    if actual is None:
        return [f"{where}: missing; restore the file, or prepare the dataset again"]
    if actual == expected:
        return []
    return [
        f"{where}: {actual:,} bytes, expected {expected:,} ({'truncated' if actual < expected else 'too long'}); "
        "restore the file, or prepare the dataset again"
    ]


def check_hash(where: str, actual: str, expected: Digest) -> list[str]:
    """One line if a file's hash, in hex digits, is another one."""
    if actual == expected.hex:
        return []
    return [
        f"{where}: {expected.algorithm} {actual[:16]}…, expected {expected.hex[:16]}… (changed or damaged); "
        "restore the file, or prepare the dataset again"
    ]


def hash_file(path: Path, algorithm: Algorithm = "sha256") -> str:
    """Hash of a file in hex digits."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, lambda: hasher(algorithm)).hexdigest()  # type: ignore[arg-type,return-value]
