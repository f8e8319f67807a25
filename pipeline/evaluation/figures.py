"""The figures of an evaluation: a loss, what follows from it, and the names under which it is recorded."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from data_prep.manifest import SplitInfo

METRICS = {
    "loss": "loss/valid",
    "token_perplexity": "perplexity",
    "word_perplexity": "word_perplexity",
    "bits_per_byte": "bits_per_byte",
}
"""Figure → the name of its metric, which people look for in MLflow."""


@dataclass(frozen=True)
class Figures:
    """What was measured on one text.

    Attributes:
        loss: in nats per target token.
        tokens: target tokens that were measured.
    """

    loss: float
    token_perplexity: float = math.nan
    word_perplexity: float = math.nan
    bits_per_byte: float = math.nan
    tokens: float = 0.0


FIGURES = [item.name for item in fields(Figures)]


@dataclass(frozen=True)
class HeldOut:
    """The figures of a held-out split.

    Attributes:
        total: of all of it; of a mixture, of text mixed as in training.
        by_dataset: of each dataset of a mixture; empty where there is only one dataset.
    """

    total: Figures
    by_dataset: Mapping[str, Figures] = field(default_factory=dict)

    def flat(self) -> dict[str, float]:
        """As files have it: `loss`, `token_perplexity`, …, and of a mixture's datasets `NAME/loss`, …."""
        own = {f"{name}/{key}": value for name, part in self.by_dataset.items() for key, value in vars(part).items()}
        return {**vars(self.total), **own}

    def metrics(self) -> dict[str, float]:
        """Under the names of metrics; of a mixture, each dataset's own figures behind a slash."""
        parts = {"": self.total, **{f"/{name}": part for name, part in self.by_dataset.items()}}
        return {f"{METRICS[key]}{name}": vars(part)[key] for name, part in parts.items() for key in METRICS}


@dataclass(frozen=True)
class Evaluation:
    """A measurement of a held-out split during training, and the step after which it was made."""

    step: int
    held_out: HeldOut

    @property
    def loss(self) -> float:
        return self.held_out.total.loss

    def flat(self) -> dict[str, float]:
        """As a checkpoint has it."""
        return {"step": float(self.step), **self.held_out.flat()}

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Evaluation":
        """What `flat` gave. None stands for a number that is not finite: earlier versions wrote it.

        Raises:
            ValueError: there is no loss.
        """
        if "loss" not in values:
            raise ValueError("has no loss")
        parts: dict[str, dict[str, float]] = {}
        for key, value in values.items():
            name, _, figure = key.rpartition("/")
            if figure in FIGURES:
                parts.setdefault(name, {})[figure] = math.nan if value is None else float(value)
        total = Figures(**parts.pop(""))
        return cls(int(values.get("step", 0)), HeldOut(total, {name: Figures(**part) for name, part in parts.items()}))


def loss_at(evaluation: Evaluation | None, step: int) -> float | None:
    """The held-out loss after `step` steps; None where it was not measured then."""
    return evaluation.loss if evaluation and evaluation.step == step else None


def perplexities(nats: float, targets: int, split: SplitInfo) -> Figures:
    """The loss and what follows from it, each with its denominator.

    Loss and token perplexity are per target token. Bits per byte and word perplexity divide by the split's source
    bytes and by its words plus one end of line per line (the convention of WikiText, arXiv:1609.07843); where only
    a part of the split was measured, the split's own ratio of tokens to bytes and words stands in for the part's.
    Both can be compared across tokenizers, the token perplexity cannot.

    Args:
        nats: sum of the losses of the targets.
    """
    return _figures(nats / targets, targets, _word_ends_per_token(split), _bytes_per_token(split))


def mixed(results: Mapping[str, Figures], shares: Sequence[float], splits: Sequence[SplitInfo]) -> HeldOut:
    """The figures of text mixed as in training, from those of each dataset.

    The loss is the mean of the datasets' losses under their shares of the samples, so that it stands beside the
    training loss; words and bytes per token are averaged in the same way. Where one of the datasets counts no words,
    the mixture has no perplexity per word.
    """
    word_ends = [_word_ends_per_token(split) for split in splits]

    def mean(values: Iterable[float]) -> float:
        return sum(share * value for share, value in zip(shares, values, strict=True))

    total = _figures(
        mean(result.loss for result in results.values()),
        round(sum(result.tokens for result in results.values())),
        mean(word_ends) if all(word_ends) else 0.0,
        mean(map(_bytes_per_token, splits)),
    )
    return HeldOut(total, results)


def _bytes_per_token(split: SplitInfo) -> float:
    return split.source_bytes / split.tokens


def _word_ends_per_token(split: SplitInfo) -> float:
    return (split.words + split.lines) / split.tokens


def _figures(loss: float, targets: int, word_ends_per_token: float, bytes_per_token: float) -> Figures:
    return Figures(
        loss=loss,
        token_perplexity=_exp(loss),
        word_perplexity=_exp(loss / word_ends_per_token) if word_ends_per_token else math.nan,
        bits_per_byte=loss / math.log(2) / bytes_per_token,
        tokens=float(targets),
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
