"""Held-out losses: a fixed sum becomes perplexities, each over its denominator."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.evaluation.figures import Evaluation, Figures, HeldOut, perplexities
from pipeline.evaluation.held_out import summed_loss


def test_each_figure_has_its_denominator() -> None:
    split: Any = SimpleNamespace(tokens=200, source_bytes=900, words=90, lines=10)
    result = perplexities(nats=600.0, targets=200, split=split)
    assert result.loss == 3.0
    assert result.token_perplexity == pytest.approx(math.exp(600 / 200))
    assert result.word_perplexity == pytest.approx(math.exp(600 / 100))
    assert result.bits_per_byte == pytest.approx(600 / math.log(2) / 900)


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
