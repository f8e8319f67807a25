"""The project on a GPU, in bfloat16: kernels, passes, the trainer on real text, decoding; the GPT beside it.

`make gpu`, in about seven minutes on one card (reckoned, docs/one-gpu.md); results go to docs/benchmarks.md after each
part, so that a run that is cut off keeps what it has, and a part that fails says so and costs no other. Seconds are the
device's, by events; each pair takes turns and the median counts. MFU is the counted operations of the model over what
one large matrix product reaches on the card.

`make gpu ARGS=--rehearse` goes every way with tiny sizes, on a machine without a card too; its figures mean nothing and
are written nowhere. Without one, CUDA graphs are not captured, kernels run in Triton's interpreter (in their tests) or
stand aside for plain torch, and passes are compiled but for the last stage, which the trainer's rehearsal has.
"""

import argparse
import copy
import datetime
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import triton

from model import graphs_globallocal
from model.configuration_globallocal import GlobalLocalConfig
from model.modeling_globallocal import GlobalLocalForCausalLM
from pipeline.engine.compilation import keep_cache
from tests.benchmarks.__main__ import commit, flat, write
from tests.benchmarks.gpu_kernels import agreement, kernel_tests, kernels
from tests.benchmarks.gpu_passes import (
    DEVICE,
    REHEARSAL,
    Sizes,
    build,
    compiled,
    globallocal,
    median_seconds,
    passes,
    peak_bytes,
    synchronize,
)
from tests.benchmarks.gpu_trainer import trainer
from tests.benchmarks.quality import gpu as quality
from tests.benchmarks.quality.contenders import Contender
from tests.benchmarks.quality.plan import gpt
from tests.benchmarks.quality.training import say
from tests.model.helpers import repeated

# preset → sequences in a micro-batch, each of the preset's longest length.
PRESETS = {"small": 64, "base": 32, "large": 8}
# A GPT of about the preset's FLOPs per token.
GPTS = {"small": gpt(512, 7, 64), "base": gpt(768, 12, 64), "large": gpt(1024, 21, 64)}

TARGETS = {
    "training_step.small.over_compiled_gpt": "≥ 1.0",
    "training_step.base.over_compiled_gpt": "≥ 1.0",
    "training_step.small.mfu": "≥ 0.4",
    "training_step.base.mfu": "≥ 0.5",
    "training_step.small.peak_memory_over_compiled_gpt": "≤ 1.0",
    "trainer.over_passes": "≥ 0.95",
    "trainer.over_bare_loop": "≥ 0.97",
    "trainer.bare_loop_over_passes": "≥ 0.9",
    "trainer.device_idle_share": "≤ 0.03",
    "long_sequences.512.globallocal_tokens_per_second_of_longest_over_this": "≥ 0.95",
    "long_sequences.16384.over_compiled_gpt": "≥ 1.5",
    "decoding.ratio": "≥ 20",
    "decoding.milliseconds_per_step": "≤ 1",
}


