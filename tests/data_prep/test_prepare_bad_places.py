"""The stage where it cannot write or read: one clear line, and a rerun goes on."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace

import pytest

from data_prep.errors import UserError
from data_prep.manifest import open_dataset
from data_prep.prepare import prepare
from data_prep.sources.files import FilesSettings, FilesSource
from tests.data_prep.conftest import TEXTS, Interrupted, folder_bytes, small, stop_after, write_texts


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
