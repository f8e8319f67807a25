"""The hash that protects the files of a checkpoint.

blake3 takes less than half of sha256's time, and shares it among threads. Folders of earlier versions, and those
written where blake3 is not installed, hold sha256: each file's entry names its algorithm.
"""

import hashlib
import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any, Protocol

_blake3 = importlib.import_module("blake3") if importlib.util.find_spec("blake3") else None

ALGORITHM = "blake3" if _blake3 else "sha256"
"""Of what is written here."""
ALGORITHMS = ("blake3", "sha256")


class Hasher(Protocol):
    def update(self, data: bytes | memoryview, /) -> Any: ...
    def hexdigest(self) -> str: ...


def hasher(algorithm: str = ALGORITHM, all_cores: bool = False) -> Hasher:
    """
    Args:
        all_cores: blake3 shares a large piece among them; sha256 cannot.

    Raises:
        ValueError: blake3 is not installed.
    """
    if algorithm == "sha256":
        return hashlib.sha256()
    if _blake3 is None:
        raise ValueError("hashed with blake3, which is not installed; pip install blake3")
    hasher: Hasher = _blake3.blake3(max_threads=_blake3.blake3.AUTO if all_cores else 1)
    return hasher


def recorded(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Algorithm and hex digest that a file's entry in integrity.json holds. Raises ValueError where it holds none."""
    for algorithm in ALGORITHMS:
        if algorithm in entry:
            return algorithm, entry[algorithm]
    raise ValueError("its entry in integrity.json names no hash")
