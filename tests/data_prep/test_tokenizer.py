"""Tokenizers lose nothing, are the same every time, and their Hugging Face form gives the same ids."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.sources.files import FilesSettings, FilesSource
from data_prep.sources.sample import SampleArticles
from data_prep.tokenizers.hf_tokenizer import build_hf_tokenizer, differing_texts, tokenizer_files, write_tokenizer
from data_prep.tokenizers.tokenizer import (
    SELF_TEST_TEXTS,
    SPACE_MARK,
    Tokenizer,
    TokenizerSettings,
    load_tokenizer,
    train_tokenizer,
    vocabulary_advice,
)
from data_prep.tokenizers.train import make_tokenizer
from tests.data_prep.conftest import sentences

# Any text, and texts that are full of what breaks tokenizers.
any_text = st.text(st.characters(codec="utf-8"))
WORDS = "= == ... \x00 \ufeff 日本 ana na 1 - a aa the \t \r é ½ ﬁ 🙂 \u200d <s> </s> <0x41>"
bits = [*WORDS.split(" "), " ", "  ", "\n", "\n\n", " =", "x" * 70]
nasty_text = st.lists(st.sampled_from(bits)).map("".join)


def trained(**options) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in sentences(0, 400) for line in text.split("\n")]),
        model_writer=model,
        minloglevel=2,
        **{"vocab_size": 600, **options},
    )
    return Tokenizer(model.getvalue(), "given.model")


LOSSLESS = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
}


@settings(max_examples=300)
@given(st.one_of(any_text, nasty_text))
def test_text_survives_but_for_space_marks(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace(SPACE_MARK, " ")


@settings(max_examples=300)
@given(st.one_of(any_text, nasty_text))
def test_hf_tokenizer_gives_the_same_ids_and_text(tokenizer: Tokenizer, text: str):
    assert differing_texts(tokenizer, build_hf_tokenizer(tokenizer), [text]) == []


def test_real_text_survives_and_hf_tokenizer_agrees(real_text: Path, real_tokenizer: Tokenizer):
    hf_tokenizer = build_hf_tokenizer(real_tokenizer)
    files = [*real_text.glob("wikitext/*.raw"), *real_text.glob("novels/*.txt"), real_text / "enwiki2019/valid.txt"]
    assert len(files) == 11
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for start in range(0, len(lines), 500):
            text = "".join(lines[start : start + 500])
            ids = real_tokenizer.encode(text)
            where = f"{path}, 500 lines from {start}"
            assert ids.tolist() == real_tokenizer.processor.encode(text), where
            assert real_tokenizer.decode(ids) == text, where
            assert hf_tokenizer.encode(text).ids == ids.tolist(), where
            assert 0 not in ids, where


STRANGER = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts = json.load(sys.stdin)
assert not any(name in sys.modules for name in ("data_prep", "launch"))
ids = [tokenizer(text)["input_ids"] for text in texts]
special = [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
json.dump([ids, [tokenizer.decode(i) for i in ids], special, len(tokenizer)], sys.stdout)
"""


