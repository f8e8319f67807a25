"""The fast encoder gives sentencepiece's ids or is not used; a dataset's bytes do not depend on who encoded."""

from __future__ import annotations

import json
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.encode import Encoder, Filters
from data_prep.errors import UserError
from data_prep.manifest import open_dataset
from data_prep.measures import SPACES, lossy, words_and_newlines
from data_prep.packing import Position
from data_prep.prepare import prepare
from data_prep.prepare_settings import PrepareSettings
from data_prep.sources.documents import BatchTask, Document, ReadCounts
from data_prep.sources.files import FilesSettings, FilesSource
from data_prep.tokenizers import fast_encoder
from data_prep.tokenizers.fast_encoder import FastEncoder, choose_encoder, hostile_texts, sample_texts
from data_prep.tokenizers.hf_tokenizer import tokenizer_files
from data_prep.tokenizers.tokenizer import Tokenizer, TokenizerSettings, train_tokenizer
from data_prep.verify import verify_dataset
from tests.data_prep.conftest import folder_bytes, sentences, write_texts

any_text = st.text(st.characters(codec="utf-8"))
WORDS = "= == ... \x00 \ufeff 日本 ana na 1 - a aa the \t \r é ½ ﬁ 🙂 \u200d <s> </s> <0x41> \u2581 \u2028 \u3000 \x85"
nasty_text = st.lists(st.sampled_from([*WORDS.split(" "), " ", "  ", "\n", "\n\n", " =", "x" * 70])).map("".join)


@pytest.fixture(scope="module")
def definition(tokenizer: Tokenizer) -> bytes:
    return tokenizer_files(tokenizer)["tokenizer.json"]


@pytest.fixture(scope="module")
def fast(definition: bytes) -> FastEncoder:
    return FastEncoder(definition)


@pytest.fixture
def without_gigatoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # what an import finds where it is not installed


@settings(max_examples=300)
@given(st.one_of(any_text, nasty_text))
def test_ids_are_sentencepieces(tokenizer: Tokenizer, fast: FastEncoder, text: str):
    assert fast.encode(text.encode()).tolist() == tokenizer.processor.encode(text)


def test_ids_are_sentencepieces_on_real_text(real_text: Path, real_tokenizer: Tokenizer):
    fast = FastEncoder(tokenizer_files(real_tokenizer)["tokenizer.json"])
    for path in [*real_text.glob("wikitext/*.raw"), real_text / "enwiki2019/valid.txt"]:
        text = path.read_text(encoding="utf-8")
        assert fast.encode(text.encode()).tolist() == real_tokenizer.processor.encode(text), path


def test_a_fresh_start_after_many_words_and_a_pickle_change_nothing(tokenizer, fast, monkeypatch):
    monkeypatch.setattr(fast_encoder, "RENEW_BYTES", 100)
    copy = pickle.loads(pickle.dumps(fast))
    for text in sentences(3, 50):
        assert copy.encode(text.encode()).tolist() == tokenizer.processor.encode(text)


def test_hostile_texts_are_the_same_every_time_and_spell_the_special_pieces(tokenizer):
    texts = list(hostile_texts(tokenizer))
    assert texts == list(hostile_texts(tokenizer))
    everything = "".join(texts)
    assert all(bit in everything for bit in ("</s>", "<unk>", "<0x41>", "\0", "\u2581", "\ufffd", "\n\n", "🙂"))
    assert max(map(len, texts)) > 500


def test_the_sample_is_the_beginning_of_each_split(tmp_path, monkeypatch):
    monkeypatch.setattr(fast_encoder, "SAMPLE_CHARACTERS", 10)
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text(f"{name} and more of it")
    paths = {name: [f"{tmp_path}/{name}.txt"] for name in ("train", "valid")}
    assert list(sample_texts(FilesSource(FilesSettings(paths)))) == ["train and ", "valid and "]


def test_one_difference_means_sentencepiece(tokenizer, definition, caplog):
    """Rules of merging in another order are what an inexact encoder looks like."""
    content = json.loads(definition)
    content["model"]["merges"].reverse()
    fast, info = choose_encoder(tokenizer, json.dumps(content).encode(), [])
    assert fast is None
    assert (info.name, info.differences > 0, info.compared > 1000) == ("sentencepiece", True, True)
    assert "gives other ids for" in caplog.text
    assert len(caplog.records) == 1


def test_a_difference_on_the_runs_own_text_counts(tokenizer, definition, monkeypatch):
    monkeypatch.setattr(fast_encoder, "hostile_texts", lambda tokenizer: [])
    content = json.loads(definition)
    lost = "".join(content["model"]["merges"].pop(0)).replace("\u2581", " ")
    fast, info = choose_encoder(tokenizer, json.dumps(content).encode(), [lost, "\n"])
    assert fast is None
    assert (info.compared, info.differences) == (2, 1)


def test_without_the_package_sentencepiece_encodes_and_a_line_says_so(tokenizer, definition, without_gigatoken, caplog):
    fast, info = choose_encoder(tokenizer, definition, ["text"])
    assert fast is None
    assert (info.name, info.differences) == ("sentencepiece", 0)
    assert "gigatoken cannot be used" in caplog.text


def test_a_unigram_model_is_sentencepieces(tmp_path, caplog):
    tokenizer = train_tokenizer(sentences(0, 400), TokenizerSettings(400, "unigram"))
    texts = [*sentences(7, 30), "", "a  b", "日本 🙂\n"]
    manifest = prepare(PrepareSettings(write_texts(tmp_path / "t", texts), tokenizer, tmp_path / "d", chunk_tokens=512))
    assert manifest.encoder is not None
    assert manifest.encoder.name == "sentencepiece"
    assert "knows only BPE models" in caplog.text
    assert verify_dataset(tmp_path / "d", "deep").problems == []


