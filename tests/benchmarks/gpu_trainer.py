"""The trainer on a GPU, in `make gpu`: real text, killed and resumed, and how long the device waits for the host."""

import gzip
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from pipeline.tracking.journal import read_journal
from tests.benchmarks.gpu_passes import Sizes
from tests.benchmarks.quality.training import say
from tests.conftest import ROOT

TRACED_STEPS = 3


def trainer(sizes: Sizes, passes_per_second: float | None = None) -> dict[str, Any]:
    """`small` on real text with DeepSpeed, its blocks compiled: killed, and resumed. Steps that both starts took are
    compared, bit by bit. Beside it a DeepSpeed loop with nothing around it."""
    run_folder = ROOT / "runs" / sizes.name
    settings = run_settings(run_folder, prepared(sizes), sizes)
    shutil.rmtree(run_folder, ignore_errors=True)
    train = ["pipeline/train.py", "--config", *settings]
    killed = printed(train, kill_after=f"step {5 * sizes.steps // 6}/")
    resumed = printed(train)
    (bare,) = re.findall(
        r"([\d.]+) tokens/s of the bare loop", printed(["-m", "tests.benchmarks.bare_loop", *settings])
    )
    numbers: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for entry in read_journal(run_folder):
        if "loss/train" in entry["metrics"]:
            numbers[entry["step"]].append((entry["metrics"]["loss/train"], entry["metrics"]["gradient_norm"]))
    twice = [pair for pair in numbers.values() if len(pair) == 2]
    speeds = [float(speed.replace(",", "")) for speed in re.findall(r"([\d,]+) tokens/s", killed)]
    tokens_per_second = statistics.median(speeds[2:])
    busy = busy_seconds(next((run_folder / "profile").rglob("*.trace.json.gz"))) / TRACED_STEPS
    tokens = 2 * sizes.micro_batch * sizes.sequence_length
    compiling = [re.search(r"compiled in (\d+) s", text) for text in (killed, resumed)]
    result = {
        "tokens_per_second": tokens_per_second,
        "bare_loop_tokens_per_second": float(bare),
        "over_bare_loop": tokens_per_second / float(bare),
        "device_busy_milliseconds_per_step": 1e3 * busy,
        "device_idle_share": 1 - busy * tokens_per_second / tokens,  # of a step that is not traced
        "compile_seconds": [int(match[1]) if match else None for match in compiling],  # of the first start, the second
        "resumed": (re.search(r"resume verified: [^\n]*", resumed) or ["not verified"])[0],
        "logged_steps_taken_twice": len(twice),
        "their_losses_and_gradient_norms_equal": bool(twice) and all(first == again for first, again in twice),
    }
    if passes_per_second:
        result["over_passes"] = tokens_per_second / passes_per_second
        result["bare_loop_over_passes"] = float(bare) / passes_per_second
    return result


def prepared(sizes: Sizes) -> Path:
    """The dataset, made at the first call."""
    dataset = ROOT / "data" / sizes.name
    if not (dataset / "manifest.json").exists():
        tokenizer = dataset.with_name(f"{sizes.name}-tokenizer")
        source, vocab_size = ["--source", "sample"], str(sizes.vocab_size)
        globallocal_command("tokenizer", *source, "--vocab-size", vocab_size, "--output", str(tokenizer))
        globallocal_command("prepare", *source, "--tokenizer", str(tokenizer), "--output", str(dataset))
    return dataset


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


def run_settings(run_folder: Path, dataset: Path, sizes: Sizes) -> list[str]:
    """A run file and what is changed of it."""
    traced = sizes.steps - 9
    return [
        "launch/runs/wikitext103-small.yaml",
        f"run.name={run_folder.name}", f"run.output_dir={run_folder}", f"data.dataset={dataset}",
        f"data.sequence_length={sizes.sequence_length}", "model.dropout=0", "training.compile=true",
        f"training.global_batch_size={2 * sizes.micro_batch}", f"training.micro_batch_size={sizes.micro_batch}",
        f"training.max_steps={sizes.steps}", "training.log_interval_steps=5", "optimizer.warmup_steps=10",
        f"training.profile={traced}-{traced + TRACED_STEPS - 1}", f"checkpoint.interval_steps={sizes.steps // 2}",
        "evaluation.split=null", "evaluation.prompts=[]", "tracking.enabled=false", *sizes.settings,
    ]  # fmt: skip


def printed(arguments: list[str], kill_after: str = "") -> str:
    """What Python prints with these arguments; with `kill_after`, every process is killed once it prints that."""
    lines = []
    run = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    assert run.stdout is not None
    for line in run.stdout:
        lines.append(line)
        if kill_after and line.startswith(kill_after):
            os.killpg(run.pid, signal.SIGKILL)
    if run.wait() and not kill_after:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{''.join(lines[-30:])}")
    say("".join(lines[-3:]))
    return "".join(lines)
