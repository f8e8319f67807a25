"""Held-out loss and perplexities, globally reduced; continuations of prompts."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from data_prep.manifest import SplitInfo
from pipeline.data.loader import evaluation_batches
from pipeline.data.token_stream import TokenStream

if TYPE_CHECKING:
    from pipeline.data.corpus import Corpus

IGNORED = -100
"""Target that adds no loss, by the convention of PyTorch and transformers."""


@torch.no_grad()
def summed_loss(
    model: Any,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    device: torch.device,
    before_batch: Callable[[], None] = lambda: None,
) -> tuple[float, int]:
    """Sum of the language loss in nats, and the number of targets, over all ranks.

    Args:
        model: a DeepSpeed engine or a plain model.
        batches: int64 tokens [B, S+1] and a boolean mask [B, S] of the targets that count; the same number on
            every rank, since under ZeRO-3 each forward is a collective.
        before_batch: called before each; what it raises ends the measurement.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for tokens, counted in batches:
        before_batch()
        ids = torch.from_numpy(tokens).to(device)
        targets = ids[:, 1:].masked_fill(~torch.from_numpy(counted).to(device), IGNORED)
        valid = (targets != IGNORED).sum()
        loss = model(input_ids=ids[:, :-1], shift_labels=targets).language_loss.double()
        sums += torch.stack([torch.where(valid > 0, loss * valid, 0.0), valid.double()])
    model.train(training)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums[0].item(), round(sums[1].item())


def perplexities(nats: float, targets: int, split: SplitInfo) -> dict[str, float]:
    """The loss and what follows from it, each with its denominator.

    Loss and token perplexity are per target token. Bits per byte and word perplexity divide by the split's source
    bytes and by its words plus one end of line a line (the convention of WikiText, arXiv:1609.07843); where only
    a part of the split was measured, the split's own ratio of tokens to bytes and words stands in for the part's.
    Both can be compared across tokenizers, the token perplexity cannot.
    """
    return _figures(nats / targets, targets, _word_ends_a_token(split), _bytes_a_token(split))


def mixed(
    results: Mapping[str, dict[str, float]], shares: Sequence[float], splits: Sequence[SplitInfo]
) -> dict[str, float]:
    """The figures of text mixed as in training, from those of each dataset.

    The loss is the mean of the datasets' losses under their shares of the samples, so that it stands beside the
    training loss; words and bytes per token are averaged in the same way.
    """

    def mean(values: Iterable[float]) -> float:
        return sum(share * value for share, value in zip(shares, values, strict=True))

    total = _figures(
        mean(result["loss"] for result in results.values()),
        round(sum(result["tokens"] for result in results.values())),
        mean(map(_word_ends_a_token, splits)),
        mean(map(_bytes_a_token, splits)),
    )
    own = {f"{name}/{key}": value for name, result in results.items() for key, value in result.items()}
    return total | own


def held_out(
    model: Any,
    corpus: "Corpus",
    split: str,
    sequence_length: int,
    batch_size: int,
    max_samples: int | None,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """`perplexities` of a split; of a mixture those of `mixed`, and each dataset's own as `NAME/loss`, … .

    Args:
        batch_size: samples per rank at once.
        max_samples: of each dataset, the first so many; None is all.
        before_batch: called before each batch; what it raises ends the measurement.
    """
    results = {}
    for part in corpus.parts:
        stream = TokenStream(part.dataset, split)
        batches = evaluation_batches(stream, sequence_length, batch_size, rank, world_size, max_samples)
        nats, targets = summed_loss(model, batches, device, before_batch)
        results[part.name] = perplexities(nats, targets, part.dataset.manifest.splits[split])
        stream.close()
    if len(results) == 1:
        return next(iter(results.values()))
    splits = [part.dataset.manifest.splits[split] for part in corpus.parts]
    return mixed(results, [float(part.share) for part in corpus.parts], splits)


def _bytes_a_token(split: SplitInfo) -> float:
    return split.source_bytes / split.tokens


def _word_ends_a_token(split: SplitInfo) -> float:
    return (split.words + split.lines) / split.tokens


def _figures(loss: float, targets: int, word_ends_a_token: float, bytes_a_token: float) -> dict[str, float]:
    return {
        "loss": loss,
        "token_perplexity": _exp(loss),
        "word_perplexity": _exp(loss / word_ends_a_token) if word_ends_a_token else math.nan,
        "bits_per_byte": loss / math.log(2) / bytes_a_token,
        "tokens": float(targets),
    }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def prompt_ids(tokenizer: Any, prompt: str) -> torch.Tensor:
    """int64 [1, n]; an empty prompt begins as a document does, behind the token that ends the one before."""
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    return torch.tensor([ids or [tokenizer.eos_token_id]], dtype=torch.int64)


@torch.no_grad()
def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    device: torch.device,
    seed: int,
    before_text: Callable[[], None] = lambda: None,
) -> list[str]:
    """Sampled continuations, each with its prompt in front. The caller's random state is left as it was.

    Every rank must call it: under ZeRO-3 each forward is a collective, and the same seed keeps ranks in step.
    """
    training = model.training
    model.eval()
    texts = []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for prompt in prompts:
            before_text()
            ids = prompt_ids(tokenizer, prompt).to(device)
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=0.8,
                top_k=50,
            )
            texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    model.train(training)
    return texts
