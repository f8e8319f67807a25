"""The stage on a text that changes where it lies: one text is one dataset, and half of two is none."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.engines import InProcess, ProcessEngine
from data_prep.errors import UserError
from data_prep.prepare import prepare
from data_prep.sources.files import FilesSettings, FilesSource
from data_prep.verify import verify_dataset
from tests.data_prep.conftest import TEXTS, Interrupted, folder_bytes, small, stop_after, write_texts


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
