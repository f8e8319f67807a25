"""The model on a GPU, in bfloat16: utilisation, compilation, long sequences, decoding, and quality against a GPT.

Only where there is one: `make bench ARGS="gpu"`. Seconds are the device's, by events; each pair takes turns and the
median counts. MFU is the counted operations of the model over what one large matrix product reaches on the card.
"""

import argparse
import copy
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from model import reference
from model.configuration_globallocal import GlobalLocalConfig
from model.modeling_globallocal import GlobalLocalForCausalLM
from tests.benchmarks.quality import gpu as quality
from tests.benchmarks.quality.contenders import Contender
from tests.benchmarks.quality.plan import gpt
from tests.benchmarks.quality.training import rounded_copy, say

# preset → sequences in a micro-batch, each of the preset's longest length.
PRESETS = {"small": 64, "base": 32, "large": 8}
# A GPT of about the preset's FLOPs a token.
GPTS = {"small": gpt(512, 7, 64), "base": gpt(768, 12, 64), "large": gpt(1024, 21, 64)}

TARGETS = {
    **{f"training_step.{preset}.mfu": "≥ 0.5" for preset in PRESETS},
    "training_step.small.over_as_written": "≥ 3",
    "long_sequences.globallocal.speed_at_16384_over_512": "≥ 0.9",
    "decoding.ratio": "≥ 20",
    "decoding.milliseconds_per_step": "≤ 1",
}


def median_seconds(functions: dict[str, Callable[[], Any]], rounds: int = 8) -> dict[str, float]:
    """The device's seconds for each function, in turns, after two warm-ups."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 2):
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            if turn > 1:
                seconds[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(values) for name, values in seconds.items()}


def matrix_flops() -> float:
    """FLOPs a second of one large product of random bfloat16 matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / median_seconds({"product": lambda: a @ b})["product"]


def build(contender: Contender, length: int) -> Any:
    torch.manual_seed(0)
    return rounded_copy(contender.build(length).train().to("cuda"))


def globallocal(preset: str, **overrides: Any) -> Contender:
    """A preset, its own vocabulary included."""
    config = GlobalLocalConfig.from_preset(preset, **overrides)
    names = ("model_type", "transformers_version", "architectures", "max_position_embeddings")
    return Contender("globallocal", {k: v for k, v in config.to_diff_dict().items() if k not in names})


def passes(model: Any, batch: int, length: int, vocab_size: int) -> Callable[[], None]:
    """Forward and backward of one micro-batch."""
    ids, targets = torch.randint(0, vocab_size, (2, batch, length), device="cuda")

    def run() -> None:
        model(ids, targets)[0].backward()
        for parameter in model.parameters():
            parameter.grad = None

    return run


def compiled(model: Any) -> Any:
    """The same weights, every block compiled without graph breaks."""
    model = copy.deepcopy(model)
    for layer in model.model.model.layers:
        layer.compile(fullgraph=True)
    return model


def training_step(preset: str, rate: float) -> dict[str, Any]:
    """Forward and backward, of GlobalLocal and of a GPT of equal FLOPs, as they are and compiled."""
    batch, length = PRESETS[preset], GlobalLocalConfig.from_preset(preset).max_position_embeddings
    own = globallocal(preset)
    vocab_size = own.settings["vocab_size"]
    models = {
        "globallocal": build(own, length),
        "gpt": build(Contender("gpt", {"vocab_size": vocab_size} | GPTS[preset]), length),
    }
    models |= {f"{name}_compiled": compiled(model) for name, model in models.items()}
    functions = {name: passes(model, batch, length, vocab_size) for name, model in models.items()}
    if preset == "small":
        functions["as_written"] = as_written(GlobalLocalConfig.from_preset(preset), batch, length)
    seconds = median_seconds(functions)
    tokens = batch * length
    result: dict[str, Any] = {"micro_batch": f"{batch} × {length}"}
    for name, model in models.items():
        flops = model.flops_per_token(length)
        result |= {
            f"{name}_tokens_per_second": tokens / seconds[name],
            f"{name}_mfu": flops * tokens / seconds[name] / rate,
        }
        functions[name]()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        functions[name]()
        result[f"{name}_peak_megabytes"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    result["mfu"] = max(result["globallocal_mfu"], result["globallocal_compiled_mfu"])
    result["compiled_over_plain"] = seconds["globallocal"] / seconds["globallocal_compiled"]
    if "as_written" in seconds:
        result["over_as_written"] = seconds["as_written"] / seconds["globallocal"]
    return result


def as_written(config: GlobalLocalConfig, batch: int, length: int) -> Callable[[], None]:
    """The reference's equations, differentiated by autograd, in bfloat16."""
    torch.manual_seed(0)
    model = GlobalLocalForCausalLM(config).to("cuda", torch.bfloat16)
    weights = {n: t.detach().clone().requires_grad_(n != "model.pool") for n, t in model.state_dict().items()}
    ids, labels = torch.randint(0, config.vocab_size, (2, batch, length), device="cuda")

    def run() -> None:
        reference.loss(weights, config, ids, labels).backward()
        for tensor in weights.values():
            tensor.grad = None

    return run


def agreement() -> dict[str, Any]:
    """Fast path against the equations in float64 on this device, and one run against another, bit by bit."""
    config = GlobalLocalConfig.from_preset("quickstart", vocab_size=512, pool_dim=256)
    torch.manual_seed(0)
    model = GlobalLocalForCausalLM(config).double().to("cuda").train()
    ids, labels = torch.randint(0, 512, (2, 4, 128), device="cuda")
    weights = {n: t.detach().clone().requires_grad_(n != "model.pool") for n, t in model.state_dict().items()}
    reference.loss(weights, config, ids, labels).backward()
    model(ids, shift_labels=labels).loss.backward()
    worst = max(
        float((parameter.grad - weights[name].grad).abs().max() / weights[name].grad.abs().max().clamp_min(1e-4))
        for name, parameter in model.named_parameters()
    )
    model = model.bfloat16()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, shift_labels=labels).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    same = all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))
    return {"largest_relative_difference_of_a_gradient": worst, "two_runs_bitwise_equal": same}


