"""The stage, killed, stopped or started twice: the bytes of an unbroken run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import data_prep
from data_prep.encode import Filters
from data_prep.errors import UserError
from data_prep.prepare import prepare
from data_prep.prepare_settings import PrepareSettings
from data_prep.sources.files import FilesSettings, FilesSource
from data_prep.store import FolderStore
from data_prep.verify import verify_dataset
from tests.data_prep.conftest import Interrupted, folder_bytes, sentences, small, stop_after, write_texts
from tests.variants import some_of


def test_no_manifest_until_all_is_whole_and_a_rerun_goes_on(source, tokenizer, whole, tmp_path):
    settings = small(source, tokenizer, tmp_path / "dataset")
    for documents in (60, 150, 250):
        with pytest.raises(Interrupted):
            prepare(settings, stop_after(documents))
        assert not (tmp_path / "dataset" / "manifest.json").exists()
    first_rows = []
    prepare(settings, lambda state: first_rows.append(state.documents))
    assert first_rows[0] > 200, "what was done is not done again"
    assert folder_bytes(tmp_path / "dataset") == folder_bytes(whole)


def run_and_die(settings: PrepareSettings, line_number: int) -> int | None:
    """Prepares in a forked process that kills itself (SIGKILL) at its n-th line of code of the stage.

    Returns how many lines it took if it finished before that, else None.
    """
    traced = tuple(str(Path(data_prep.__file__).parent / f"{name}.py") for name in STAGE_FILES)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        lines = 0

        def trace(frame, event, argument):
            nonlocal lines
            if not frame.f_code.co_filename.startswith(traced):
                return None
            lines += 1
            if lines >= line_number:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        try:
            prepare(settings)
            os.write(writing, str(lines).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return int(answer) if answer else None


STAGE_FILES = ("prepare", "journal", "store", "packing", "shards")


KILLS = len(some_of(range(25), range(25)))


def test_killed_at_random_points_ends_in_the_same_bytes(source, tokenizer, whole, tmp_path):
    settings = small(source, tokenizer, tmp_path / "unbroken")
    total = run_and_die(settings, sys.maxsize)
    assert total is not None
    assert folder_bytes(tmp_path / "unbroken") == folder_bytes(whole)
    rng = random.Random(50)
    expected = folder_bytes(whole)
    kills = folders = 0
    while kills < KILLS:
        folder = tmp_path / f"killed-{folders}"
        settings = small(source, tokenizer, folder)
        while run_and_die(settings, rng.randint(1, total // 2)) is None:
            kills += 1
            if (folder / "manifest.json").exists():  # killed after the rename, before the end
                assert verify_dataset(folder).problems == []
        assert folder_bytes(folder) == expected, f"after {kills} kills in all"
        folders += 1


def test_torn_journal_line_is_as_if_never_written(source, tokenizer, whole, tmp_path):
    settings = small(source, tokenizer, tmp_path / "dataset")
    with pytest.raises(Interrupted):
        prepare(settings, stop_after(200))
    journal = tmp_path / "dataset" / ".prepare" / "journal-000000.jsonl"
    content = journal.read_bytes()
    for cut in (1, 2, 100, len(content) - 5):
        journal.write_bytes(content[:-cut])
        with pytest.raises(Interrupted):
            prepare(settings, stop_after(250))
    prepare(settings)
    assert folder_bytes(tmp_path / "dataset") == folder_bytes(whole)


PROGRAM = """
import sys
from pathlib import Path
from data_prep.engines import InProcess, ProcessEngine
from data_prep.sources.files import FilesSettings, FilesSource
from data_prep.prepare import prepare
from data_prep.prepare_settings import PrepareSettings
from data_prep.tokenizers.tokenizer import load_tokenizer
if __name__ == "__main__":
    text, tokenizer, output, workers = sys.argv[1:]
    source = FilesSource(FilesSettings({"train": [text]}, id_column="id"))
    settings = PrepareSettings(
        source, load_tokenizer(tokenizer), output, engine=ProcessEngine(int(workers)),
        chunk_tokens=512, chunks_per_shard=4,
    )
    prepare(settings, lambda state: print(state.documents, flush=True))
