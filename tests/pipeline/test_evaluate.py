"""Held-out losses: a fixed sum becomes perplexities, each over its denominator."""

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.loader import evaluation_batches, evaluation_windows
from pipeline.data.token_stream import TokenStream
from pipeline.evaluation.by_position import HISTORIES, histories, loss_by_position
from pipeline.evaluation.figures import Evaluation, Figures, HeldOut, mixed, perplexities
from pipeline.evaluation.held_out import summed_loss
from tests.pipeline.dataset_fixture import cut, write_dataset


def test_each_figure_has_its_denominator() -> None:
    split: Any = SimpleNamespace(tokens=200, source_bytes=900, words=90, lines=10)
    result = perplexities(nats=600.0, targets=200, split=split)
    assert result.loss == 3.0
    assert result.token_perplexity == pytest.approx(math.exp(600 / 200))
    assert result.word_perplexity == pytest.approx(math.exp(600 / 100))
    assert result.bits_per_byte == pytest.approx(600 / math.log(2) / 900)


def test_a_mixture_has_no_perplexity_per_word_where_a_part_counts_no_words() -> None:
    figures = {name: Figures(3.0, tokens=200.0) for name in ("counted", "not counted")}
    splits: Any = [SimpleNamespace(tokens=200, source_bytes=900, words=words, lines=0) for words in (100, 0)]
    assert math.isnan(mixed(figures, [0.5, 0.5], splits).total.word_perplexity)
    both = mixed(figures, [0.5, 0.5], [splits[0], splits[0]]).total
    assert both.word_perplexity == pytest.approx(math.exp(6.0))
    assert both.loss == 3.0


class Uniform(torch.nn.Module):
    """A model whose loss is the mean target id, so that a wrong weighting shows."""

    def forward(self, input_ids: torch.Tensor, shift_labels: torch.Tensor) -> Any:
        counted = shift_labels[shift_labels != -100].double()
        return SimpleNamespace(language_loss=counted.mean())


def test_padded_targets_and_empty_batches_do_not_count() -> None:
    tokens = np.array([[0, 1, 2], [0, 3, 9]], dtype=np.int64)
    batches = [
        (tokens, np.array([[True, True], [True, False]])),
        (tokens * 0, np.zeros((2, 2), bool)),
    ]
    assert summed_loss(Uniform(), batches, torch.device("cpu")) == (6.0, 3)


def test_an_evaluation_is_read_as_it_was_written_and_numbers_that_are_not_finite_too() -> None:
    """A text without spaces has no finite perplexity per word; earlier versions wrote null for it."""
    whole = Evaluation(
        3, HeldOut(Figures(7.0, 1096.6, math.inf, 2.0, 160.0), {"books": Figures(6.0, 403.4, 9.0, 2.0, 80.0)})
    )
    assert list(whole.flat())[:2] == ["step", "loss"]
    assert whole.flat()["books/loss"] == 6.0
    assert whole.held_out.metrics()["loss/valid/books"] == 6.0
    assert Evaluation.read(whole.flat()) == whole
    assert math.isnan(Evaluation.read(whole.flat() | {"word_perplexity": None}).held_out.total.word_perplexity)


@pytest.mark.parametrize("tokens", [2, 7, 8, 9, 10, 31, 40])
@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_windows_count_every_target_once_with_as_much_before_it_as_they_promise(
    tmp_path: Path, tokens: int, stride: int
) -> None:
    """Whatever the ranks: targets are numbered through, and each row says which stream it is a part of."""
    numbered = np.arange(1, tokens + 1, dtype="<u2")
    stream = TokenStream(write_dataset(tmp_path, {"valid": cut(numbered, 16, 2)}), "valid")
    seen: list[int] = []
    rows = 0
    for rank in (0, 1):
        for batch, counted in evaluation_batches(stream, 8, 2, rank, 2, stride=stride):
            for row, chosen in zip(batch, counted, strict=True):
                rows += bool(chosen.any())
                for place in np.flatnonzero(chosen):
                    target = row[place + 1]
                    before = row[: place + 1]
                    assert before.tolist() == list(range(target - len(before), target))
                    assert len(before) > min(8 - stride, target - 2)
                    seen.append(target)
    assert sorted(seen) == list(range(2, tokens + 1))
    assert rows == evaluation_windows(tokens, 8, stride)


class Bigrams(torch.nn.Module):
    """Logits from the token before alone, and from the position."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocabulary)
        self.table = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(0))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.table[input_ids] * (1 + torch.arange(input_ids.shape[1])[:, None]))


def plain_losses(model: Bigrams, row: list[int]) -> list[float]:
    found = []
    for place, (token, target) in enumerate(pairwise(row)):
        scores = [float(score) * (1 + place) for score in model.table[token]]
        found.append(math.log(sum(math.exp(score) for score in scores)) - scores[target])
    return found


def plain_history(row: list[int], place: int) -> str:
    """Of the target that stands behind `place`."""
    before, target = row[: place + 1], row[place + 1]
    if any(before[i : i + 2] == [row[place], target] for i in range(len(before) - 1)):
        return "bigram repeated"
    return "token repeated" if target in before else "token new"


def test_losses_by_position_and_by_what_stood_before_are_those_of_a_plain_computation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vocabulary, length = 9, 21
    monkeypatch.setattr("pipeline.evaluation.by_position.LOGITS_BYTES", 2 * 4 * vocabulary * length)  # 2 rows at once
    model = Bigrams(vocabulary)
    random = np.random.default_rng(0)
    batches = [(random.integers(0, vocabulary, (5, length + 1)), random.random((5, length)) < 0.8) for _ in range(3)]
    found = loss_by_position(model, batches, torch.device("cpu"))

    by_position: dict[int, list[float]] = {place: [] for place in range(length)}
    by_history: dict[str, list[float]] = {name: [] for name in HISTORIES}
    for tokens, counted in batches:
        for row, chosen in zip(tokens.tolist(), counted.tolist(), strict=True):
            for place, loss in enumerate(plain_losses(model, row)):
                if chosen[place]:
                    by_position[place].append(loss)
                    by_history[plain_history(row, place)].append(loss)
    assert [group.name for group in found.positions()] == ["0", "1", "2-3", "4-7", "8-15", "16-20"]
    for group in found.positions():
        first, _, last = group.name.partition("-")
        losses = [loss for place in range(int(first), int(last or first) + 1) for loss in by_position[place]]
        assert (group.loss, group.targets) == (pytest.approx(np.mean(losses), rel=1e-6), len(losses))
    for group in found.histories():
        losses = by_history[group.name]
        assert losses, "each is in this text"
        assert (group.loss, group.targets) == (pytest.approx(np.mean(losses), rel=1e-6), len(losses))


def test_a_bigram_that_overlaps_itself_has_come_before() -> None:
    assert [HISTORIES[kind] for kind in histories(np.array([[5, 5, 5, 6, 5, 6]]))[0]] == [
        "token repeated",  # 5 behind 5: the two 5s are the first such pair
        "bigram repeated",
        "token new",
        "token repeated",
        "bigram repeated",
    ]
