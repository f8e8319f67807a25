"""The stage: nothing lost, nothing doubled, the same bytes on any workers and after any interruption."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import data_prep
from data_prep.encode import Filters
from data_prep.engines import InProcess, ProcessEngine
from data_prep.errors import UserError
from data_prep.manifest import canonical_json, open_dataset
from data_prep.prepare import prepare
from data_prep.prepare_settings import PrepareSettings
from data_prep.sources.files import FilesSettings, FilesSource
from data_prep.sources.sample import SampleArticles
from data_prep.store import FolderStore
from data_prep.tokenizers.tokenizer import Tokenizer
from data_prep.verify import documents_of, verify_dataset
from tests.data_prep.conftest import folder_bytes, sentences, write_texts

TEXTS = [*sentences(1, 300), "", " ", "\n"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FilesSource:
    return write_texts(tmp_path_factory.mktemp("texts"), TEXTS)


def small(source: FilesSource, tokenizer: Tokenizer, output: Path) -> PrepareSettings:
    """Many chunks and shards out of little text."""
    return PrepareSettings(source, tokenizer, output, chunk_tokens=512, chunks_per_shard=4)


@pytest.fixture(scope="module")
def whole(source: FilesSource, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole") / "dataset"
    prepare(small(source, tokenizer, folder))
    return folder


def test_every_document_is_there_once_and_in_order(whole: Path, tokenizer: Tokenizer):
    dataset = open_dataset(whole)
    index = dataset.split("train")
    assert [tokenizer.decode(tokens) for tokens in documents_of(dataset, index)] == TEXTS
    info = dataset.manifest.splits["train"]
    assert (info.documents, info.source_rows, info.round_trip_documents) == (len(TEXTS),) * 3
    assert info.source_bytes == sum(len(text.encode()) for text in TEXTS)
    assert info.words == sum(len(text.split()) for text in TEXTS)
    assert info.lines == sum(text.count("\n") for text in TEXTS)
    assert index.num_shards == info.shards > 10
    ids = [json.loads(line) for i in range(index.num_shards) for line in (whole / index.ids_name(i)).open()]
    assert ids == [f"doc-{i}" for i in range(len(TEXTS))]
    assert verify_dataset(whole, "deep").problems == []


def test_tokens_are_sentencepieces_own(whole: Path, tokenizer: Tokenizer):
    dataset = open_dataset(whole)
    expected = [token for text in TEXTS for token in [*tokenizer.processor.encode(text), tokenizer.eos_id]]
    tokens = np.concatenate([*(np.append(d, 2) for d in documents_of(dataset, dataset.split("train")))])
    assert tokens.tolist() == expected


def test_manifest_names_no_place_and_no_time(whole: Path, source: FilesSource, tokenizer: Tokenizer, tmp_path: Path):
    """The same text elsewhere, prepared later, is the same dataset to the last byte."""
    elsewhere = write_texts(tmp_path / "texts", TEXTS)
    prepare(small(elsewhere, tokenizer, tmp_path / "dataset"))
    assert folder_bytes(tmp_path / "dataset") == folder_bytes(whole)


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(workers, source, tokenizer, whole, tmp_path):
    prepare(replace(small(source, tokenizer, tmp_path / "dataset"), engine=ProcessEngine(workers)))
    assert folder_bytes(tmp_path / "dataset") == folder_bytes(whole)


def test_finished_dataset_is_left_as_it_is(whole, source, tokenizer):
    times = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    manifest = prepare(small(source, tokenizer, whole))
    assert manifest == open_dataset(whole).manifest
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == times


def test_other_settings_are_refused_on_a_finished_dataset(whole, source, tokenizer):
    before = folder_bytes(whole)
    with pytest.raises(UserError, match=r"already holds a dataset with another filters .* choose another folder"):
        prepare(replace(small(source, tokenizer, whole), filters=Filters(minimum_characters=3)))
    assert folder_bytes(whole) == before


# --- interruptions ------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def stop_after(documents: int):
    def progress(state):
        if state.documents >= documents:
            raise Interrupted

    return progress


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


def test_killed_at_fifty_random_points_ends_in_the_same_bytes(source, tokenizer, whole, tmp_path):
    settings = small(source, tokenizer, tmp_path / "unbroken")
    total = run_and_die(settings, sys.maxsize)
    assert total is not None
    assert folder_bytes(tmp_path / "unbroken") == folder_bytes(whole)
    rng = random.Random(50)
    expected = folder_bytes(whole)
    kills = folders = 0
    while kills < 50:
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


# --- bad places and bad text -----------------------------------------------------------------------------


def test_unfinished_preparation_of_something_else_is_refused(source, tokenizer, tmp_path):
    settings = small(source, tokenizer, tmp_path / "dataset")
    with pytest.raises(Interrupted):
        prepare(settings, stop_after(100))
    with pytest.raises(UserError, match="unfinished preparation with chunk_tokens = 512, this one has 1024"):
        prepare(replace(settings, chunk_tokens=1024))


def test_folder_with_other_files_is_refused(source, tokenizer, tmp_path):
    (tmp_path / "thesis.tex").write_text("all my work")
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\); choose a new or empty folder"):
        prepare(small(source, tokenizer, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_output_that_is_a_file_is_refused(source, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file, not a folder"):
        prepare(small(source, tokenizer, tmp_path / "file"))
    with pytest.raises(UserError, match="part of the path is a file"):
        prepare(small(source, tokenizer, tmp_path / "file" / "dataset"))


def same_size(text: str) -> str:
    """Another text of as many bytes."""
    return text.translate(str.maketrans("etaoin", "aeotni"))


def rewrite(source: FilesSource, texts: list[str]) -> FilesSource:
    """Other texts in the files of a source, which is made anew as by a rerun of the command."""
    write_texts(Path(source.paths["train"][0]).parent, texts)
    return FilesSource(FilesSettings(source.paths, id_column="id"))


@pytest.mark.parametrize("engine", [InProcess(), ProcessEngine(2)])
def test_a_text_that_changed_where_it_was_read_is_refused_by_name(engine, tokenizer, tmp_path):
    """Half of one text and half of another is no dataset, whatever the names and sizes of the files say."""
    source = write_texts(tmp_path / "texts", TEXTS)
    settings = replace(small(source, tokenizer, tmp_path / "dataset"), engine=engine)
    with pytest.raises(Interrupted):
        prepare(settings, stop_after(200))
    changed = [*TEXTS[:50], same_size(TEXTS[50]), *TEXTS[51:]]
    assert len(changed[50]) == len(TEXTS[50]) and changed != TEXTS  # noqa: PT018
    there = folder_bytes(tmp_path / "dataset")
    source = rewrite(source, changed)
    with pytest.raises(UserError, match=r"unfinished preparation of another text: .*part-000040.jsonl .* has changed"):
        prepare(replace(settings, source=source))
    assert folder_bytes(tmp_path / "dataset") == there
    source = rewrite(source, TEXTS)
    prepare(replace(settings, source=source))
    assert verify_dataset(tmp_path / "dataset", "deep").problems == []


@pytest.mark.parametrize("offset", range(0, 200, 7))
def test_a_rerun_on_a_changed_text_is_refused_or_gives_what_a_fresh_one_gives(offset, tokenizer, tmp_path):
    """Wherever the change falls: before, in or after the task that the last shard ends in."""
    source = write_texts(tmp_path / "texts", TEXTS)
    settings = small(source, tokenizer, tmp_path / "dataset")
    with pytest.raises(Interrupted):
        prepare(settings, stop_after(120))
    source = rewrite(source, [*TEXTS[:offset], "another", *TEXTS[offset + 1 :], "one more"])
    fresh = replace(settings, source=source, output=tmp_path / "fresh")
    prepare(fresh)
    with contextlib.suppress(UserError):
        prepare(replace(settings, source=source))
        assert folder_bytes(tmp_path / "dataset") == folder_bytes(tmp_path / "fresh")


def test_a_file_that_is_gone_at_a_rerun_is_refused(tokenizer, tmp_path):
    source = write_texts(tmp_path / "texts", TEXTS)
    settings = small(source, tokenizer, tmp_path / "dataset")
    with pytest.raises(Interrupted):
        prepare(settings, stop_after(200))
    (tmp_path / "texts" / "part-000000.jsonl").unlink()
    with pytest.raises(UserError, match=r"another text: .*part-000040.jsonl"):
        prepare(replace(settings, source=FilesSource(FilesSettings(source.paths, id_column="id"))))


def test_a_finished_dataset_of_another_text_is_refused_by_name(tokenizer, tmp_path):
    source = write_texts(tmp_path / "texts", TEXTS)
    settings = small(source, tokenizer, tmp_path / "dataset")
    prepare(settings)
    there = folder_bytes(tmp_path / "dataset")
    source = rewrite(source, [*TEXTS[:250], same_size(TEXTS[250]), *TEXTS[251:]])
    with pytest.raises(UserError, match=r"the dataset of another text \(id \w+\): .*part-000240.jsonl .* has changed"):
        prepare(replace(settings, source=source))
    assert folder_bytes(tmp_path / "dataset") == there


def test_a_text_that_changes_while_it_is_read_is_no_dataset(tokenizer, tmp_path):
    source = write_texts(tmp_path / "texts", TEXTS)

    def progress(state):
        if state.documents == 80:
            write_texts(tmp_path / "texts", [same_size(text) for text in TEXTS])

    with pytest.raises(UserError, match=r"part-000000.jsonl: changed while it was read; run the same command again"):
        prepare(small(source, tokenizer, tmp_path / "dataset"), progress)
    assert not (tmp_path / "dataset" / "manifest.json").exists()


def test_the_same_text_has_one_id_wherever_it_lies(tokenizer, tmp_path, monkeypatch):
    for folder in ("t/p1", "elsewhere/deep"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text("one text")
    monkeypatch.chdir(tmp_path)
    ids = set()
    for number, pattern in enumerate(
        ["t/p1/a.txt", f"{tmp_path}/t/p1/a.txt", "t/p1", "t/*/a.txt", "elsewhere/deep/a.txt", "./t/p1/../p1/a.txt"]
    ):
        source = FilesSource(FilesSettings({"train": [pattern]}))
        ids.add(prepare(small(source, tokenizer, tmp_path / f"d{number}")).dataset_id)
    assert len(ids) == 1
    source = FilesSource(FilesSettings({"train": ["t/p1/a.txt"]}))
    (tmp_path / "t" / "p1" / "a.txt").write_text("two text")
    source = FilesSource(FilesSettings({"train": ["t/p1/a.txt"]}))
    assert prepare(small(source, tokenizer, tmp_path / "other")).dataset_id not in ids


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


def test_datasets_of_the_first_format_still_load_under_their_ids(whole, tmp_path):
    manifest = json.loads((whole / "manifest.json").read_bytes())
    del manifest["dataset_id"], manifest["source"]["texts"], manifest["encoder"]
    manifest["format_version"], manifest["source"]["fingerprint"] = 1, "0" * 64
    manifest["source"]["settings"]["paths"] = {"train": ["/some/where/*.txt"]}
    for split in manifest["splits"].values():
        del split["also_in"]
    id = hashlib.sha256(canonical_json(manifest)).hexdigest()
    shutil.copytree(whole, tmp_path / "old")
    (tmp_path / "old" / "train.texts.npy").unlink()
    (tmp_path / "old" / "manifest.json").write_text(json.dumps({"dataset_id": id, **manifest}))
    assert open_dataset(tmp_path / "old").dataset_id == id
    assert verify_dataset(tmp_path / "old", "deep").problems == []


def test_split_without_documents_is_refused(tokenizer, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    source = FilesSource(FilesSettings({"train": [str(tmp_path / "empty.jsonl")]}))
    with pytest.raises(UserError, match="files: split 'train' has no document; check the source's path"):
        prepare(small(source, tokenizer, tmp_path / "dataset"))
    assert not (tmp_path / "dataset" / "manifest.json").exists()


def test_one_empty_document_is_a_dataset(tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    source = FilesSource(FilesSettings({"train": [str(tmp_path / "empty.txt")]}))
    info = prepare(small(source, tokenizer, tmp_path / "dataset")).splits["train"]
    assert (info.documents, info.tokens, info.source_bytes) == (1, 1, 0)
    assert verify_dataset(tmp_path / "dataset", "deep").problems == []


def test_full_disk_is_one_clear_line_and_a_rerun_goes_on(source, tokenizer, whole, tmp_path):
    mount = tmp_path / "small-disk"
    mount.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mount]).returncode:
        pytest.skip("needs the right to mount a tmpfs: run as root")
    try:
        settings = small(source, tokenizer, mount / "dataset")
        with pytest.raises(UserError, match=r"the disk is full: free some space.*goes on from there"):
            prepare(settings)
        assert not (mount / "dataset" / "manifest.json").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", mount], check=True)
        prepare(settings)
        assert folder_bytes(mount / "dataset") == folder_bytes(whole)
    finally:
        subprocess.run(["umount", mount], check=True)


def test_read_only_target_is_one_clear_line(source, tokenizer, tmp_path):
    mount = tmp_path / "read-only"
    mount.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", mount]).returncode:
        pytest.skip("needs the right to mount a tmpfs: run as root")
    try:
        with pytest.raises(UserError, match="the file system is read-only: choose another folder"):
            prepare(small(source, tokenizer, mount / "dataset"))
    finally:
        subprocess.run(["umount", mount], check=True)


def test_source_gone_half_way_is_one_clear_line_and_a_rerun_goes_on(tokenizer, whole, tmp_path):
    source = write_texts(tmp_path / "texts", TEXTS)
    victim = tmp_path / "texts" / "part-000160.jsonl"
    content = victim.read_bytes()
    victim.unlink()
    settings = small(source, tokenizer, tmp_path / "dataset")
    with pytest.raises(
        UserError, match=r"part-000160.jsonl: cannot be read \(No such file or directory\); check the path"
    ):
        prepare(settings)
    assert not (tmp_path / "dataset" / "manifest.json").exists()
    assert (tmp_path / "dataset" / "train-000000.tar").exists()
    victim.write_bytes(content)
    manifest = prepare(replace(settings, source=FilesSource(FilesSettings(source.paths, id_column="id"))))
    assert manifest.splits == open_dataset(whole).manifest.splits


# --- filters ---------------------------------------------------------------------------------------------


def test_filters_count_what_they_drop(tokenizer, tmp_path):
    texts = ["long enough", "x", "again and again", "long enough", "", "again and again", "again and again"]
    source = write_texts(tmp_path / "texts", texts)
    filters = Filters(minimum_characters=2, drop_duplicates=True)
    settings = replace(small(source, tokenizer, tmp_path / "dataset"), filters=filters)
    info = prepare(settings).splits["train"]
    assert info.dropped == {"too_short": 2, "duplicate": 3}
    assert (info.documents, info.source_rows) == (2, 7)
    assert info.source_bytes == len("long enough" + "again and again")
    dataset = open_dataset(tmp_path / "dataset")
    kept = [tokenizer.decode(tokens) for tokens in documents_of(dataset, dataset.split("train"))]
    assert kept == ["long enough", "again and again"]


def test_everything_dropped_is_refused_with_the_counts(tokenizer, tmp_path):
    source = write_texts(tmp_path / "texts", ["a", "b"])
    settings = replace(small(source, tokenizer, tmp_path / "dataset"), filters=Filters(minimum_characters=2))
    with pytest.raises(UserError, match=r"no document left \(dropped: 2 too_short\)"):
        prepare(settings)


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


def test_lossy_tokenizer_is_refused_with_the_place_or_counted(tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(0, 300)), model_writer=model, model_type="bpe", vocab_size=300, minloglevel=2
    )
    lossy = Tokenizer(model.getvalue(), "lossy.model")
    source = write_texts(tmp_path / "texts", ["eta", "eta  eta"])
    settings = small(source, lossy, tmp_path / "dataset")
    message = (
        r"document 'doc-1' does not survive the tokenizer: at character 4 the text has ' eta', decoding gives 'eta'; "
        "use a tokenizer made by `globallocal tokenizer`, or accept the loss with --allow-lossy"
    )
    with pytest.raises(UserError, match=message):
        prepare(settings)
    settings = replace(settings, filters=Filters(allow_lossy=True), output=tmp_path / "lossy")
    info = prepare(settings).splits["train"]
    assert (info.documents, info.round_trip_documents) == (2, 1)
    report = verify_dataset(tmp_path / "lossy", "deep")
    assert report.problems == []
    assert "train: 1 documents that decoding does not give back (--allow-lossy)" in report.lines


def test_u2581_is_counted(tokenizer, tmp_path):
    source = write_texts(tmp_path / "texts", ["a\u2581b\u2581", "c d"])
    info = prepare(small(source, tokenizer, tmp_path / "dataset")).splits["train"]
    assert info.changed == {"u2581_to_space": 2}
    assert info.round_trip_documents == 2
    assert verify_dataset(tmp_path / "dataset", "deep").problems == []


def test_sample_source_is_106_articles(tokenizer, tmp_path):
    settings = PrepareSettings(SampleArticles(), tokenizer, tmp_path / "dataset", engine=ProcessEngine(2))
    splits = prepare(settings).splits
    assert {name: info.documents for name, info in splits.items()} == {"train": 94, "valid": 6, "test": 6}
    assert splits["train"].source_bytes == 2_843_290


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


def test_progress_is_told_as_it_goes(source, tokenizer, tmp_path):
    states = []
    prepare(small(source, tokenizer, tmp_path / "dataset"), states.append)
    assert [state.documents for state in states] == sorted(state.documents for state in states)
    assert states[-1].done_bytes == states[-1].total_bytes
    assert states[-1].documents == len(TEXTS)
