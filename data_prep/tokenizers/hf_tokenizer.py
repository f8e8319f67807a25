"""The Hugging Face form of a tokenizer: the same ids from `AutoTokenizer`, without sentencepiece.

`tokenizer.json` is built from the model's pieces; before it is written, its ids are compared with
sentencepiece's on texts that commonly tell the two apart.

That holds for BPE. For unigram models the `tokenizers` library sums scores in another precision, so that it
may choose another of two almost equally likely segmentations, and takes a literal "</s>" for the piece: such
a form is close, not exact, and `UNIGRAM_NOTE` says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from data_prep.errors import UserError
from data_prep.store import FolderStore
from data_prep.tokenizers.tokenizer import (
    MODEL_NAME,
    PIECE_NORMAL,
    PIECE_USER_DEFINED,
    SELF_TEST_TEXTS,
    SPACE_MARK,
    Tokenizer,
)

UNIGRAM_NOTE = (
    "the Hugging Face form of a unigram model is close, not exact: about one id in 100,000 may differ, and a "
    'literal "</s>" in text becomes the special piece; --model-type bpe gives an exact one'
)


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes a tokenizer folder that both this project and `AutoTokenizer.from_pretrained` load."""
    store = FolderStore(folder)
    for name, content in tokenizer_files(tokenizer).items():
        store.publish(name, content)


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of a tokenizer folder, by name.

    Raises UserError if its Hugging Face form's ids would differ from sentencepiece's.
    """
    hf_tokenizer = build_hf_tokenizer(tokenizer)
    exact = tokenizer.info.model_type == "bpe"
    if exact and (different := differing_texts(tokenizer, hf_tokenizer, SELF_TEST_TEXTS)):
        shown = ", ".join(map(repr, different[:3]))
        raise UserError(
            f"{tokenizer.where}: its Hugging Face form would give other ids for {shown}; "
            "use a tokenizer made by `globallocal tokenizer`"
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a literal "</s>" in a text is text
        "model_max_length": 10**30,
        **special_tokens(tokenizer),
    }
    return {
        MODEL_NAME: tokenizer.model,
        "tokenizer.json": hf_tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n",
    }


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The special pieces that the model has, under the names that transformers uses."""
    info, pieces = tokenizer.info, tokenizer.proto.pieces
    ids = {
        "unk_token": info.unk_token_id,
        "bos_token": info.bos_token_id,
        "eos_token": info.eos_token_id,
        "pad_token": info.pad_token_id,
    }
    return {name: pieces[id].piece for name, id in ids.items() if id >= 0}


def build_hf_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """A `tokenizers` pipeline with the model's normalisation, pieces, merges and bytes.

    Raises UserError for models that are neither BPE nor unigram.
    """
    proto, spec = tokenizer.proto, tokenizer.proto.normalizer_spec
    hf_tokenizer = tokenizers.Tokenizer(_model(tokenizer))
    steps: list[normalizers.Normalizer] = (
        [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    )
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(" ")] if spec.add_dummy_prefix else []
    hf_tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE_MARK)])
    if tokenizer.splits_at_spaces:  # cuts where no merge reaches across, which lets words be cached
        hf_tokenizer.pre_tokenizer = pre_tokenizers.Split(SPACE_MARK, "merged_with_next")
    parts: list[decoders.Decoder] = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    parts += [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    hf_tokenizer.decoder = decoders.Sequence(parts)
    # A piece with a space in it is never met: sentencepiece looks for pieces after spaces became marks.
    user_defined = [p.piece for p in proto.pieces if p.type == PIECE_USER_DEFINED and " " not in p.piece]
    hf_tokenizer.add_tokens([AddedToken(piece, normalized=True) for piece in user_defined])
    hf_tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in special_tokens(tokenizer).values()])
    hf_tokenizer.encode_special_tokens = True
    return hf_tokenizer


def _model(tokenizer: Tokenizer) -> models.BPE | models.Unigram:
    proto = tokenizer.proto
    kind = tokenizer.info.model_type
    byte_fallback = proto.trainer_spec.byte_fallback
    if kind == "unigram":
        pieces = [(piece.piece, piece.score) for piece in proto.pieces]
        return models.Unigram(pieces, tokenizer.info.unk_token_id, byte_fallback)
    if kind != "bpe":
        raise UserError(
            f"{tokenizer.where}: a sentencepiece model of type '{kind}' has no Hugging Face form; use bpe or unigram"
        )
    vocabulary = {piece.piece: id for id, piece in enumerate(proto.pieces)}
    return models.BPE(
        vocab=vocabulary,
        merges=merges(tokenizer),
        unk_token=proto.pieces[tokenizer.info.unk_token_id].piece,
        fuse_unk=True,
        byte_fallback=byte_fallback,
    )


def merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Merge rules in the order in which sentencepiece would apply them: best score of the result first.

    sentencepiece merges any two neighbours whose concatenation is a piece; every way to cut a piece in
    two is therefore a rule.
    """
    scores = {piece.piece: piece.score for piece in tokenizer.proto.pieces if piece.type == PIECE_NORMAL}
    rules = [
        (-score, len(left), left, piece[len(left) :])
        for piece, score in scores.items()
        for left in (piece[:cut] for cut in range(1, len(piece)))
        if left in scores and piece[len(left) :] in scores
    ]
    rules.sort(key=lambda rule: (rule[0], -rule[1]))
    return [(left, right) for _, _, left, right in rules]


def differing_texts(tokenizer: Tokenizer, hf_tokenizer: tokenizers.Tokenizer, texts: Iterable[str]) -> list[str]:
    """The texts among `texts` for which ids or decoded text differ between sentencepiece and the Hugging Face form.

    Decoded unknown pieces are spelled differently by the two, and not compared.
    """
    different = []
    for text in texts:
        expected = tokenizer.processor.encode(text)
        ids = hf_tokenizer.encode(text, add_special_tokens=False).ids
        readable = tokenizer.info.unk_token_id not in expected
        if ids != expected or (
            readable and hf_tokenizer.decode(ids, skip_special_tokens=False) != tokenizer.decode(expected)
        ):
            different.append(text)
    return different