def test_auto_tokenizer_loads_the_folder_where_this_project_is_unknown(tokenizer, tokenizer_folder, tmp_path):
    texts = [*SELF_TEST_TEXTS, *sentences(9, 50)]
    job = subprocess.run(
        [sys.executable, "-c", STRANGER, tokenizer_folder],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    ids, decoded, special, size = json.loads(job.stdout)
    assert ids == [tokenizer.processor.encode(text) for text in texts]
    assert decoded == texts
    assert special == [0, 1, 2, 3]
    assert size == tokenizer.vocab_size


@pytest.mark.parametrize(
    "options",
    [
        LOSSLESS,
        {**LOSSLESS, "add_dummy_prefix": True},
        {**LOSSLESS, "split_by_whitespace": False},
        {**LOSSLESS, "allow_whitespace_only_pieces": True},
        {**LOSSLESS, "user_defined_symbols": ["<sep>", "nhr"]},
        {**LOSSLESS, "split_digits": True, "character_coverage": 0.98},
        {"model_type": "bpe", "vocab_size": 300},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items() if LOSSLESS.get(k) != v) or "lossless",
)
def test_a_model_of_ones_own_keeps_its_ids_and_gets_an_exact_hf_tokenizer(options):
    """Whatever the options, ids are those of sentencepiece itself, and so are those of its Hugging Face form."""
    given_model = trained(**options)
    texts = [*SELF_TEST_TEXTS, *sentences(5, 100), "a <sep> b nhrnhr nhr"]
    assert [given_model.encode(text).tolist() for text in texts] == [
        given_model.processor.encode(text) for text in texts
    ]
    assert differing_texts(given_model, build_hf_tokenizer(given_model), texts) == []


def test_unigram_is_lossless_and_encodes_whole_documents():
    tokenizer = train_tokenizer(sentences(0, 400), TokenizerSettings(400, "unigram"))
    assert not tokenizer.splits_at_spaces
    assert tokenizer.lossy_texts([*SELF_TEST_TEXTS, *sentences(5, 100)]) == []
    assert tokenizer.info.model_type == "unigram"
    assert tokenizer.info.encode_unit == "document"
    assert set(tokenizer_files(tokenizer)) == {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_the_same_every_time(model_type):
    first, second = (train_tokenizer(sentences(0, 200), TokenizerSettings(400, model_type)) for _ in range(2))
    assert first.sha256 == second.sha256
    assert tokenizer_files(first) == tokenizer_files(second)


def test_special_ids_are_fixed_and_text_never_gives_them(tokenizer: Tokenizer):
    info = tokenizer.info
    assert (info.unk_token_id, info.bos_token_id, info.eos_token_id, info.pad_token_id) == (0, 1, 2, 3)
    ids = tokenizer.encode("<unk> <s> </s> <pad> a</s>b")
    assert ids.min() > 3
    assert tokenizer.decode(ids) == "<unk> <s> </s> <pad> a</s>b"


@settings(max_examples=100)
@given(st.one_of(any_text, nasty_text))
def test_parts_of_a_text_have_its_ids_and_spell_it(tokenizer: Tokenizer, text: str):
    assert tokenizer.splits_at_spaces
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.tokenizers.tokenizer.SEGMENT_LENGTH", 3)
        parts = list(tokenizer.parts(text.encode()))
    assert b"".join(parts) == text.encode()
    ids = [tokenizer.encode(part) for part in parts]
    assert np.concatenate(ids).tolist() == tokenizer.processor.encode(text)
    assert tokenizer.spells(np.concatenate(ids), text.replace(SPACE_MARK, " ").encode())


def test_parts_of_long_texts_do_not_show(tokenizer: Tokenizer, monkeypatch):
    monkeypatch.setattr("data_prep.tokenizers.tokenizer.SEGMENT_LENGTH", 50)
    for text in [*sentences(7, 100), "x" * 500, " " * 500, "ab " * 200]:
        ids = np.concatenate([tokenizer.encode(part) for part in tokenizer.parts(text.encode())])
        assert ids.tolist() == tokenizer.processor.encode(text)


def test_large_vocabularies_use_four_bytes():
    tokenizer = trained(**LOSSLESS)
    tokenizer.__dict__["dtype"] = np.dtype("<u4")
    assert tokenizer.encode("some text").dtype == np.dtype("<u4")
    assert tokenizer.encode("some text").tolist() == tokenizer.processor.encode("some text")


# --- messages ---------------------------------------------------------------------------------------------


def test_too_small_a_text_names_the_largest_vocabulary():
    with pytest.raises(UserError) as caught:
        train_tokenizer(["the same line"] * 20, TokenizerSettings(8000))
    message = str(caught.value)
    assert message.startswith("vocab_size is 8,000, but this text has pieces for at most ")
    largest = int(message.split("at most ")[1].split(";")[0].replace(",", ""))
    assert train_tokenizer(["the same line"] * 20, TokenizerSettings(largest)).vocab_size == largest


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"vocab_size is 100; the least is 261 \(256 bytes, 4 special pieces\)"):
        train_tokenizer(["text"], TokenizerSettings(100))
    characters = "".join(chr(0x4E00 + i) for i in range(500))
    with pytest.raises(UserError, match=r"the characters of this text alone need \d+; set vocab_size to more than"):
        train_tokenizer([characters] * 3, TokenizerSettings(300))


def test_no_text_is_refused():
    with pytest.raises(UserError, match="no text to train a tokenizer on; check its path and its text column"):
        train_tokenizer([], TokenizerSettings(300))


def test_long_lines_are_learned_from():
    """sentencepiece's default drops lines of more than 4,192 bytes."""
    texts = [" ".join(["unmistakable"] * 800) for _ in range(5)]
    assert len(texts[0]) > 10_000
    tokenizer = train_tokenizer(texts, TokenizerSettings(284))
    assert tokenizer.processor.encode(" unmistakable", out_type=str) == ["\u2581unmistakable"]


def test_advice_when_the_text_is_small_for_the_vocabulary():
    assert vocabulary_advice(4096, 3_000_000) is None
    advice = vocabulary_advice(32_000, 3_000_000)
    assert advice is not None
    assert "vocab_size 32,000 is large for 3.0 MB of text" in advice
    assert "4,096 would suit it" in advice


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no such tokenizer; train one with `globallocal tokenizer --output FOLDER`"),
        (b"", "not a sentencepiece model; give the .model file itself"),
        (b"not a model", "not a sentencepiece model; give the .model file itself"),
    ],
)
def test_what_is_no_tokenizer_is_refused(content, message, tmp_path):
    path = tmp_path / "some.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(path)


