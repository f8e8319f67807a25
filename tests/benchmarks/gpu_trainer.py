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
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu_passes import Sizes
from tests.benchmarks.quality.training import say
from tests.conftest import ROOT


def trainer(sizes: Sizes, passes_per_second: float | None = None) -> dict[str, Any]:
    """`small` on real text with DeepSpeed: never stopped, and killed, resumed and compared with the former."""
    dataset, steps = ROOT / "data" / sizes.name, sizes.steps
    if not (dataset / "manifest.json").exists():
        tokenizer = dataset.with_name(f"{sizes.name}-tokenizer")
        source = ["--source", "sample"]
        globallocal_command(
            "tokenizer", *source, "--vocab-size", str(sizes.vocab_size), "--output", str(tokenizer)
        )  # fmt: skip
        globallocal_command("prepare", *source, "--tokenizer", str(tokenizer), "--output", str(dataset))
    shutil.rmtree(ROOT / "runs" / sizes.name, ignore_errors=True)
    whole = train("whole", dataset, sizes, f"training.profile={steps - 9}-{steps - 7}")
    train("killed", dataset, sizes, kill_after=f"step {2 * steps // 3}/")
    resumed = train("killed", dataset, sizes)
    losses = [dict(re.findall(r"step (\d+)/\d+  loss ([\d.]+)", text)) for text in (whole, resumed)]
    speeds = [float(speed.replace(",", "")) for speed in re.findall(r"([\d,]+) tokens/s", whole)]
    tokens_per_second = statistics.median(speeds[2 : 2 * len(speeds) // 3])
    busy = busy_seconds(next((ROOT / "runs" / sizes.name / "whole" / "profile").rglob("*.trace.json.gz"))) / 3
    tokens = 2 * sizes.micro_batch * sizes.sequence_length
    result = {
        "tokens_per_second": tokens_per_second,
        "device_busy_milliseconds_per_step": 1e3 * busy,
        "device_idle_share": 1 - busy * tokens_per_second / tokens,  # of a step that is not traced
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


def train(name: str, dataset: Path, sizes: Sizes, *more: str, kill_after: str = "") -> str:
    """One start of the trainer, and what it printed; with `kill_after`, every process is killed once it prints that."""
    command = [
        sys.executable, "pipeline/train.py", "--config", "launch/runs/wikitext103-small.yaml",
        f"run.name={name}", f"run.output_dir={ROOT / 'runs' / sizes.name / name}", f"data.dataset={dataset}",
        f"data.sequence_length={sizes.sequence_length}", "model.dropout=0",
        f"training.global_batch_size={2 * sizes.micro_batch}", f"training.micro_batch_size={sizes.micro_batch}",
        f"training.max_steps={sizes.steps}", "training.log_interval_steps=5", "optimizer.warmup_steps=10",
        f"checkpoint.interval_steps={sizes.steps // 2}", "evaluation.split=null", "evaluation.prompts=[]",
        "tracking.enabled=false", *sizes.settings, *more,
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