def matrix_flops(size: int) -> float:
    """FLOPs per second of one large product of random bfloat16 matrices."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_seconds({"product": lambda: a @ b})["product"]


def training_step(preset: str, rate: float, sizes: Sizes) -> dict[str, Any]:
    """Forward and backward, of GlobalLocal and of a GPT of equal FLOPs, as they are and compiled."""
    own = globallocal(preset, **sizes.model)
    batch = PRESETS[preset] if sizes.length is None else sizes.micro_batch
    length = sizes.length or GlobalLocalConfig.from_preset(preset).max_position_embeddings
    vocab_size = own.settings["vocab_size"]
    models = {
        "globallocal": build(own, length),
        "gpt": build(Contender("gpt", {"vocab_size": vocab_size} | GPTS[preset] | sizes.gpt), length),
    }
    models |= {f"{name}_compiled": compiled(model) for name, model in models.items()}
    functions = {name: passes(model, batch, length, vocab_size) for name, model in models.items()}
    result: dict[str, Any] = {"micro_batch": f"{batch} × {length}"}
    for name in ("globallocal_compiled", "gpt_compiled"):
        begin = time.perf_counter()
        functions[name]()
        synchronize()
        result[f"{name}_first_pass_seconds"] = time.perf_counter() - begin
    seconds = median_seconds(functions)
    tokens = batch * length
    for name, model in models.items():
        flops = model.flops_per_token(length)
        result |= {
            f"{name}_milliseconds": 1e3 * seconds[name],
            f"{name}_tokens_per_second": tokens / seconds[name],
            f"{name}_mfu": flops * tokens / seconds[name] / rate,
            f"{name}_peak_megabytes": peak_bytes(functions[name]) / 1e6,
        }
    result["mfu"] = result["globallocal_compiled_mfu"]
    result["compiled_over_plain"] = seconds["globallocal"] / seconds["globallocal_compiled"]
    result["over_compiled_gpt"] = seconds["gpt_compiled"] / seconds["globallocal_compiled"]
    result["peak_memory_over_compiled_gpt"] = (
        result["globallocal_compiled_peak_megabytes"] / result["gpt_compiled_peak_megabytes"]
    )
    return result


def delta_rule(sizes: Sizes, average_milliseconds: float | None) -> dict[str, Any]:
    """A pass with `summary_rule: delta`, as it is and compiled; the average's is `training_step.small`."""
    length = sizes.sequence_length
    model = build(globallocal("small", **sizes.model, summary_rule="delta"), length)
    vocab_size = model.model.config.vocab_size
    models = {"plain": model, "compiled": compiled(model)}
    functions = {name: passes(item, sizes.micro_batch, length, vocab_size) for name, item in models.items()}
    seconds = median_seconds(functions)
    result: dict[str, Any] = {f"{name}_milliseconds": 1e3 * value for name, value in seconds.items()}
    result["compiled_peak_megabytes"] = peak_bytes(functions["compiled"]) / 1e6
    if average_milliseconds:
        result["over_average"] = average_milliseconds / result["compiled_milliseconds"]
    return result


