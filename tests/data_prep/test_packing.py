"""The stream's chunks depend on the documents alone, not on how tasks cut them or where a run stopped."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.packing import END, ChunkCounters, Piece, Position, pack

EOS = 2
DTYPE = np.dtype("<u2")

documents_strategy = st.lists(st.integers(0, 30), min_size=0, max_size=30)  # tokens without eos


def make_pieces(lengths: list[int], cuts: list[int]) -> list[Piece]:
    """Documents of `lengths` tokens, grouped into tasks at `cuts`."""
    rng = np.random.default_rng(sum(lengths))
    bounds = sorted({0, len(lengths), *(cut % (len(lengths) + 1) for cut in cuts)})
    pieces = []
    for part, (begin, end) in enumerate(itertools.pairwise(bounds)):
        tokens, starts = [], []
        for length in lengths[begin:end]:
            starts.append(len(tokens))
            tokens += [*rng.integers(3, 60_000, length), EOS]
        ids = [f"d{i}" for i in range(begin, end)]
        pieces.append(
            Piece(Position(0, part), np.array(tokens, DTYPE), np.array(starts, np.int64), ids)
        )  # fmt: skip
    return pieces


@given(documents_strategy, st.lists(st.integers(0, 30), max_size=8), st.integers(1, 50))
def test_chunks_spell_the_stream_and_mark_every_document(lengths, cuts, chunk_tokens):
    pieces = make_pieces(lengths, cuts)
    chunks = list(pack(pieces, chunk_tokens, DTYPE))
    stream = np.concatenate([np.empty(0, DTYPE), *(piece.tokens for piece in pieces)])
    assert np.array_equal(np.concatenate([np.empty(0, DTYPE), *(c.tokens for c in chunks)]), stream)
    assert all(len(chunk.tokens) == chunk_tokens for chunk in chunks[:-1])
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    assert [id for chunk in chunks for id in chunk.ids] == [f"d{i}" for i in range(len(lengths))]
    starts = [chunk.token_start + int(start) for chunk in chunks for start in chunk.document_starts]
    expected = np.cumsum([0, *(length + 1 for length in lengths)])[:-1]
    assert starts == expected.tolist()
    assert int(np.sum(stream == EOS)) == len(lengths)
    for chunk in chunks:
        assert chunk.document_start == sum(start < chunk.token_start for start in starts)


@given(documents_strategy, st.lists(st.integers(0, 30), max_size=8), st.integers(1, 50))
def test_tasks_do_not_show_in_the_chunks(lengths, cuts, chunk_tokens):
    def shape(pieces):
        return [(c.tokens.tolist(), c.document_starts.tolist(), c.ids) for c in pack(pieces, chunk_tokens, DTYPE)]

    # The tokens are drawn piece after piece from one generator, so the cut does not change them.
    assert shape(make_pieces(lengths, cuts)) == shape(make_pieces(lengths, []))


@settings(max_examples=200)
@given(documents_strategy, st.lists(st.integers(0, 30), max_size=8), st.integers(1, 50), st.integers(0, 40))
def test_goes_on_from_any_chunk(lengths, cuts, chunk_tokens, stop):
    pieces = make_pieces(lengths, cuts)
    chunks = list(pack(pieces, chunk_tokens, DTYPE))
    done = chunks[: stop % (len(chunks) + 1)]
    if not done or done[-1].next_position == END:
        return
    last = done[-1]
    counters = ChunkCounters(
        len(done),
        last.token_start + len(last.tokens),
        last.document_start + len(last.ids),
        last.next_position,
        last.next_offset,
    )
    remaining = [piece for piece in pieces if piece.position >= last.next_position]
    resumed = list(pack(remaining, chunk_tokens, DTYPE, counters))
    assert len(resumed) == len(chunks) - len(done)
    for mine, whole in zip(resumed, chunks[len(done) :], strict=True):
        assert np.array_equal(mine.tokens, whole.tokens)
        assert np.array_equal(mine.document_starts, whole.document_starts)
        assert (mine.number, mine.ids, mine.token_start, mine.document_start) == (
            whole.number,
            whole.ids,
            whole.token_start,
            whole.document_start,
        )
