"""Every fault of a dataset folder is named, whatever it is, and all of them in one run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.manifest import check_shards, open_dataset
from data_prep.prepare import prepare
from data_prep.prepare_settings import PrepareSettings
from data_prep.sources.files import FilesSettings, FilesSource
from data_prep.tokenizers.hf_tokenizer import merges, tokenizer_files
from data_prep.tokenizers.tokenizer import TokenizerSettings, train_tokenizer
from data_prep.verify import verify_dataset
from tests.data_prep.conftest import sentences, write_texts

TEXTS = sentences(11, 200)


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("made")
    texts = write_texts(root / "train", TEXTS)
    held_out = write_texts(root / "valid", TEXTS[:30])
    paths = {"train": texts.paths["train"], "valid": held_out.paths["train"]}
    source = FilesSource(FilesSettings(paths, id_column="id"))
    settings = PrepareSettings(source, tokenizer, root / "dataset", chunk_tokens=512, chunks_per_shard=3)
    prepare(settings)
    return root / "dataset"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(made, tmp_path / "dataset")
    return tmp_path / "dataset"


def problems_of(folder: Path, depth="full") -> list[str]:
    return verify_dataset(folder, depth).problems


def edit(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def test_index_addresses_the_stream_like_one_array(folder, tokenizer):
    dataset = open_dataset(folder)
    index = dataset.split("train")
    stream = [token for text in TEXTS for token in [*tokenizer.processor.encode(text), tokenizer.eos_id]]
    assert index.tokens == len(stream) == int(index.token_start[-1])
    assert len(index.token_start) == len(index.chunk_shard) + 1 == len(index.chunk_data_offset) + 1
    for chunk in range(len(index.chunk_shard)):
        path = folder / index.shard_name(int(index.chunk_shard[chunk]))
        begin, end = int(index.token_start[chunk]), int(index.token_start[chunk + 1])
        tokens = np.fromfile(path, index.dtype, end - begin, offset=int(index.chunk_data_offset[chunk]))
        assert tokens.tolist() == stream[begin:end]
        starts = [i for i, token in enumerate(stream[: begin - 1 if begin else 0]) if token == tokenizer.eos_id]
        assert int(index.document_start[chunk]) == len(starts) + (begin > 0)
    for shard in range(index.num_shards):
        assert index.shard_bytes(shard) == (folder / index.shard_name(shard)).stat().st_size
        assert int(index.shards["first_chunk"][shard]) == 3 * shard


def test_whole_folder_has_no_problem_at_any_depth(folder):
    for depth in ("quick", "full", "deep"):
        report = verify_dataset(folder, depth)
        assert report.problems == []
        assert report.lines[-1].startswith(f"{folder}: whole (manifest, indexes, presence and sizes")


def test_bytes_on_disk_per_token(real_text, real_tokenizer, tmp_path):
    """At the default chunk size tars add less than one part in a thousand to two bytes per token."""
    pattern = str(real_text / "wikitext" / "*.raw")
    source = FilesSource(FilesSettings({"train": [pattern]}))
    manifest = prepare(PrepareSettings(source, real_tokenizer, tmp_path / "dataset"))
    size = sum(path.stat().st_size for path in (tmp_path / "dataset").glob("train-*.tar"))
    assert size / manifest.splits["train"].tokens / 2 < 1.003  # two chunks, the last one short


# --- damage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [0, 100])
def test_tar_cut_at_a_member_boundary_or_later(folder, extra):
    """A tar reader takes this for a shorter, clean shard."""
    path = folder / "train-000001.tar"
    size = path.stat().st_size
    first_member = 512 + 128 + 1024 + 384  # header, npy header, 512 tokens, padding
    cut = first_member + extra
    path.write_bytes(path.read_bytes()[:cut])
    for depth in ("quick", "full"):
        assert problems_of(folder, depth) == [
            f"{path}: {cut:,} bytes, expected {size:,} (truncated); restore the file, or prepare the dataset again"
        ]
    dataset = open_dataset(folder)
    assert check_shards(dataset, "train", [0, 1], hashes=False) == problems_of(folder)
    assert check_shards(dataset, "train", [0], hashes=True) == []


@pytest.mark.parametrize("offset", [10, 600, 700, 1024 + 640 + 20, 5000])
def test_one_flipped_bit_anywhere(folder, offset):
    path = folder / "train-000000.tar"
    byte = path.read_bytes()[offset]
    edit(path, offset, bytes([byte ^ 4]))
    assert problems_of(folder, "quick") == []
    (problem,) = problems_of(folder)
    assert problem.startswith(f"{path}: blake3 ")
    assert problem.endswith("(changed or damaged); restore the file, or prepare the dataset again")


def test_missing_renamed_extra_and_longer_shards_all_at_once(folder):
    (folder / "train-000000.tar").unlink()
    (folder / "train-000002.tar").rename(folder / "train-000077.tar")
    (folder / "valid-000000.tar").write_bytes((folder / "valid-000000.tar").read_bytes() + b"more")
    (folder / "train-000001.ids.jsonl").write_text("")
    problems = problems_of(folder, "quick")
    wanted = [
        r"train-000077.tar: belongs to no split of the manifest; move it away",
        r"train-000000.tar: missing; restore the file, or prepare the dataset again",
        r"train-000002.tar: missing",
        r"train-000001.ids.jsonl: 0 bytes, expected",
        r"valid-000000.tar: ",
    ]
    assert len(problems) == len(wanted)
    for part in wanted:
        assert any(part in problem for problem in problems), part
    assert any("(too long)" in problem for problem in problems)


def test_swapped_shards(folder):
    one, other = folder / "train-000000.tar", folder / "train-000001.tar"
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)
    assert len(problems_of(folder)) == 2


def test_shard_of_no_bytes(folder):
    (folder / "train-000000.tar").write_bytes(b"")
    assert "train-000000.tar: 0 bytes, expected" in problems_of(folder, "quick")[0]


@pytest.mark.parametrize("name", ["train.chunks.npy", "train.shards.npy", "train.blake3.npy"])
def test_damaged_and_missing_index(folder, name):
    edit(folder / name, 150, b"\x07")
    with pytest.raises(UserError, match=rf"{name}: sha256 .* \(changed or damaged\)"):
        open_dataset(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: missing; restore the file, or prepare"):
        open_dataset(folder)


def test_changed_tokenizer(folder):
    other = train_tokenizer(sentences(12, 100), TokenizerSettings(300))
    (folder / "tokenizer" / "tokenizer.model").write_bytes(other.model)
    (problem,) = problems_of(folder, "quick")
    assert "tokenizer.model: sha256" in problem


def test_hf_tokenizer_of_another_tokenizer(folder):
    other = train_tokenizer(sentences(12, 100), TokenizerSettings(300))
    (folder / "tokenizer" / "tokenizer.json").write_bytes(tokenizer_files(other)["tokenizer.json"])
    (problem,) = problems_of(folder)
    assert problem == (
        f"{folder}/tokenizer/tokenizer.json: not the Hugging Face form of tokenizer.model; restore the file, "
        "or prepare the dataset again"
    )


def rewrite(folder: Path, change) -> None:
    """Changes tokens of train's first shard, and makes hashes and manifest fit: damage before hashing."""
    from data_prep.hashing import digest_of, hash_file
    from data_prep.manifest import Manifest, read_manifest

    path = folder / "train-000000.tar"
    content = bytearray(path.read_bytes())
    index = open_dataset(folder).split("train")
    offset = int(index.chunk_data_offset[0])
    tokens = np.frombuffer(content, "<u2", 512, offset).copy()
    change(tokens)
    content[offset : offset + 1024] = tokens.tobytes()
    path.write_bytes(content)
    digests = np.load(folder / "train.blake3.npy")
    digests["shard"][0] = bytes.fromhex(digest_of(content).hex)
    np.save(folder / "train.blake3.npy", digests)
    fields = read_manifest(folder).model_dump()
    fields["splits"]["train"]["blake3_index_sha256"] = hash_file(folder / "train.blake3.npy")
    (folder / "manifest.json").write_bytes(Manifest(**fields).to_json())