def long_sequences(length: int, sizes: Sizes, longest: dict[str, Any] | None = None) -> dict[str, Any]:
    """The tokens of a micro-batch of `small` as sequences of this length, compiled; the GPT beside.

    Args:
        longest: what this gave for the longest sequences.
    """
    own = globallocal("small", **sizes.model)
    vocab_size = own.settings["vocab_size"]
    other = Contender("gpt", {"vocab_size": vocab_size} | GPTS["small"] | sizes.gpt)
    result: dict[str, Any] = {}
    for name, contender in {"globallocal": own, "gpt": other}.items():
        run = passes(compiled(build(contender, length)), sizes.long_tokens // length, length, vocab_size)
        result[f"{name}_tokens_per_second"] = sizes.long_tokens / median_seconds({"pass": run}, 4)["pass"]
        result[f"{name}_peak_megabytes"] = peak_bytes(run) / 1e6
    over = {f"{key}_of_longest_over_this": longest[key] / value for key, value in result.items()} if longest else {}
    speeds = result["globallocal_tokens_per_second"], result["gpt_tokens_per_second"]
    return result | over | {"over_compiled_gpt": speeds[0] / speeds[1]}


def decoding(sizes: Sizes) -> dict[str, Any]:
    """Greedy decoding with the cache over running the sequences again for each token (every 32nd length). Without a GPU
    the same step run anew stands for its graph."""
    new_tokens, batch = sizes.new_tokens, sizes.sequences
    config = GlobalLocalConfig.from_preset("small", **sizes.model)
    model = GlobalLocalForCausalLM(config).to(DEVICE, torch.bfloat16).eval()
    ids = torch.randint(0, config.vocab_size, (batch, new_tokens), device=DEVICE)
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    with torch.no_grad(), patch.dict(graphs_globallocal.CAPTURES, {"cpu": repeated}):
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


def parts(result: dict[str, Any], sizes: Sizes) -> dict[str, Callable[[], Any]]:
    """What is measured, by the dotted path of its figures in `result`, which also serves later parts; what has never
    been measured, or matters most, comes first."""
    rate = matrix_flops(sizes.product)
    say(f"one product of {sizes.product}³ in bfloat16: {rate / 1e12:.0f} TFLOP/s")
    short, middle, long = sizes.lengths

    def small(figure: str) -> float | None:
        return result.get("training_step", {}).get("small", {}).get(figure)

    def longest() -> dict[str, Any] | None:
        return result.get("long_sequences", {}).get(str(long))

    return {
        "teraflop_per_second_of_a_product": lambda: rate / 1e12,
        "training_step.small": lambda: training_step("small", rate, sizes),
        "kernels": lambda: kernels(sizes),
        "agreement": agreement,
        "trainer": lambda: trainer(sizes, small("globallocal_compiled_tokens_per_second")),
        "delta_rule": lambda: delta_rule(sizes, small("globallocal_compiled_milliseconds")),
        "decoding": lambda: decoding(sizes),
        "training_step.base": lambda: training_step("base", rate, sizes),
        "kernel_tests": kernel_tests,
        f"long_sequences.{long}": lambda: long_sequences(long, sizes),
        f"long_sequences.{short}": lambda: long_sequences(short, sizes, longest()),
        f"long_sequences.{middle}": lambda: long_sequences(middle, sizes, longest()),
        "training_step.large": lambda: training_step("large", rate, sizes),
        **({} if sizes is REHEARSAL else {"quality": quality.run}),  # trainings of hours, of fixed sizes
    }


ONLY_WHEN_NAMED = {"training_step.large", "quality"}


def where() -> str:
    """Day, card, versions and commit."""
    versions = ", ".join(f"{package.__name__} {package.__version__}" for package in (torch, triton))
    versions += f", bfloat16; commit {commit()}"
    if DEVICE.type == "cpu":
        return f"{datetime.date.today()}, no GPU, {versions}"
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    card = f"{torch.cuda.get_device_name()}, driver {driver.stdout.strip()}"
    return f"{datetime.date.today()}, {card}, {versions}"


def run(
    names: list[str] | None = None,
    after_part: Callable[[dict[str, Any]], None] = lambda result: None,
    sizes: Sizes | None = None,
) -> dict[str, Any]:
    """Every part but those of `ONLY_WHEN_NAMED`, or those that are named; `after_part` gets what there is so far."""
    if DEVICE.type == "cpu" and sizes is None:
        sys.exit("error: no GPU here; the section `gpu` of docs/benchmarks.md stays as it is (try ARGS=--rehearse)")
    sizes = sizes or Sizes()
    torch.set_float32_matmul_precision("highest")
    keep_cache()  # the trainer's: what one compiles the other finds
    result: dict[str, Any] = {"machine": where()}
    known = parts(result, sizes)
    prefixes = {name.partition(".")[0] for name in known}
    if unknown := set(names or ()) - set(known) - prefixes:
        sys.exit(f"error: no part {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    for name, part in known.items():
        if name in ONLY_WHEN_NAMED if not names else name.partition(".")[0] not in names and name not in names:
            continue
        begin = time.perf_counter()
        try:
            value = part()
        except Exception as error:  # what comes behind it is measured all the same
            traceback.print_exc()
            value = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        *folders, last = name.split(".")
        at = result
        for folder in folders:
            at = at.setdefault(folder, {})
        at[last] = value
        say(f"{name}, {time.perf_counter() - begin:.0f} s: {json.dumps(value)}")
        after_part(copy.deepcopy(result))
        torch.cuda.empty_cache()
    return result


def failed(result: dict[str, Any]) -> list[str]:
    """The parts that ended in an error."""
    return [path for path, _ in flat(result) if path.endswith(".failed")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--rehearse", action="store_true", help="every way with tiny sizes; nothing is written")
    given = parser.parse_args()
    if given.rehearse:
        measured = run(given.parts, sizes=REHEARSAL)
    else:
        measured = run(given.parts, lambda result: write("gpu", result, TARGETS))
    if faults := failed(measured):
        sys.exit(f"error: {', '.join(faults)}; the traceback is above")
