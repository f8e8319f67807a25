"""Evaluation while a run trains: the held-out loss and continued prompts, recorded."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.context import RunContext
from pipeline.distributed.clock import Clock
from pipeline.distributed.stop import Stopped
from pipeline.engine.internals import Engine
from pipeline.evaluation.figures import Evaluation, HeldOut
from pipeline.evaluation.generate import continuations
from pipeline.evaluation.held_out import HeldOutText, held_out
from pipeline.tracking.tracker import NullTracker

log = logging.getLogger("globallocal")


@contextmanager
def decorating(what: str) -> Iterator[None]:
    """What only shows how a run is doing: a fault in it is a line in the log, never the end of the run."""
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        log.warning(f"{what}: {type(error).__name__}: {said}; training goes on without")


class Evaluator:
    """Measures the held-out split of a run, where the run names one, and continues its prompts.

    Args:
        tokenizer: of the prompts.
        between: called before each batch and each text; what it raises ends the evaluation, which stays pending.

    Attributes:
        latest: the latest measurement.
        pending: the evaluation of the current step is due and not done yet.
    """

    def __init__(
        self,
        context: RunContext,
        engine: Engine,
        tokenizer: Any,
        tracker: NullTracker,
        clock: Clock,
        between: Callable[[], None],
    ) -> None:
        self.context, self.engine, self.tokenizer = context, engine, tokenizer
        self.tracker, self.clock, self.between = tracker, clock, between
        self.settings = context.config.evaluation
        self.latest: Evaluation | None = None
        self.pending = False

    @property
    def wanted(self) -> bool:
        return self.settings.split is not None

    def evaluate(self, step: int) -> None:
        """Measure after `step` steps, and record it. A collective."""
        begin = time.perf_counter()
        with self.clock.phase("evaluation"):
            measured = self.measure()
            texts: list[str] = []
            with decorating("samples"):
                texts = self.continue_prompts()
        self.pending = False
        self.latest = Evaluation(step, measured)
        self.tracker.log_metrics(measured.metrics(), step)
        total = measured.total
        log.info(
            f"step {step:,}  held-out loss {total.loss:.4f}  token perplexity {total.token_perplexity:.1f}  "
            f"bits per byte {total.bits_per_byte:.3f}  ({total.tokens:,.0f} tokens)"
        )
        seconds = time.perf_counter() - begin
        self.tracker.log_event("evaluation", step, **measured.flat(), seconds=seconds, samples=texts)
        self.record_texts(step, texts)

    def measure(self) -> HeldOut:
        split, world = self.settings.split, self.context.world
        assert split is not None
        text = HeldOutText(
            self.context.corpus,
            split,
            self.context.config.data.sequence_length,
            self.context.layout.micro_batch_size,
            self.settings.max_samples,
        )
        return held_out(self.engine, text, world.device, self.between)

    def continue_prompts(self) -> list[str]:
        return continuations(
            self.engine.module,
            self.tokenizer,
            self.settings.prompts,
            self.settings.max_new_tokens,
            self.context.world.device,
            self.context.config.run.seed,
            self.between,
        )

    def record_texts(self, step: int, texts: list[str]) -> None:
        if texts:
            with decorating("samples"):
                rows = [
                    {"step": step, "prompt": prompt, "continuation": text.removeprefix(prompt)}
                    for prompt, text in zip(self.settings.prompts, texts, strict=True)
                ]
                self.tracker.log_table("samples.json", rows, key=("step", "prompt"))
        for text in texts:
            log.info(f"sample: {text!r}")