# --- the same bytes -------------------------------------------------------------------------------------------


def both(texts: list[str], tokenizer: Tokenizer, folder: Path, filters: Filters | None = None) -> None:
    """Prepares with each encoder; what is written must be the same but for the encoder's name."""
    source = write_texts(folder / "texts", texts)
    written = {}
    for name in ("gigatoken", "sentencepiece"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "sentencepiece":
                patch.setitem(sys.modules, "gigatoken", None)
            settings = PrepareSettings(
                source, tokenizer, folder / name, filters or Filters(), chunk_tokens=512, chunks_per_shard=4
            )
            manifest = prepare(settings)
        assert manifest.encoder is not None
        assert manifest.encoder.name == name
        assert manifest.encoder.differences == 0
        assert open_dataset(folder / name).dataset_id == manifest.dataset_id
        content = folder_bytes(folder / name)
        fields = json.loads(content.pop("manifest.json"))
        del fields["encoder"]
        written[name] = content, fields
    assert written["gigatoken"] == written["sentencepiece"]


CORPORA = {
    "sentences": sentences(11, 400),
    "empty": ["", "", " ", "\n", "x"],
    "marks": ["a\u2581b c", "\u2581", " \u2581 d"],
    "equal": ["one text", "one text", "two"] * 20,
    "spaces": ["a\u00a0b\u3000c\u2028d\x85e\x1cf", "\u3000", "\u2003x\u2003", "é \xa0"],
    "characters": ["".join(chr(c) for c in range(start, start + 400)) for start in range(0, 0xD800 - 400, 4000)],
    "long": ["x" * 3000, "ab " * 2000, " " * 5000, "\n" * 5000, "日本" * 1000],
}


@pytest.mark.parametrize("name", CORPORA)
def test_a_dataset_is_the_same_whoever_encodes(name, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.tokenizers.tokenizer.SEGMENT_LENGTH", 1000)
    monkeypatch.setattr("data_prep.encode.BLOCK_CHARACTERS", 1500)
    both(CORPORA[name], tokenizer, tmp_path, Filters(drop_duplicates=name == "equal"))


@settings(max_examples=8)
@given(st.lists(st.one_of(any_text, nasty_text), min_size=1, max_size=30))
def test_a_dataset_of_any_text_is_the_same_whoever_encodes(tokenizer, tmp_path_factory, texts):
    both(texts, tokenizer, tmp_path_factory.mktemp("any"))


# --- measures -------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.lists(st.one_of(any_text, nasty_text)))
def test_words_and_newlines_are_those_of_str(texts: list[str]):
    words, newlines = words_and_newlines([text.encode() for text in texts])
    assert words.tolist() == [len(text.split()) for text in texts]
    assert newlines.tolist() == [text.count("\n") for text in texts]


def test_every_white_space_is_known():
    assert [character.decode() for character in SPACES] == [
        chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000 and chr(code).isspace()
    ]
    rng = random.Random(5)
    texts = ["".join(rng.choice([" ", "a", "é", "日", *(s.decode() for s in SPACES)]) for _ in range(80))]
    assert words_and_newlines([texts[0].encode()])[0].tolist() == [len(texts[0].split())]


class Wrong(Tokenizer):
    def encode(self, text: str | bytes) -> np.ndarray:
        assert isinstance(text, bytes)
        return super().encode(text.replace(b"Z", b"Q"))


@pytest.mark.parametrize("part_bytes", [100, 1 << 20])
@pytest.mark.parametrize("place", [0, 1, 2500])
def test_a_wrong_token_is_refused_by_name_and_place(place, part_bytes, tokenizer: Tokenizer, monkeypatch):
    """Whatever encoded: what does not decode to its text goes into no shard, in parts or among other documents."""
    monkeypatch.setattr("data_prep.tokenizers.tokenizer.SEGMENT_LENGTH", part_bytes)
    text = "é" + "a b " * 1000
    bad = Document("bad one", f"{text[:place]}Z{text[place + 1 :]}")
    encoder = Encoder(Wrong(tokenizer.model, "wrong"), Filters())
    for documents in ([bad], [Document("good", "good"), bad, Document("empty", "")]):
        with pytest.raises(UserError, match=f"'bad one' does not survive the tokenizer: at character {place:,} the "):
            encoder(BatchTask(Position(0, 0), 0, documents, ReadCounts()))


def test_a_missing_or_special_token_is_no_round_trip(tokenizer: Tokenizer):
    for wrong in ([], [tokenizer.eos_id], [0], tokenizer.encode("</s>x").tolist()):
        for texts in ([b"</s>"], [b"</s>", b""], [b"", b"</s>"]):
            tokens = [[*(wrong if text else []), tokenizer.eos_id] for text in texts]
            flat = np.array([id for ids in tokens for id in ids], tokenizer.dtype)
            found = lossy(tokenizer, texts, flat, np.array(list(map(len, tokens))))
            assert found.tolist() == [bool(text) for text in texts]


def test_no_documents_are_no_trouble(tokenizer: Tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n" + '{"text": null}\n')
    task = next(iter(FilesSource(FilesSettings({"train": [str(tmp_path / "a.jsonl")]})).tasks("train")))
    encoded = Encoder(tokenizer, Filters())(task)
    assert (len(encoded.tokens), len(encoded.documents)) == (0, 0)