def long_sequences(tokens: int = 65_536) -> dict[str, Any]:
    """The same tokens as sequences of 16,384 and of 512: speed and peak memory, the GPT beside."""
    result = {}
    contenders = {"globallocal": globallocal("small"), "gpt": Contender("gpt", {"vocab_size": 32_000} | GPTS["small"])}
    for name, contender in contenders.items():
        model, measured = build(contender, 16_384), {}
        for length in (512, 16_384):
            run = passes(model, tokens // length, length, 32_000)
            seconds = median_seconds({"step": run}, 4)["step"]
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            measured[length] = seconds, torch.cuda.max_memory_allocated() - before
        result[name] = {
            "tokens_per_second_at_512": tokens / measured[512][0],
            "tokens_per_second_at_16384": tokens / measured[16_384][0],
            "speed_at_16384_over_512": measured[512][0] / measured[16_384][0],
            "peak_memory_at_16384_over_512": measured[16_384][1] / measured[512][1],
        }
    return result


def decoding(new_tokens: int = 512, batch: int = 16) -> dict[str, Any]:
    """Greedy decoding with the cache over running the sequences again for each token (every 32nd length)."""
    config = GlobalLocalConfig.from_preset("small")
    model = GlobalLocalForCausalLM(config).to("cuda", torch.bfloat16).eval()
    ids = torch.randint(0, config.vocab_size, (batch, new_tokens), device="cuda")
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    with torch.no_grad():
        cached = median_seconds({"cached": lambda: model.generate(ids[:, :1], **options)}, 1)["cached"]
        cache = model(ids[:, :32], use_cache=True).cache
        steps = {"steps": lambda: [model(ids[:, :1], cache=cache) for _ in range(100)]}
        alone = median_seconds(steps, 3)["steps"] / 100
        lengths = range(32, new_tokens + 1, 32)
        functions = {
            str(n): lambda n=n: model(ids[:, :n], use_cache=False, logits_to_keep=1).logits.argmax(-1) for n in lengths
        }
        recomputed = 32 * sum(median_seconds(functions, 3).values())
    return {
        "sequences": batch,
        "new_tokens": new_tokens,
        "milliseconds_per_step": cached / new_tokens * 1e3,
        "milliseconds_per_step_without_choosing": alone * 1e3,
        "cached_tokens_per_second": batch * new_tokens / cached,
        "recomputed_tokens_per_second": batch * new_tokens / recomputed,
        "ratio": recomputed / cached,
    }


def parts() -> dict[str, Callable[[], Any]]:
    rate = matrix_flops()
    say(f"one product of 8192³ in bfloat16: {rate / 1e12:.0f} TFLOP/s")
    return {
        "teraflop_per_second_of_a_product": lambda: rate / 1e12,
        "agreement": agreement,
        "training_step.small": lambda: training_step("small", rate),
        "long_sequences": long_sequences,
        "decoding": decoding,
        "training_step.base": lambda: training_step("base", rate),
        "training_step.large": lambda: training_step("large", rate),
        "quality": quality.run,
    }


def run(names: list[str] | None = None) -> dict[str, Any]:
    """Every part, or those that are named."""
    if not torch.cuda.is_available():
        sys.exit("error: no GPU here; the section `gpu` of docs/benchmarks.md stays as it is")
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.config.recompile_limit = 64  # blocks differ in their dilations
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    card = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, driver {driver.stdout.strip()}"
    result: dict[str, Any] = {"machine": f"{datetime.date.today()}, {card}"}
    for name, part in parts().items():
        if names and name.partition(".")[0] not in names and name not in names:
            continue
        value, at = part(), result
        *folders, last = name.split(".")
        for folder in folders:
            at = at.setdefault(folder, {})
        at[last] = value
        say(f"{name}: {json.dumps(value)}")
        torch.cuda.empty_cache()
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*")
    print(json.dumps(run(parser.parse_args().parts), indent=2))
