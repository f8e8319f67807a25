"""Ratios of the model's fast paths over what they replace, side by side in one run; float32, one thread.

Seconds are the processor's, and not the clock's: other work on the machine then counts for little. Each pair
alternates, and the least of its rounds counts; the spread is that of the rounds.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from model import reference
from model.configuration_globallocal import GlobalLocalConfig
from model.modeling_globallocal import GlobalLocalForCausalLM
from tests.benchmarks.memory import peak_bytes
from tests.benchmarks.quality.contenders import Contender
from tests.benchmarks.quality.plan import gpt
from tests.benchmarks.quality.text import VOCAB_SIZE
from tests.benchmarks.turns import over, spread

# preset → overrides, batch, sequence: blocks at their full width, two of them; the head is counted once.
STEPS: dict[str, tuple[dict[str, Any], int, int]] = {
    "quickstart": ({}, 4, 256),
    "seed": ({"num_hidden_layers": 2, "dropout": 0.0}, 2, 512),
    "small": ({"num_hidden_layers": 2}, 2, 512),
}

TARGETS = {
    **{f"training_step.{preset}.ratio": "≥ 3" for preset in STEPS},
    **{f"training_step.{preset}.mfu": "≥ 0.5" for preset in STEPS},
    "long_sequences.globallocal.speed_at_16384_over_512": "≥ 0.9",
    "decoding.one_sequence.ratio": "≥ 20",
    "decoding.eight_sequences.ratio": "≥ 20",
}


def in_turns(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each function in each turn, after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if turn:
                seconds[name].append(time.process_time() - start)
    return seconds


def best_seconds(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    return {name: min(turns) for name, turns in in_turns(functions, rounds).items()}


def say(text: str) -> None:
    """Standard output belongs to the result."""
    print(text, file=sys.stderr, flush=True)


# ---- a training step against the equations as written, and against the machine


def training_step(preset: str, rounds: int) -> dict:
    """Forward and backward of one micro-batch: the fast path over the equations as written, and utilisation.

    `mfu` divides the counted operations of the model by what products of the very same shapes reach here, each
    with the share of the operations that it has.
    """
    overrides, batch, length = STEPS[preset]
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

    turns = in_turns({"fast": fast, "as_written": as_written, **products(config, batch * length)}, rounds)
    seconds = {name: min(values) for name, values in turns.items()}
    shapes = product_shapes(config)
    at_best = sum(3 * seconds[str(shape)] * count for shape, count in shapes.items())
    flops = config.flops_per_token(length) * batch * length
    return {
        "fast_seconds": seconds["fast"],
        "as_written_seconds": seconds["as_written"],
        "ratio": over(turns["fast"], turns["as_written"]),
        "ratio_by_turns": spread(turns["fast"], turns["as_written"]),
        "fast_gflop_per_second": flops / seconds["fast"] / 1e9,
        "products_gflop_per_second": products_flops(shapes, batch * length) / at_best / 1e9,
        "mfu": flops / seconds["fast"] / (products_flops(shapes, batch * length) / at_best),
    }


def product_shapes(config: GlobalLocalConfig) -> dict[tuple[int, int], float]:
    """(columns in, columns out) of the products that a token meets → how often in a forward pass."""
    h, layers = config.hidden_size, config.num_hidden_layers
    kernel, branches = config.conv_kernel_size, len(config.dilations_of_layer(0))
    shapes = {
        (kernel * h, h): branches * layers,
        (branches * h, h): layers,
        (h, 2 * h): 2 * layers,
        (h, config.router_hidden_size): 2 * layers,
        (config.router_hidden_size, config.pool_size): 2 * layers / 3,  # forward only
        (h, config.intermediate_size): layers,
        (config.intermediate_size, h): layers,
    }
    shapes[h, config.vocab_size] = shapes.get((h, config.vocab_size), 0) + 1
    return shapes


def products(config: GlobalLocalConfig, tokens: int) -> dict[str, Callable[[], Any]]:
    """One product of every shape."""

    def product(rows_in: int, columns: int) -> Callable[[], Any]:
        x, w = torch.randn(tokens, rows_in), torch.randn(columns, rows_in)
        out = torch.empty(tokens, columns)
        return lambda: torch.mm(x, w.T, out=out)

    return {str(shape): product(*shape) for shape in product_shapes(config)}


def products_flops(shapes: dict[tuple[int, int], float], tokens: int) -> float:
    """Operations of forward and backward: three products of 2 · T · in · out each."""
    return sum(6.0 * tokens * rows_in * columns * count for (rows_in, columns), count in shapes.items())


# ---- sequences, memory, recomputation


def long_sequences(tokens: int = 16_384) -> dict:
    """One batch as a single sequence of 16,384 over the same tokens as sequences of 512: speed and peak memory.

    The GPT is as wide as `quickstart`, with twice its layers. After a warm-up each is measured once: a
    step takes many seconds.
    """
    settings = GlobalLocalConfig.from_preset("quickstart").to_diff_dict()
    shared = {"vocab_size", "max_position_embeddings", "transformers_version", "model_type"}
    contenders = {
        "globallocal": Contender("globallocal", {k: v for k, v in settings.items() if k not in shared}),
        "gpt": Contender("gpt", gpt(hidden_size=192, num_layers=4, head_dim=48)),
    }
    result = {}
    for name, contender in contenders.items():
        torch.manual_seed(0)
        model = contender.build(tokens).train()
        measured = {}
        for length in (512, 512, tokens):  # the first warms up, and makes the gradients
            ids = torch.randint(0, VOCAB_SIZE, (tokens // length, length))
            start = time.process_time()
            peak = peak_bytes(lambda model=model, ids=ids: model(ids, ids)[0].backward())
            measured[length] = tokens / (time.process_time() - start), peak / 1e6
        result[name] = {
            "tokens_per_second_at_512": measured[512][0],
            "tokens_per_second_at_16384": measured[tokens][0],
            "speed_at_16384_over_512": measured[tokens][0] / measured[512][0],
            "peak_megabytes_at_512": measured[512][1],
            "peak_megabytes_at_16384": measured[tokens][1],
        }
    return result


def activation_checkpointing(rounds: int) -> dict:
    """Peak memory of a training step against its time, for every policy; both over those of "none"."""
    policies = ("none", "every-2", "selective", "full", "deepspeed")
    functions, peaks = {}, {}
    for policy in policies:
        config = GlobalLocalConfig.from_preset("quickstart", num_hidden_layers=8, activation_checkpointing=policy)
        torch.manual_seed(0)
        model = GlobalLocalForCausalLM(config).train()
        ids = torch.randint(0, config.vocab_size, (4, 256))
        functions[policy] = lambda model=model, ids=ids: model(ids, shift_labels=ids).loss.backward()
        functions[policy]()  # gradients stand from here on
        peaks[policy] = peak_bytes(functions[policy])
    seconds = best_seconds(functions, rounds)
    return {
        policy: {
            "peak_megabytes": peaks[policy] / 1e6,
            "memory_over_none": peaks[policy] / peaks["none"],
            "time_over_none": seconds[policy] / seconds["none"],
        }
        for policy in policies
    }


# ---- pools, decoding, compilation


def pools(rounds: int) -> dict:
    """Scores, choice and their backward for 1,024 tokens, by the size of the pool; R 128, k 2."""
    from model.router_globallocal import SCORES

    hidden = torch.randn(1024, 256, requires_grad=True)
    functions = {}
    for pool_size in (10**4, 10**5, 10**6):
        for scores in ("dense", "product_key") if pool_size < 10**6 else ("product_key",):
            config = GlobalLocalConfig(
                hidden_size=256, pool_size=pool_size, pool_dim=8, router_hidden_size=128, router_scores=scores
            )
            module = SCORES[scores](config)
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            functions[f"{scores}_{pool_size}"] = lambda module=module: module(hidden, True)[1].sum().backward()
    return {f"{name}_milliseconds": 1e3 * value for name, value in best_seconds(functions, rounds).items()}


def decoding(sequences: int, new_tokens: int = 512) -> dict:
    """Greedy decoding with the cache, and by running the whole sequences again for each token.

    The recomputing side is measured at every 32nd length and summed up, which is exact for a cost that
    grows linearly. A step with the cache reads every weight once, for however many sequences.
    """
    config = GlobalLocalConfig.from_preset("small")
    torch.manual_seed(0)
    model = GlobalLocalForCausalLM(config).eval()
    ids = torch.randint(0, config.vocab_size, (sequences, new_tokens))
    with torch.no_grad():
        model(ids[:, :8], use_cache=False)
        start = time.process_time()
        model.generate(ids[:, :1], max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        cached = time.process_time() - start
        recomputed = 0.0
        for length in range(32, new_tokens + 1, 32):
            start = time.process_time()
            model(ids[:, :length], use_cache=False, logits_to_keep=1)
            recomputed += 32 * (time.process_time() - start)
    return {
        "new_tokens": new_tokens,
        "cached_tokens_per_second": sequences * new_tokens / cached,
        "recomputed_tokens_per_second": sequences * new_tokens / recomputed,
        "ratio": recomputed / cached,
    }


def compilation(rounds: int) -> dict:
    """`torch.compile` of a block, forward and backward, over the same block as it is."""
    config = GlobalLocalConfig.from_preset("small", num_hidden_layers=1)
    torch.manual_seed(0)
    model = GlobalLocalForCausalLM(config).train().model
    block, compiled = model.layers[0], torch.compile(model.layers[0], fullgraph=True)
    x = torch.randn(2, 512, config.hidden_size, requires_grad=True)

    def step(function: Any) -> Callable[[], None]:
        def run() -> None:
            output, diversity, _ = function(x, model.pool)
            (output.square().mean() + diversity).backward()

        return run

    seconds = in_turns({"plain": step(block), "compiled": step(compiled)}, rounds)
    return {
        "plain_seconds": min(seconds["plain"]),
        "compiled_seconds": min(seconds["compiled"]),
        "ratio": over(seconds["compiled"], seconds["plain"]),
        "ratio_by_turns": spread(seconds["compiled"], seconds["plain"]),
    }


def run(rounds: int = 3) -> dict:
    """All ratios. No bfloat16: a CPU that does not multiply it emulates it, which says nothing about the model."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {"seconds": "of one CPU thread", "precision": "float32"}
    parts: dict[str, Callable[[], dict]] = {
        "training_step": lambda: {preset: training_step(preset, rounds) for preset in STEPS},
        "long_sequences": long_sequences,
        "activation_checkpointing": lambda: activation_checkpointing(rounds),
        "pools": lambda: pools(rounds),
        "decoding": lambda: {"one_sequence": decoding(1), "eight_sequences": decoding(8)},
        "compilation": lambda: compilation(rounds),
    }
    for name, part in parts.items():
        start = time.perf_counter()
        result[name] = part()
        say(f"{name}: {time.perf_counter() - start:.0f} s  {result[name]}")
    return result


if __name__ == "__main__":
    import json

    print(json.dumps(run(), indent=2))
