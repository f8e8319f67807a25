"""The stage with filters, and with a tokenizer that loses text: what is dropped or changed is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data_prep.encode import Filters
from data_prep.errors import UserError
from data_prep.manifest import open_dataset
from data_prep.prepare import prepare
from data_prep.tokenizers.tokenizer import Tokenizer
from data_prep.verify import documents_of, verify_dataset
from tests.data_prep.conftest import sentences, small, write_texts


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
