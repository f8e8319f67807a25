"""One run: a contender trained on one task; what it can do along the way is kept as JSON in `.cache/recall`."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.engine.optim import learning_rate, parameter_groups, set_learning_rate
from pipeline.settings.sections import OptimizerSection
from tests.benchmarks.recall.contenders import CONTENDERS, Contender
from tests.benchmarks.recall.tasks import TASKS, UNASKED, Task
from tests.conftest import ROOT

CACHE = ROOT / ".cache" / "recall"
EVALUATE_EVERY = 50  # steps
ENOUGH = 0.99  # accuracy at every trained size that ends a run
ANSWERS = 128  # asked of each size, at the least, before accuracy is told
LONGEST_BATCH = 2_048  # tokens that are asked at once
WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class Run:
    """A training to be done, and the folder that keeps its result."""

    task: str
    contender: str
    learning_rate: float
    seed: int
    steps: int
    folder: Path = CACHE

    @property
    def name(self) -> str:
        return f"{self.task}-{self.contender}-lr{self.learning_rate:g}-seed{self.seed}-steps{self.steps}"

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.json"

    def result(self) -> dict[str, Any] | None:
        """What `train` measured; None where it has not run."""
        return json.loads(self.path.read_text()) if self.path.exists() else None


def train(run: Run) -> dict[str, Any]:
    """Trains and writes the result; a finished run is read instead.

    Each step draws one of the task's trained sizes. The loss is the cross entropy of the answers alone.
    """
    if (done := run.result()) is not None:
        return done
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    task, model = TASKS[run.task], Contender(CONTENDERS[run.contender].build()).train()
    settings = OptimizerSection(learning_rate=run.learning_rate, warmup_steps=round(run.steps * WARMUP_SHARE))
    groups = parameter_groups(model, settings)
    optimizer = torch.optim.AdamW(groups, lr=run.learning_rate, betas=settings.betas, fused=True)
    rng, start, curve = np.random.default_rng([run.seed, 0]), time.process_time(), []
    step = 0
    while step < run.steps:
        set_learning_rate(optimizer, learning_rate(step, run.steps, settings))
        descend(model, optimizer, *batch(task, rng), settings.max_gradient_norm)
        step += 1
        if step % EVALUATE_EVERY == 0 or step == run.steps:
            found = accuracies(model, task, task.trained, ANSWERS, run.seed)
            curve.append([step, found])
            if min(found.values()) >= ENOUGH:
                break
    result: dict[str, Any] = {
        "curve": curve,
        "accuracy": accuracies(model, task, task.asked, ANSWERS, run.seed),
        "steps": step,
        "parameters": model.num_parameters(),
        "seconds": time.process_time() - start,
    }
    run.folder.mkdir(parents=True, exist_ok=True)
    run.path.write_text(json.dumps(result))
    shown = " ".join(f"{size}: {share:.2f}" for size, share in result["accuracy"].items())
    print(f"{run.name}  {step} steps  {result['seconds']:.0f} s  {shown}", file=sys.stderr, flush=True)
    return result


def batch(task: Task, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """As many sequences of one of the trained sizes as the task's tokens per step allow."""
    size = int(rng.choice(task.trained))
    length = task.generate(np.random.default_rng(0), 1, size)[0].shape[1]
    ids, targets = task.generate(rng, max(1, task.tokens_per_step // length), size)
    return torch.from_numpy(ids), torch.from_numpy(targets)


def descend(model: Contender, optimizer: Any, ids: torch.Tensor, targets: torch.Tensor, max_norm: float) -> None:
    """Forward, backward, clip, update."""
    logits, extra = model(ids)
    asked = targets != UNASKED
    (F.cross_entropy(logits[asked], targets[asked]) + extra).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def accuracies(model: Contender, task: Task, sizes: tuple[int, ...], answers: int, seed: int) -> dict[str, float]:
    """Size → share of answers that are right, over sequences that training never draws."""
    model.eval()
    found = {}
    for size in sizes:
        rng, right, asked = np.random.default_rng([seed, 1, size]), 0, 0
        while asked < answers:
            length = task.generate(np.random.default_rng(0), 1, size)[0].shape[1]
            ids, targets = map(torch.from_numpy, task.generate(rng, max(1, LONGEST_BATCH // length), size))
            counted = targets != UNASKED
            right += int((model(ids)[0].argmax(dim=-1) == targets)[counted].sum())
            asked += int(counted.sum())
        found[str(size)] = right / asked
    model.train()
    return found