def test_id_beyond_the_vocabulary(folder):
    def change(tokens):
        tokens[5] = 401

    rewrite(folder, change)
    (problem,) = problems_of(folder)
    assert problem.endswith("train-000000.tar: chunk 0: has the id 401; the vocabulary ends at 399")


def test_lost_eos(folder):
    def change(tokens):
        tokens[np.flatnonzero(tokens == 2)[1]] = 9

    rewrite(folder, change)
    assert any(p.endswith("chunk 0: its document starts do not follow its eos tokens") for p in problems_of(folder))


def test_other_tokens_of_the_same_kind_are_found_by_deep(folder, tokenizer):
    """A document encoded another way: still decodes to text, but not by this tokenizer's rules."""

    def change(tokens):
        ids = tokenizer.processor.piece_to_id(list(merges(tokenizer)[0]))  # neighbours that always merge
        start = int(np.flatnonzero(tokens == 2)[0]) + 1
        tokens[start : start + 2] = ids

    rewrite(folder, change)
    assert problems_of(folder) == []
    problems = problems_of(folder, "deep")
    assert any(problem.endswith("encoding its text gives other ids than are stored") for problem in problems)


# --- manifests ----------------------------------------------------------------------------------------------


def change_manifest(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_manifest_of_another_version(folder):
    change_manifest(folder, format_version=9)
    with pytest.raises(
        UserError, match="format version 9, this program reads 1 to 3; prepare the dataset again, or use"
    ):
        open_dataset(folder)


@pytest.mark.parametrize(
    "counts",
    [
        ["documents"],
        ["source_rows"],
        ["round_trip_documents"],
        ["documents", "source_rows", "round_trip_documents"],
        ["tokens"],
        ["chunks"],
        ["shards"],
        ["source_bytes"],
        ["words"],
        ["lines"],
    ],
)
def test_a_manifest_whose_counts_were_changed_is_found_though_its_hash_was_made_anew(folder, counts):
    manifest = open_dataset(folder).manifest
    info = manifest.splits["train"]
    changed = info.model_copy(update={count: getattr(info, count) - 1 for count in counts})
    forged = manifest.model_copy(update={"splits": {**manifest.splits, "train": changed}})
    (folder / "manifest.json").write_bytes(forged.to_json())
    try:
        problems = problems_of(folder, "deep")
    except UserError as error:
        problems = error.problems
    assert any("train" in problem for problem in problems)


def test_manifest_edited_by_hand(folder):
    change_manifest(folder, chunk_tokens=1024)
    with pytest.raises(UserError, match="the manifest was changed after it was written: restore it"):
        open_dataset(folder)
    change_manifest(folder, chunk_tokens="many", colour="red")
    with pytest.raises(UserError) as caught:
        open_dataset(folder)
    assert [problem.split(": ")[1] for problem in caught.value.problems] == ["chunk_tokens", "colour"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"half a", b"\xff\xfe"])
def test_manifest_that_is_none(folder, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"not a dataset manifest \(damaged, or of something else\)"):
        open_dataset(folder)


def test_folders_that_are_no_datasets(folder, tmp_path):
    with pytest.raises(UserError, match="no such dataset folder; make one with `globallocal prepare`"):
        open_dataset(tmp_path / "nowhere")
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"not a whole dataset \(manifest.json is missing, and it is written last\)"):
        open_dataset(folder)


def test_unknown_split_lists_the_known_ones(folder):
    with pytest.raises(UserError, match="no split 'validation'; it has train, valid"):
        open_dataset(folder).split("validation")


def test_dataset_id_follows_content_alone(folder, made):
    assert open_dataset(folder).dataset_id == open_dataset(made).dataset_id
    assert len(open_dataset(folder).dataset_id) == 64
