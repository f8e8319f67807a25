"""The hashes of a checkpoint's files: the one that is written now, and that of earlier versions."""

import json
from pathlib import Path

import pytest

from data_prep.hashing import ALGORITHMS, hasher
from pipeline.checkpoints import folder as checkpoint
from pipeline.settings.sections import Retention
from tests.pipeline.saved_checkpoints import save


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint whose largest file has several blocks."""
    save(tmp_path, 10, Retention(keep_last=9), None, files=2)
    return tmp_path / "step-00000010"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_file_is_checked_by_the_hash_that_was_written_of_it(saved: Path, algorithm: str) -> None:
    (saved / "file-0.pt").write_bytes(bytes(range(256)) * 80_000)
    table = json.loads((saved / "integrity.json").read_text())
    for name in table["files"]:
        content, digest = (saved / name).read_bytes(), hasher(algorithm)
        digest.update(content)
        table["files"][name] = {"bytes": len(content), algorithm: digest.hexdigest()}
    table["sha256"] = checkpoint.listing_digest(table["files"])
    (saved / "integrity.json").write_text(json.dumps(table))
    assert checkpoint.verify(saved) == []
    with open(saved / "file-0.pt", "r+b") as file:
        file.seek(12_345_678)
        file.write(b"x")
    (problem,) = checkpoint.verify(saved)
    assert problem.startswith(f"{saved / 'file-0.pt'}: {algorithm} ")


def test_a_file_without_a_hash_that_is_known_is_not_whole(saved: Path) -> None:
    table = json.loads((saved / "integrity.json").read_text())
    table["files"]["file-0.pt"] = {"bytes": (saved / "file-0.pt").stat().st_size, "crc": "0"}
    table["sha256"] = checkpoint.listing_digest(table["files"])
    (saved / "integrity.json").write_text(json.dumps(table))
    assert checkpoint.verify(saved) == [f"{saved / 'file-0.pt'}: its entry in integrity.json names no hash"]
