"""Sources and targets behind an S3 server: the same bytes as in a folder, and the same manners."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.prepare import prepare
from data_prep.prepare_settings import PrepareSettings
from data_prep.sources.files import FilesSettings, FilesSource
from data_prep.store import open_store
from tests.data_prep.conftest import folder_bytes, sentences, write_texts

pytest.importorskip("s3fs", reason="s3:// needs the extra: pip install 'globallocal[s3]'")
pytest.importorskip("moto", reason="the S3 server of the tests: pip install 'moto[server]'")

TEXTS = sentences(21, 200)


@pytest.fixture(scope="module")
def s3() -> Iterator[object]:
    """A file system on a server of this module's own, with the bucket "data"."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = dict(os.environ)
    os.environ.update(variables)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        filesystem = s3fs.S3FileSystem(use_listings_cache=False)
        filesystem.mkdir("data")
        yield filesystem
    finally:
        os.environ.clear()
        os.environ.update(before)
        s3fs.S3FileSystem.clear_instance_cache()
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def local(tokenizer, tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """The texts' folder, and the dataset made of them in a folder, but for the manifest with its paths."""
    root = tmp_path_factory.mktemp("local")
    source = write_texts(root / "texts", TEXTS)
    prepare(PrepareSettings(source, tokenizer, root / "dataset", chunk_tokens=512, chunks_per_shard=4))
    return root / "texts", without_manifest(folder_bytes(root / "dataset"))


def without_manifest(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != "manifest.json"}


@pytest.fixture(scope="module")
def source(s3, local) -> FilesSource:
    for path in local[0].iterdir():
        s3.pipe_file(f"data/texts/{path.name}", path.read_bytes())
    return FilesSource(FilesSettings({"train": ["s3://data/texts/part-*.jsonl"]}, id_column="id"))


def objects(s3, prefix: str) -> dict[str, bytes]:
    s3.invalidate_cache()
    return {path.removeprefix(f"{prefix}/"): s3.cat_file(path) for path in s3.find(prefix)}


class Interrupted(Exception):
    pass


def test_dataset_on_s3_is_the_one_in_a_folder_interrupted_or_not(s3, source, tokenizer, local):
    settings = PrepareSettings(source, tokenizer, "s3://data/dataset", chunk_tokens=512, chunks_per_shard=4)

    def stop_late(state):
        if state.documents > 120:
            raise Interrupted

    with pytest.raises(Interrupted):
        prepare(settings, stop_late)
    names = objects(s3, "data/dataset")
    assert "manifest.json" not in names
    assert "train-000000.tar" in names
    states = []
    manifest = prepare(settings, states.append)
    assert states[0].documents > 80, "what was done is not done again"
    assert without_manifest(objects(s3, "data/dataset")) == local[1]
    assert prepare(settings) == manifest, "a finished one is left as it is"


def test_two_preparations_into_one_prefix_end_with_one(s3, source, tokenizer, local):
    """The later one takes over; the earlier one stops at its next shard; nothing is spoilt."""
    settings = PrepareSettings(source, tokenizer, "s3://data/contested", chunk_tokens=512, chunks_per_shard=4)
    inner = []

    def progress(state):
        if state.documents >= 80 and not inner:
            inner.append(prepare(settings))

    with pytest.raises(UserError, match="another preparation took over this prefix, and this one stops"):
        prepare(settings, progress)
    assert without_manifest(objects(s3, "data/contested")) == local[1]


def test_journal_is_kept_in_segments(s3, source, tokenizer, local, monkeypatch):
    monkeypatch.setattr("data_prep.journal.SEGMENT_LINES", 3)
    settings = PrepareSettings(source, tokenizer, "s3://data/segments", chunk_tokens=512, chunks_per_shard=4)

    def stop_late(state):
        if state.documents > 120:
            raise Interrupted

    with pytest.raises(Interrupted):
        prepare(settings, stop_late)
    journal = [name for name in objects(s3, "data/segments") if "journal" in name]
    assert len(journal) > 1
    prepare(settings)
    assert without_manifest(objects(s3, "data/segments")) == local[1]


def test_bucket_that_is_not_there(source, tokenizer):
    settings = PrepareSettings(source, tokenizer, "s3://nowhere/dataset")
    with pytest.raises(UserError, match=r"s3://nowhere/dataset.*cannot be written; .*check the path"):
        prepare(settings)
    with pytest.raises(UserError, match=r"s3://nowhere/\*.txt: (cannot be read|matches no file)"):
        FilesSource(FilesSettings({"train": ["s3://nowhere/*.txt"]}))


def test_unknown_scheme_is_refused(source, tokenizer):
    with pytest.raises(UserError, match=r"what://x: cannot be read \(Protocol not known: what\)"):
        open_store("what://x")
