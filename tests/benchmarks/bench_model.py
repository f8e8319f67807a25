"""Ratios of the model's fast paths over what they replace, side by side in one run.

Each pair alternates and the faster of its rounds counts, so that other work on the machine touches both.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from model import reference
from model.configuration_globallocal import GlobalLocalConfig
from model.modeling_globallocal import GlobalLocalForCausalLM

# (preset, overrides, batch, sequence): the seed's blocks at full width, two of them.
STEPS: list[tuple[str, dict[str, Any], int, int]] = [
    ("quickstart", {}, 8, 256),
    ("seed", {"num_hidden_layers": 2, "dropout": 0.0}, 4, 512),
    ("small", {"num_hidden_layers": 2}, 4, 512),
]


def best_seconds(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The least wall-clock seconds of each function, taken in turns after one warm-up."""
    best = {name: float("inf") for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def matrix_flops_per_second(tokens: int, hidden_size: int) -> float:
    """What one product [tokens, h] × [h, 4h] reaches on this machine."""
    x, w = torch.randn(tokens, hidden_size), torch.randn(hidden_size, 4 * hidden_size)
    seconds = best_seconds({"product": lambda: x @ w}, rounds=5)["product"]
    return 2 * x.numel() * w.shape[1] / seconds


def training_step(preset: str, overrides: dict[str, Any], batch: int, length: int, rounds: int) -> dict:
    """Forward and backward of one micro-batch: the fast path over the equations as written."""
    config = GlobalLocalConfig.from_preset(preset, **overrides)
    torch.manual_seed(0)
    model = GlobalLocalForCausalLM(config).train()
    weights = {
        name: tensor.detach().clone().requires_grad_(name != "model.pool")
        for name, tensor in model.state_dict().items()
    }
    ids, labels = torch.randint(0, config.vocab_size, (2, batch, length))

    def fast() -> None:
        model.zero_grad()
        model(ids, shift_labels=labels).loss.backward()

    def as_written() -> None:
        for tensor in weights.values():
            tensor.grad = None
        reference.loss(weights, config, ids, labels).backward()

    seconds = best_seconds({"fast": fast, "as_written": as_written}, rounds)
    flops = config.flops_per_token(length) * batch * length
    best_rate = matrix_flops_per_second(batch * length, config.hidden_size)
    return {
        "fast_seconds": seconds["fast"],
        "as_written_seconds": seconds["as_written"],
        "ratio": seconds["as_written"] / seconds["fast"],
        "fast_tokens_per_second": batch * length / seconds["fast"],
        "fast_mfu": flops / seconds["fast"] / best_rate,
    }


def decoding(new_tokens: int) -> dict:
    """Greedy decoding with the cache, and by running the whole sequence again for each token.

    The recomputing side is measured at every eighth length and summed up, which is exact for a cost that
    grows linearly.
    """
    config = GlobalLocalConfig.from_preset("quickstart")
    torch.manual_seed(0)
    model = GlobalLocalForCausalLM(config).eval()
    ids = torch.randint(0, config.vocab_size, (1, new_tokens))
    with torch.no_grad():
        model(ids[:, :8], use_cache=False)
        start = time.perf_counter()
        model.generate(ids[:, :1], max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        cached = time.perf_counter() - start
        recomputed = 0.0
        for length in range(8, new_tokens + 1, 8):
            start = time.perf_counter()
            model(ids[:, :length], use_cache=False, logits_to_keep=1)
            recomputed += 8 * (time.perf_counter() - start)
    return {
        "new_tokens": new_tokens,
        "cached_tokens_per_second": new_tokens / cached,
        "recomputed_tokens_per_second": new_tokens / recomputed,
        "ratio": recomputed / cached,
    }


def long_sequences(tokens: int = 16384) -> dict:
    """Tokens per second of one batch as a single long sequence, over the same tokens as short ones."""
    config = GlobalLocalConfig.from_preset("quickstart")
    torch.manual_seed(0)
    model = GlobalLocalForCausalLM(config).train()

    def step(length: int) -> Callable[[], None]:
        ids = torch.randint(0, config.vocab_size, (tokens // length, length))
        return lambda: model(ids, shift_labels=ids).loss.backward()

    seconds = best_seconds({"long": step(tokens), "short": step(512)}, rounds=2)
    return {
        "long_tokens_per_second": tokens / seconds["long"],
        "short_tokens_per_second": tokens / seconds["short"],
        "ratio": seconds["short"] / seconds["long"],
    }


def run(rounds: int = 3) -> dict:
    """All ratios; float32, the number of threads torch is set to."""
    return {
        "threads": torch.get_num_threads(),
        "training_step": {preset: training_step(preset, *rest, rounds) for preset, *rest in STEPS},
        "decoding": decoding(512),
        "long_sequences": long_sequences(),
    }


if __name__ == "__main__":
    import json

    print(json.dumps(run(), indent=2))
