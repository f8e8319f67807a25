"""The hash that protects the files of a checkpoint.

blake3 takes less than half of sha256's time, and shares it among threads. Folders of earlier versions hold sha256:
each file's entry names its algorithm.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

from blake3 import blake3

ALGORITHM = "blake3"
"""Of what is written here."""
ALGORITHMS = (ALGORITHM, "sha256")


class Hasher(Protocol):
    def update(self, data: bytes | memoryview, /) -> Any: ...
    def hexdigest(self) -> str: ...


def hasher(algorithm: str = ALGORITHM, all_cores: bool = False) -> Hasher:
    """
    Args:
        all_cores: blake3 shares a large piece among them; sha256 cannot.
    """
    if algorithm == "sha256":
        return hashlib.sha256()
    return blake3(max_threads=blake3.AUTO if all_cores else 1)


def recorded(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Algorithm and hex digest that a file's entry in integrity.json holds. Raises ValueError where it holds none."""
    for algorithm in ALGORITHMS:
        if algorithm in entry:
            return algorithm, entry[algorithm]
    raise ValueError("its entry in integrity.json names no hash")