"""


def start_program(source, tokenizer_folder, output: Path, workers: int) -> subprocess.Popen[str]:
    program = output.parent / "program.py"
    program.write_text(PROGRAM)
    pattern = source.paths["train"][0]
    command = [sys.executable, program, pattern, tokenizer_folder, output, str(workers)]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def test_killed_with_workers_leaves_nobody_running_and_goes_on(source, tokenizer, tokenizer_folder, whole, tmp_path):
    import psutil

    job = start_program(source, tokenizer_folder, tmp_path / "dataset", 2)
    assert job.stdout is not None
    job.stdout.readline()
    family = psutil.Process(job.pid).children(recursive=True)
    assert family
    job.kill()
    job.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
    prepare(small(source, tokenizer, tmp_path / "dataset"))
    assert folder_bytes(tmp_path / "dataset") == folder_bytes(whole)


def test_two_preparations_into_one_folder_are_refused(source, tokenizer, tokenizer_folder, whole, tmp_path):
    settings = small(source, tokenizer, tmp_path / "dataset")
    refused = []

    def progress(state):
        if state.documents >= 100 and not refused:
            job = start_program(source, tokenizer_folder, tmp_path / "dataset", 1)
            assert job.wait() == 1
            with pytest.raises(UserError, match="another preparation is writing into this folder; wait"):
                prepare(settings)
            refused.append(True)

    prepare(settings, progress)
    assert refused
    assert folder_bytes(tmp_path / "dataset") == folder_bytes(whole)


def test_equal_documents_across_splits_are_counted_even_after_a_kill(tokenizer, tmp_path):
    texts = sentences(41, 120)
    write_texts(tmp_path / "train", [*texts, *texts[:7], "own"])
    write_texts(tmp_path / "valid", [texts[3], texts[3], texts[70], "also own"])
    paths = {"train": [f"{tmp_path}/train"], "valid": [f"{tmp_path}/valid"]}
    settings = small(FilesSource(FilesSettings(paths)), tokenizer, tmp_path / "whole")
    manifest = prepare(settings)
    assert manifest.splits["train"].also_in == {"valid": 3 + texts.count(texts[70]) - 1}
    assert list(manifest.splits) == ["train", "valid"]
    broken = replace(settings, output=tmp_path / "broken")
    for documents in (2, 50):
        with pytest.raises(Interrupted):
            prepare(broken, stop_after(documents))
    prepare(broken)
    assert folder_bytes(tmp_path / "broken") == folder_bytes(tmp_path / "whole")


def test_duplicates_are_known_again_after_a_kill(tokenizer, tmp_path):
    texts = [text for text in sentences(3, 120) for _ in range(3)]
    random.Random(3).shuffle(texts)
    source = write_texts(tmp_path / "texts", texts)
    settings = replace(
        small(source, tokenizer, tmp_path / "whole"), filters=Filters(drop_duplicates=True), chunk_tokens=128
    )
    prepare(settings)
    total = run_and_die(replace(settings, output=tmp_path / "unbroken"), sys.maxsize)
    assert total is not None
    rng = random.Random(4)
    killed = replace(settings, output=tmp_path / "killed")
    kills = 0
    while run_and_die(killed, rng.randint(total // 8, total // 2)) is None:
        kills += 1
    assert kills
    assert folder_bytes(tmp_path / "killed") == folder_bytes(tmp_path / "whole")


def test_a_kill_between_the_manifest_and_the_end_leaves_nothing_behind_the_next_command(tokenizer, tmp_path):
    settings = small(write_texts(tmp_path / "texts", sentences(3, 20)), tokenizer, tmp_path / "dataset")
    prepare(settings)
    whole = folder_bytes(tmp_path / "dataset")
    (tmp_path / "dataset" / ".prepare").mkdir()
    (tmp_path / "dataset" / ".prepare" / "journal-000000.jsonl").write_text("{}\n")
    prepare(settings)
    assert folder_bytes(tmp_path / "dataset") == whole


def test_store_is_durable_in_the_right_order(tmp_path, monkeypatch):
    """Content reaches the disk before its name does, and the name before the call returns."""
    events = []
    fsync, replace_file = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("rename", str(b))), replace_file(a, b)))
    FolderStore(tmp_path).publish("x.tar", b"content")
    partial, final = str(tmp_path / ".x.tar.partial"), str(tmp_path / "x.tar")
    assert events == [("fsync", partial), ("rename", final), ("fsync", str(tmp_path))]
