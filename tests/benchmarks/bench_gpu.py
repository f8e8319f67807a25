"""The project on a GPU, in bfloat16: kernels, passes, the trainer on real text, decoding; the GPT beside it.

`make gpu`, in about six minutes on one card; results go to docs/benchmarks.md after each part, so that a run that is
cut off keeps what it has. Seconds are the device's, by events; each pair takes turns and the median counts. MFU is the
counted operations of the model over what one large matrix product reaches on the card.
"""

import argparse
import copy
import datetime
import gzip
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from model import reference
from model.configuration_globallocal import GlobalLocalConfig
from model.modeling_globallocal import GlobalLocalForCausalLM
from tests.benchmarks.__main__ import write
from tests.benchmarks.quality import gpu as quality
from tests.benchmarks.quality.contenders import Contender
from tests.benchmarks.quality.plan import gpt
from tests.benchmarks.quality.training import rounded_copy, say
from tests.conftest import ROOT

# preset → sequences in a micro-batch, each of the preset's longest length.
PRESETS = {"small": 64, "base": 32, "large": 8}
# A GPT of about the preset's FLOPs per token.
GPTS = {"small": gpt(512, 7, 64), "base": gpt(768, 12, 64), "large": gpt(1024, 21, 64)}
FOLDER = ROOT / "runs" / "gpu"
KERNEL_TESTS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests" / "model").glob("test_kernels_*.py"))]

TARGETS = {
    "training_step.small.over_compiled_gpt": "≥ 1.0",
    "training_step.base.over_compiled_gpt": "≥ 1.0",
    "training_step.small.mfu": "≥ 0.4",
    "training_step.base.mfu": "≥ 0.5",
    "training_step.small.peak_memory_over_compiled_gpt": "≤ 1.0",
    "trainer.over_passes": "≥ 0.95",
    "trainer.device_idle_share": "≤ 0.03",
    "long_sequences.globallocal.speed_at_16384_over_512": "≥ 0.95",
    "long_sequences.over_compiled_gpt_at_16384": "≥ 1.5",
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
    """FLOPs per second of one large product of random bfloat16 matrices."""
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
    """The same weights, every block compiled without graph breaks, as `training.compile` does it."""
    model = copy.deepcopy(model)
    for layer in model.model.model.layers:
        layer.compile(fullgraph=True, dynamic=False, options={"deterministic": True})
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
    result: dict[str, Any] = {"micro_batch": f"{batch} × {length}"}
    for name in ("globallocal_compiled", "gpt_compiled"):
        begin = time.perf_counter()
        functions[name]()
        torch.cuda.synchronize()
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


def peak_bytes(function: Callable[[], Any]) -> int:
    """Device memory that a call takes on top of what was taken."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


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
    """The same tokens as sequences of 16,384, 4,096 and 512, compiled: speed and peak memory, the GPT beside."""
    contenders = {"globallocal": globallocal("small"), "gpt": Contender("gpt", {"vocab_size": 32_000} | GPTS["small"])}
    result: dict[str, Any] = {}
    for name, contender in contenders.items():
        measured = {}
        for length in (512, 4_096, 16_384):
            model = compiled(build(contender, length))
            run = passes(model, tokens // length, length, 32_000)
            measured[length] = tokens / median_seconds({"step": run}, 4)["step"], peak_bytes(run)
        result[name] = {f"tokens_per_second_at_{length}": speed for length, (speed, _) in measured.items()} | {
            "speed_at_16384_over_512": measured[16_384][0] / measured[512][0],
            "peak_memory_at_16384_over_512": measured[16_384][1] / measured[512][1],
        }
    own, other = (result[name]["tokens_per_second_at_16384"] for name in contenders)
    return result | {"over_compiled_gpt_at_16384": own / other}


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


def kernels() -> dict[str, Any]:
    """The tests of the kernels, on the card; what fails is printed."""
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", *KERNEL_TESTS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        say(done.stdout[-3000:] + done.stderr[-1000:])
    return {"tests": done.stdout.strip().splitlines()[-1]} | agreement()


def trainer(passes_per_second: float | None = None, steps: int = 60) -> dict[str, Any]:
    """`small` on real text with DeepSpeed: never stopped, and killed, resumed and compared with the former."""
    dataset = FOLDER.parent.parent / "data" / "gpu"
    if not (dataset / "manifest.json").exists():
        tokenizer = dataset.with_name("gpu-tokenizer")
        source = ["--source", "sample"]
        globallocal_command("tokenizer", *source, "--vocab-size", "32000", "--output", str(tokenizer))
        globallocal_command("prepare", *source, "--tokenizer", str(tokenizer), "--output", str(dataset))
    shutil.rmtree(FOLDER, ignore_errors=True)
    whole = train("whole", dataset, steps, f"training.profile={steps - 9}-{steps - 7}")
    train("killed", dataset, steps, kill_after=f"step {2 * steps // 3}/")
    resumed = train("killed", dataset, steps)
    losses = [dict(re.findall(r"step (\d+)/\d+  loss ([\d.]+)", text)) for text in (whole, resumed)]
    speeds = [float(speed.replace(",", "")) for speed in re.findall(r"([\d,]+) tokens/s", whole)]
    tokens_per_second = statistics.median(speeds[2 : 2 * len(speeds) // 3])
    busy = busy_seconds(next((FOLDER / "whole" / "profile").rglob("*.trace.json.gz"))) / 3
    result = {
        "tokens_per_second": tokens_per_second,
        "device_busy_milliseconds_per_step": 1e3 * busy,
        "device_idle_share": 1 - busy * tokens_per_second / (128 * 1024),  # of a step that is not traced
        "resumed": (re.search(r"resume verified: [^\n]*", resumed) or ["not verified"])[0],
        "losses_after_the_resume_equal": all(losses[0].get(step) == loss for step, loss in losses[1].items()),
        "losses_compared": len(losses[1]),
    }
    if passes_per_second:
        result["over_passes"] = tokens_per_second / passes_per_second
    return result


def busy_seconds(trace: Path) -> float:
    """Seconds in which the device did anything, of a trace that the profiler wrote."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in kinds)
    busy, end = 0.0, 0.0
    for first, last in spans:
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return busy / 1e6


def globallocal_command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "launch", *arguments], check=True, cwd=ROOT, stdout=sys.stderr)


