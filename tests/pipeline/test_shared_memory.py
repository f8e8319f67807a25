"""What DeepSpeed's CPU collectives leave in /dev/shm: real files, real mappings."""

import mmap
import os
import time
from pathlib import Path

import pytest

from pipeline.distributed import shared_memory


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = Path("/dev/shm") / f"test-{os.getpid()}"
    made.mkdir()
    monkeypatch.setattr(shared_memory, "FOLDER", made)
    yield made
    for item in made.iterdir():
        item.unlink()
    made.rmdir()


def buffer(folder: Path, port: int, age_seconds: float) -> Path:
    path = folder / f"{shared_memory.NAME}_{os.getuid()}_127.0.0.1_{port}_0"
    path.write_bytes(b"x" * 4096)
    os.utime(path, (time.time() - age_seconds,) * 2)
    return path


def test_stale_buffers_go_and_those_in_use_stay(folder: Path) -> None:
    stale, young, held = buffer(folder, 1, 7200), buffer(folder, 2, 1), buffer(folder, 3, 7200)
    with open(held, "r+b") as file, mmap.mmap(file.fileno(), 4096):
        os.utime(held, (time.time() - 7200,) * 2)
        shared_memory.sweep()
    assert not stale.exists()
    assert young.exists()
    assert held.exists()


def test_a_ranks_own_name_goes_while_its_memory_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "5")
    path = buffer(folder, 5, 0)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 4096) as memory:
        shared_memory.remove_own(0)
        assert not path.exists()
        assert memory[0] == ord("x")
