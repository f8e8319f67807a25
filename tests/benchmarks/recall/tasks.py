"""The tests of ability: each a pure function that makes sequences and says where an answer is asked.

All share one vocabulary. A generator takes numpy's random state, a number of sequences B and a size, and returns ids
int64 [B, S] and targets int64 [B, S]: the target of position t is what the model has to name after ids[:, : t + 1],
−100 where nothing is asked. No target is part of what the model reads from that position on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BLANK, ASK = 0, 1
KEYS = np.arange(2, 34)
VALUES = np.arange(34, 66)
VOCAB_SIZE = 66
UNASKED = -100
COPIED = 8  # tokens that selective copying has to bring back
NEEDLES = 4
PIECES = (2, 6)  # shortest and longest piece that induction shows again

Arrays = tuple[np.ndarray, np.ndarray]


def recall(rng: np.random.Generator, sequences: int, pairs: int) -> Arrays:
    """Multi-query associative recall (Zoology, arXiv:2312.04927): key value key value …, then each key once, asked for
    its value. Keys are distinct, values are not; S = 3 · pairs."""
    keys = rng.permuted(np.tile(KEYS, (sequences, 1)), axis=1)[:, :pairs]
    values = rng.choice(VALUES, (sequences, pairs))
    order = rng.permuted(np.tile(np.arange(pairs), (sequences, 1)), axis=1)
    shown = np.stack([keys, values], axis=2).reshape(sequences, 2 * pairs)
    ids = np.concatenate([shown, np.take_along_axis(keys, order, 1)], axis=1)
    targets = np.full_like(ids, UNASKED)
    targets[:, 2 * pairs :] = np.take_along_axis(values, order, 1)
    return ids, targets


def induction(rng: np.random.Generator, sequences: int, symbols: int) -> Arrays:
    """Distinct symbols in a row, then the same row cut into pieces and shuffled: inside a piece, what comes next is
    what came next before. Pieces of 2 to 6 symbols, so that no fixed distance tells the answer; S = 2 · symbols."""
    rows = []
    for _ in range(sequences):
        row = rng.permutation(KEYS)[:symbols]
        pieces = np.split(row, _cuts(rng, symbols))
        again = [pieces[i] for i in rng.permutation(len(pieces))]
        asked = [np.append(piece[1:], UNASKED) for piece in again]
        rows.append((np.concatenate([row, *again]), np.concatenate([np.full(symbols, UNASKED), *asked])))
    ids, targets = zip(*rows, strict=True)
    return np.stack(ids), np.stack(targets)


def _cuts(rng: np.random.Generator, length: int) -> np.ndarray:
    """Where a row of that length is cut."""
    shortest, longest = PIECES
    cuts = np.cumsum(rng.integers(shortest, longest + 1, length))
    return cuts[cuts <= length - shortest]


def selective_copying(rng: np.random.Generator, sequences: int, length: int) -> Arrays:
    """Eight values at random places among blanks, then eight times the question: the values, in their order (Mamba,
    arXiv:2312.00752). The question is the same each time, so the model has to count; S = length + 8."""
    ids = np.full((sequences, length + COPIED), BLANK)
    places = np.sort(rng.permuted(np.tile(np.arange(length), (sequences, 1)), axis=1)[:, :COPIED], axis=1)
    values = rng.choice(VALUES, (sequences, COPIED))
    np.put_along_axis(ids, places, values, 1)
    ids[:, length:] = ASK
    targets = np.full_like(ids, UNASKED)
    targets[:, length:] = values
    return ids, targets


def needle(rng: np.random.Generator, sequences: int, length: int) -> Arrays:
    """Four pairs of key and value at random places in a text of random values, and at its end the four keys, in any
    order; S = length."""
    body = length - NEEDLES
    ids = rng.choice(VALUES, (sequences, length))
    slots = rng.permuted(np.tile(np.arange(body // 2), (sequences, 1)), axis=1)[:, :NEEDLES]
    keys = rng.permuted(np.tile(KEYS, (sequences, 1)), axis=1)[:, :NEEDLES]
    np.put_along_axis(ids, 2 * slots, keys, 1)  # slots are pairs of places, so that no needle covers another
    ids[:, body:] = keys
    targets = np.full_like(ids, UNASKED)
    targets[:, body:] = np.take_along_axis(ids, 2 * slots + 1, 1)
    return ids, targets


@dataclass(frozen=True)
class Task:
    """A generator, what it asks in words, the sizes that training mixes, and those that are asked afterwards.

    `guess` tells of a size how often naming anything that was shown, and could be an answer, is right.
    """

    title: str
    question: str
    size_name: str
    generate: Callable[[np.random.Generator, int, int], Arrays]
    guess: Callable[[int], float]
    trained: tuple[int, ...]
    asked: tuple[int, ...]
    steps: int
    tokens_per_step: int


TASKS = {
    "recall": Task(
        "Associative recall",
        "Pairs of key and value, then each key once: its value? (MQAR of Zoology, arXiv:2312.04927.)",
        "pairs", recall, lambda pairs: 1 / pairs, (4, 8, 16), (4, 8, 16, 32), 600, 512,
    ),
    "induction": Task(
        "Induction",
        "A row of distinct symbols, then its pieces of 2 to 6, shuffled: inside a piece, which symbol comes next?",
        "symbols", induction, lambda symbols: 1 / symbols, (8, 16), (8, 16, 32), 600, 512,
    ),
    "copying": Task(
        "Selective copying",
        "Eight values at random places among blanks, then eight times the same question: the values in their order "
        "(arXiv:2312.00752).",
        "places", selective_copying, lambda length: 1 / COPIED, (16, 32), (16, 32, 64, 128), 600, 512,
    ),
    "needle": Task(
        "Needle",
        "Four pairs of key and value somewhere in a text of random values, and at its end the keys: their values?",
        "tokens", needle, lambda length: 1 / NEEDLES, (64, 128, 256), (256, 512, 1024, 2048, 4096), 500, 1024,
    ),
}  # fmt: skip