def train(name: str, dataset: Path, steps: int, *more: str, kill_after: str = "") -> str:
    """One start of the trainer, and what it printed; with `kill_after`, every process is killed once it prints that."""
    command = [
        sys.executable, "pipeline/train.py", "--config", "launch/runs/wikitext103-small.yaml",
        f"run.name={name}", f"run.output_dir={FOLDER / name}", f"data.dataset={dataset}", "data.sequence_length=1024",
        "model.dropout=0", "training.global_batch_size=128", "training.micro_batch_size=64",
        f"training.max_steps={steps}",
        "training.log_interval_steps=5", f"checkpoint.interval_steps={steps // 2}", "evaluation.split=null",
        "optimizer.warmup_steps=10",
        "evaluation.prompts=[]", "tracking.enabled=false", *more,
    ]  # fmt: skip
    lines = []
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True
    )
    assert run.stdout is not None
    for line in run.stdout:
        lines.append(line)
        if kill_after and line.startswith(kill_after):
            os.killpg(run.pid, signal.SIGKILL)
    if run.wait() and not kill_after:
        raise RuntimeError(f"{' '.join(command)} failed:\n{''.join(lines[-30:])}")
    say(f"{name}: {''.join(lines[-3:])}")
    return "".join(lines)


def parts(result: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What is measured, by the dotted path of its figures in `result`, which also serves later parts."""
    rate = matrix_flops()
    say(f"one product of 8192³ in bfloat16: {rate / 1e12:.0f} TFLOP/s")

    def fastest() -> float | None:
        return result.get("training_step", {}).get("small", {}).get("globallocal_compiled_tokens_per_second")

    return {
        "teraflop_per_second_of_a_product": lambda: rate / 1e12,
        "training_step.small": lambda: training_step("small", rate),
        "trainer": lambda: trainer(fastest()),
        "decoding": decoding,
        "training_step.base": lambda: training_step("base", rate),
        "long_sequences": long_sequences,
        "kernels": kernels,
        "training_step.large": lambda: training_step("large", rate),
        "quality": quality.run,
    }


ONLY_WHEN_NAMED = {"training_step.large", "quality"}


def run(names: list[str] | None = None, after_part: Callable[[dict[str, Any]], None] = lambda result: None) -> dict:
    """Every part but those of `ONLY_WHEN_NAMED`, or those that are named; `after_part` gets what there is so far."""
    if not torch.cuda.is_available():
        sys.exit("error: no GPU here; the section `gpu` of docs/benchmarks.md stays as it is")
    torch.set_float32_matmul_precision("highest")
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    versions = ", ".join(f"{package.__name__} {package.__version__}" for package in (torch, triton))
    card = f"{torch.cuda.get_device_name()}, {versions}, driver {driver.stdout.strip()}"
    result: dict[str, Any] = {"machine": f"{datetime.date.today()}, {card}"}
    for name, part in parts(result).items():
        if name in ONLY_WHEN_NAMED if not names else name.partition(".")[0] not in names and name not in names:
            continue
        begin = time.perf_counter()
        value, at = part(), result
        *folders, last = name.split(".")
        for folder in folders:
            at = at.setdefault(folder, {})
        at[last] = value
        say(f"{name}, {time.perf_counter() - begin:.0f} s: {json.dumps(value)}")
        after_part(copy.deepcopy(result))
        torch.cuda.empty_cache()
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*")
    run(parser.parse_args().parts, lambda result: write("gpu", result, TARGETS))
