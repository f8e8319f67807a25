"""Run folders as a training leaves them, made from nothing: a record, settings, checkpoints, restarts, logs."""

import json
import math
from pathlib import Path
from typing import Any

import yaml

BEGIN = 1_790_000_000.0
"""Unix seconds of a made run's first start."""


def write_run(
    folder: Path,
    *,
    name: str = "made",
    steps: int = 300,
    taken: int | None = None,
    killed_at: int | None = None,
    sample: str = "The history of the river",
    learning_rate: float = 3e-3,
) -> Path:
    """A run of `steps` steps that took `taken` of them, saved every 75, was killed once and went on.

    Args:
        killed_at: a step; the run goes on from the newest save before it.
    """
    (folder / "logs").mkdir(parents=True)
    settings = {
        "run": {"name": name, "seed": 1, "output_dir": None},
        "model": {"preset": "quickstart", "hidden_size": 128},
        "data": {"dataset": "data/quickstart", "sequence_length": 256},
        "optimizer": {"learning_rate": learning_rate, "betas": [0.9, 0.95]},
        "training": {
            "max_steps": steps,
            "global_batch_size": 8,
            "log_interval_steps": 10,
            "hang_timeout_seconds": 1800,
        },
        "evaluation": {"split": "valid", "prompts": ["The history of"]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    end, record = taken if taken is not None else steps, Recorder()
    record.event("started", 0, **started(steps))
    if killed_at is not None:
        begin = killed_at // 75 * 75
        record.steps(1, killed_at, sample, learning_rate)
        restart = {"time": record.now, "job": "", "cause": "local rank 1 ended by signal 9", "step": begin, "code": 1}
        reason = f"restart 1 of at most 3, from the checkpoint of step {begin}"
        (folder / "restarts.jsonl").write_text(
            json.dumps({**restart, "node": "", "restart": True, "reason": reason}) + "\n"
        )
        record.now += 600
        record.event("started", begin, **started(steps))
        record.steps(begin + 1, end, sample, learning_rate)
    else:
        record.steps(1, end, sample, learning_rate)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in record.lines))
    for step in range(75, end + 1, 75):
        write_checkpoint(folder, step)
    log = "2026-11-29 06:10:00,000 here rank 0 WARNING step 107: spike: gradient norm 9 is 34 robust deviations above\n"
    (folder / "logs" / "rank-00000.log").write_text(log)
    return folder


def started(steps: int) -> dict[str, Any]:
    sizes = {"max_steps": steps, "tokens_per_step": 2048, "flops_per_token": 1.5e7, "parameters": 2_581_070}
    return {**sizes, "ranks": 2, "device": "CPU", "precision": "bf16", "zero_stage": 2, "tags": {"host": "here"}}


class Recorder:
    """The lines of a record, with a clock that a step takes half a second of."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.now = BEGIN

    def event(self, kind: str, step: int, **facts: Any) -> None:
        self.lines.append({"event": kind, "step": step, "time_unix_seconds": self.now, **facts})

    def steps(self, first: int, last: int, sample: str, learning_rate: float) -> None:
        for step in range(first, last + 1):
            self.now += 0.5
            if step % 10 == 0:
                self.metrics(step, training_metrics(step, learning_rate))
            if step % 75 == 0:
                loss = valid_loss(step, learning_rate)
                self.metrics(step, {"loss/valid": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / 2.1})
                self.event("evaluation", step, loss=loss, samples=[f"{sample} at step {step}"])
                self.event("saved", step, folder=f"step-{step:08d}", size_bytes=36_300_000, seconds=0.2)

    def metrics(self, step: int, metrics: dict[str, float]) -> None:
        line = {"step": step, "tokens": step * 2048, "time_unix_seconds": self.now, "metrics": metrics}
        self.lines.append(line)


def valid_loss(step: int, learning_rate: float) -> float:
    return 4.6 + 3.7 * math.exp(-step / 90) + 20 * learning_rate


def training_metrics(step: int, learning_rate: float) -> dict[str, float]:
    noise = math.sin(step * 12.9898) * 43758.5453 % 1 - 0.5
    metrics = {
        "loss/train": valid_loss(step, learning_rate) + 0.3 * noise - 0.1,
        "learning_rate": learning_rate * min(step / 20, 1) * (0.55 + 0.45 * math.cos(math.pi * step / 300)),
        "gradient_norm": 0.6 + 0.4 * math.exp(-step / 50) + 0.2 * noise,
        "throughput/tokens_per_second": 4100 + 400 * noise,
        "throughput/tokens_per_second_per_device": 2050 + 200 * noise,
        "throughput/teraflops_per_device": 0.031 + 0.003 * noise,
        "memory/device_peak_gib": 0.4 + 0.001 * step,
        "memory/host_gib": 1.2,
        "system/cpu_utilization_percentage": 80 + 10 * noise,
        "system/system_memory_usage_megabytes": 9000.0 + step,
        "system/system_memory_usage_percentage": 40.0,
        "system/disk_available_megabytes": 1e5,
        "system/network_receive_megabytes": 0.1 * step,
        "router/diversity_loss": 0.02,
    }
    for phase, seconds in (("data", 0.01), ("forward", 0.2), ("backward", 0.25), ("optimizer", 0.03), ("other", 0.01)):
        metrics[f"time/{phase}_seconds"] = seconds * (1 + 0.2 * noise)
    metrics["time/step_seconds"] = 0.5 * (1 + 0.2 * noise)
    for name, value in (("gate", 0.5), ("hit_rate", 0.3), ("entropy_nats", 4.0), ("dead_rows", 0.2)):
        for kind, shift in (("min", 0.8), ("mean", 1.0), ("max", 1.2)):
            metrics[f"router/{name}_{kind}"] = value * shift * (1 + 0.1 * noise)
    return metrics


def write_checkpoint(folder: Path, step: int) -> None:
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    state = {
        "step": step,
        "world_size": 2,
        "zero_stage": 2,
        "precision": "bf16",
        "dataset_id": "550720b60808",
        "mlflow_run_id": "189eba5b99b4477ebe44e6e420ba5e27",
        "evaluation": {"step": step, "loss": valid_loss(step, 3e-3)},
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"},
    }
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "integrity.json").write_text(json.dumps({"files": {"weights.pt": {"bytes": 36_300_000}}}))
