"""Held-out losses: a fixed sum becomes perplexities, each over its denominator."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.evaluate import perplexities, summed_loss


def test_each_figure_has_its_denominator() -> None:
    split: Any = SimpleNamespace(tokens=200, source_bytes=900, words=90, lines=10)
    result = perplexities(nats=600.0, targets=200, split=split)
    assert result["loss"] == 3.0
    assert result["token_perplexity"] == pytest.approx(math.exp(600 / 200))
    assert result["word_perplexity"] == pytest.approx(math.exp(600 / 100))
    assert result["bits_per_byte"] == pytest.approx(600 / math.log(2) / 900)


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
