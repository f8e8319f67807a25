"""The training loop. It receives built parts; `train.py` builds them."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import checkpoint, checkpoint_io
from pipeline.config import RunConfig
from pipeline.data import BatchLayout
from pipeline.distributed import StopRequest, World
from pipeline.health import HealthState
from pipeline.metrics import Clock, LossMeter, Throughput, duration
from pipeline.optim import learning_rate, set_learning_rate

log = logging.getLogger("globallocal")


@dataclass
class Trainer:
    """One rank's share of a run.

    Attributes:
        batches: this rank's micro-batches from the current position on, int64 [micro_batch_size, S+1].
        evaluate: measures the held-out losses; None where the run asks for none.
        generate: continuations of the run's prompts.
        describe: the checkpoint state of the current step, all but what the trainer knows itself.
        step: optimizer steps taken.
    """

    config: RunConfig
    world: World
    engine: Any
    layout: BatchLayout
    max_steps: int
    batches: Iterator[np.ndarray]
    evaluate: Callable[[], dict[str, float]] | None
    generate: Callable[[], list[str]]
    describe: Callable[["Trainer"], checkpoint.CheckpointState]
    tracker: Any
    stop: StopRequest
    clock: Clock
    step: int = 0
    health: HealthState = field(default_factory=HealthState)
    evaluation: dict[str, float] | None = None
    saved_step: int | None = None
    losses: LossMeter = field(init=False)
    throughput: Throughput = field(init=False)

    def __post_init__(self) -> None:
        self.losses = LossMeter(self.world.device)
        self.throughput = Throughput(self.clock)

    def train(self) -> bool:
        """Train to the last step. Returns False where a signal ended it early, with all saved."""
        config = self.config
        while self.step < self.max_steps:
            with self.clock.phase("training"):
                self.train_step()
                # Reading the losses waits for the device, so that the clock counts work and not its queueing.
                losses = self.losses.read() if self.due(config.training.log_interval_steps) else None
            if losses:
                self.log_step(losses)
            if self.evaluate and self.due(config.evaluation.interval_steps):
                self.run_evaluation()
            if self.due(config.checkpoint.interval_steps):
                self.save()
            if self.world.any(self.stop.received is not None):
                return self.leave()
        return True

    def due(self, interval_steps: int) -> bool:
        """Every cadence: each `interval_steps`, and the last step."""
        return self.step % interval_steps == 0 or self.step == self.max_steps

    def train_step(self) -> None:
        """One optimizer step over the global batch."""
        set_learning_rate(self.engine.optimizer, self.current_learning_rate())
        for _ in range(self.layout.gradient_accumulation_steps):
            tokens = torch.from_numpy(next(self.batches)).to(self.world.device)
            output = self.engine(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:])
            self.engine.backward(output.loss)
            self.losses.add(output.language_loss, output.diversity_loss)
            self.engine.step()
        self.step += 1
        self.throughput.tokens += self.tokens_per_step

    def current_learning_rate(self) -> float:
        return learning_rate(self.step, self.max_steps, self.config.optimizer)

    @property
    def tokens_per_step(self) -> int:
        return self.layout.global_batch_size * self.config.data.sequence_length

    def log_step(self, losses: dict[str, float]) -> None:
        gradient_norm = float(self.engine.get_global_grad_norm())  # before clipping
        rate = learning_rate(self.step - 1, self.max_steps, self.config.optimizer)
        tokens_per_second = self.throughput.read()
        metrics = losses | {
            "train/learning_rate": rate,
            "train/gradient_norm": gradient_norm,
            "train/tokens_per_second": tokens_per_second,
            "train/consumed_tokens": float(self.step * self.tokens_per_step),
        }
        self.tracker.log_metrics(metrics, self.step)
        left = duration((self.max_steps - self.step) * self.tokens_per_step / tokens_per_second)
        log.info(
            f"step {self.step:,}/{self.max_steps:,}  loss {losses['train/language_loss']:.4f}  "
            f"lr {rate:.2e}  grad {gradient_norm:.2f}  {tokens_per_second:,.0f} tokens/s  left {left}"
        )

    def run_evaluation(self) -> None:
        assert self.evaluate is not None
        with self.clock.phase("evaluation"):
            result = self.evaluate()
            texts = self.generate()
        self.evaluation = result
        self.tracker.log_metrics({f"valid/{name}": value for name, value in result.items()}, self.step)
        log.info(
            f"step {self.step:,}  held-out loss {result['loss']:.4f}  "
            f"token perplexity {result['token_perplexity']:.1f}  bits per byte {result['bits_per_byte']:.3f}  "
            f"({result['tokens']:,.0f} tokens)"
        )
        if texts:
            self.tracker.log_text("\n\n---\n\n".join(texts), f"samples/step-{self.step:08d}.txt")
            for text in texts:
                log.info(f"sample: {text!r}")

    def save(self) -> bool:
        """Write a checkpoint; a failure is said and survived, and the older ones stand."""
        root = self.checkpoints
        with self.clock.phase("saving"):
            problems = checkpoint_io.save(self.engine, root, self.describe(self), self.world)
            if not problems and self.world.is_main:
                checkpoint.prune(root, self.config.checkpoint.keep_last)
        for problem in problems:
            log.error(f"checkpoint at step {self.step:,} not written: {problem}")
        if not problems:
            self.saved_step = self.step
            log.info(f"step {self.step:,}  saved {root / checkpoint.step_name(self.step)}")
        self.tracker.log_metrics({f"clock/{name}_seconds": s for name, s in self.clock.seconds.items()}, self.step)
        return not problems

    @property
    def checkpoints(self) -> Path:
        return self.config.run_folder / "checkpoints"

    def leave(self) -> bool:
        """Asked to stop: save once, if this step is not saved yet. True where the run was complete anyway."""
        name = self.stop.received.name if self.stop.received else "another rank's signal"
        log.info(f"{name}: stopping after step {self.step:,}")
        if self.saved_step != self.step:
            self.save()
        return self.step >= self.max_steps