def test_model_without_eos_is_refused():
    with pytest.raises(UserError, match="has no eos piece, which ends every document"):
        trained(**LOSSLESS, eos_id=-1)


def test_word_models_are_refused():
    with pytest.raises(UserError, match="of type 'word' has no Hugging Face form; use bpe or unigram"):
        tokenizer_files(trained(model_type="word", vocab_size=250, hard_vocab_limit=False))


# --- the folder ---------------------------------------------------------------------------------------------


def corpus(folder: Path, seed: int = 0) -> FilesSource:
    folder.mkdir(exist_ok=True)
    for i, text in enumerate(sentences(seed, 50)):
        (folder / f"{i}.txt").write_text(text)
    return FilesSource(FilesSettings({"train": [f"{folder}/*.txt"]}))


def test_same_command_again_reuses_the_folder_and_another_is_refused(tmp_path):
    source, output = corpus(tmp_path / "text"), tmp_path / "tokenizer"
    first = list(make_tokenizer(source, TokenizerSettings(300), output))
    assert "bpe tokenizer, 300 pieces, sha256" in first[1]
    times = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    again = list(make_tokenizer(source, TokenizerSettings(300), output))
    assert again[0] == f"{output}: this tokenizer is already there; left as it is"
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == times
    with pytest.raises(UserError, match="holds a tokenizer made with another settings; choose another folder"):
        list(make_tokenizer(source, TokenizerSettings(301), output))


def test_a_tokenizer_of_another_text_is_refused_whatever_names_and_sizes_say(tmp_path):
    source, output = corpus(tmp_path / "text"), tmp_path / "tokenizer"
    list(make_tokenizer(source, TokenizerSettings(300), output))
    file = next((tmp_path / "text").iterdir())
    file.write_bytes(file.read_bytes().replace(b"e", b"a"))
    with pytest.raises(UserError, match="holds a tokenizer made with another text; choose another folder"):
        list(make_tokenizer(FilesSource(FilesSettings(source.paths)), TokenizerSettings(300), output))


def test_the_same_text_by_another_path_is_the_same_tokenizer(tmp_path):
    output = tmp_path / "tokenizer"
    list(make_tokenizer(corpus(tmp_path / "text"), TokenizerSettings(300), output))
    again = list(make_tokenizer(corpus(tmp_path / "elsewhere"), TokenizerSettings(300), output))
    assert again[0] == f"{output}: this tokenizer is already there; left as it is"


def test_interrupted_writing_leaves_no_folder_and_the_next_one_is_whole(tmp_path):
    (tmp_path / ".tokenizer.partial").mkdir()
    (tmp_path / ".tokenizer.partial" / "tokenizer.json").write_text("half")
    list(make_tokenizer(corpus(tmp_path / "text"), TokenizerSettings(300), tmp_path / "tokenizer"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text", "tokenizer"]
    assert load_tokenizer(tmp_path / "tokenizer").vocab_size == 300


def test_a_tokenizer_of_somebody_else_is_never_overwritten(tokenizer, tmp_path):
    write_tokenizer(tmp_path / "theirs", tokenizer)
    before = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    with pytest.raises(UserError, match=r"the folder holds other files \(tokenizer.json, .*\); choose a new or empty"):
        list(make_tokenizer(corpus(tmp_path / "text"), TokenizerSettings(300), tmp_path / "theirs"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()} == before


def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("all my work")
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\); choose a new or empty folder"):
        list(make_tokenizer(SampleArticles(), TokenizerSettings(300), tmp_path))


def test_written_folder_loads_to_the_same_model(tokenizer, tmp_path):
    write_tokenizer(tmp_path / "t", tokenizer)
    assert load_tokenizer(tmp_path / "t").info == tokenizer.info
    assert load_tokenizer(tmp_path / "t" / "tokenizer.model").sha256 == tokenizer.sha256
