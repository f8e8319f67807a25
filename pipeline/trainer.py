"""The training loop. It receives its parts; `build.py` puts them together."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.checkpoints.folder import CheckpointState
from pipeline.checkpoints.resume import Resumed
from pipeline.checkpoints.saver import Saved, Saver
from pipeline.config import RunConfig
from pipeline.data.loader import BatchLayout, BatchLoader
from pipeline.distributed.clock import Clock
from pipeline.distributed.stop import Plan, Stopped, StopRequest, plan
from pipeline.distributed.world import SharedUserError, World
from pipeline.duration import duration
from pipeline.engine.internals import Engine
from pipeline.engine.optim import learning_rate, set_learning_rate
from pipeline.health.guard import Guard, Verdict, nan_unless_finite
from pipeline.health.resources import Alarm, ResourceWatch
from pipeline.health.state import HealthState
from pipeline.metrics import (
    LossMeter,
    RankMeasures,
    RouterMeter,
    StepTimes,
    Throughput,
    evaluation_metrics,
    times_per_step,
)
from pipeline.profiler import StepProfiler
from pipeline.random_state import random_state, set_random_state
from pipeline.record import record_saved
from pipeline.tracking.node import NodeMonitor, node_name, system_metrics
from pipeline.utilisation import Utilisation, describe, peak_memory_bytes

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


@dataclass
class Trainer:
    """One rank's share of a run.

    Attributes:
        batches: this rank's micro-batches from the current position on, int64 [micro_batch_size, S+1].
        evaluate: measures the held-out losses, calling its argument before each batch; None where the run asks for
            none.
        generate: continuations of the run's prompts; calls its argument before each.
        describe: the checkpoint state of the current step, all but what the trainer knows itself.
        guard: what becomes of each step.
        restore: the newest checkpoint into the engine.
        read_from: this rank's micro-batches from a step on.
        step: optimizer steps taken.
        evaluation: the latest held-out measurement, and its `step`.
        pending_evaluation: this step's evaluation is due and not done yet.
        saved_step: the step of the newest checkpoint that stands.
        save_seconds: what the last save took, waiting for steps not counted.
    """

    config: RunConfig
    world: World
    engine: Engine
    layout: BatchLayout
    max_steps: int
    batches: BatchLoader
    evaluate: Callable[[Callable[[], None]], dict[str, float]] | None
    generate: Callable[[Callable[[], None]], list[str]]
    describe: Callable[["Trainer"], CheckpointState]
    guard: Guard
    restore: Callable[[], Resumed]
    read_from: Callable[[int, HealthState], BatchLoader]
    saver: Saver
    tracker: Any
    stop: StopRequest
    clock: Clock
    utilisation: Utilisation
    profiler: StepProfiler
    step: int = 0
    evaluation: dict[str, float] | None = None
    pending_evaluation: bool = False
    saved_step: int | None = None
    waited_seconds: float = 0.0
    step_seconds: float = 0.0
    save_seconds: float = 0.0
    losses: LossMeter = field(init=False)
    routers: RouterMeter = field(init=False)
    throughput: Throughput = field(init=False)
    step_times: StepTimes = field(init=False)
    node: NodeMonitor = field(init=False)
    resources: ResourceWatch = field(init=False)

    def __post_init__(self) -> None:
        self.losses = LossMeter(self.world.device)
        self.routers = RouterMeter(self.config.tracking.routers_per_layer)
        self.throughput = Throughput(self.clock)
        self.step_times = StepTimes(self.clock, self.step)
        self.node = NodeMonitor(self.config.tracking.enabled and self.world.local_rank == 0)
        self.resources = ResourceWatch(self.clock.seconds["training"])

    def train(self) -> bool:
        """Train to the last step. Returns False where a stop ended it early.

        Raises:
            UserError: the last step could not be saved.
        """
        config = self.config
        self.clock.move("training")
        try:
            self.stop_if_asked()
            if self.pending_evaluation:
                self.finish_evaluation()
            while self.step < self.max_steps:
                with self.profiler.step(self.step + 1), self.clock.phase("training"):
                    verdict = self.train_step()
                    # Reading the losses waits for the device, so that the clock counts work and not its queueing.
                    logged = verdict is not Verdict.LEFT_OUT and self.due(config.training.log_interval_steps)
                    losses = self.losses.read() if logged else None
                if verdict is Verdict.LEFT_OUT or (verdict is Verdict.SPIKE and self.roll_back()):
                    self.end_if_stopped()
                    continue
                if losses:
                    self.log_step(losses)
                self.pending_evaluation = self.evaluate is not None and self.due(config.evaluation.interval_steps)
                self.end_if_stopped()
                if self.pending_evaluation:
                    self.run_evaluation()
                if self.due(config.checkpoint.interval_steps):
                    self.save()
                    self.stop_if_asked()
                self.report(self.saver.poll())
        except Stopped:
            return self.leave()
        except SharedUserError:  # on every rank, so that what is being saved can be finished together
            self.finish_saving()
            raise
        self.save_last()
        return True

    def due(self, interval_steps: int) -> bool:
        """Every cadence: each `interval_steps`, and the last step."""
        return self.step % interval_steps == 0 or self.step == self.max_steps

    def train_step(self) -> Verdict:
        """One optimizer step over the global batch, or none of it; and what becomes of it.

        Raises:
            Stopped: the rest of the step would outlast the grace; all is as it was before the step.
            UserError: a number that is not finite ends the run.
        """
        clock, count = self.clock, self.layout.gradient_accumulation_steps
        before, begin = random_state(), time.perf_counter()
        set_learning_rate(self.engine.optimizer, self.current_learning_rate())
        for left in reversed(range(count)):
            with clock.phase("data"):
                tokens = torch.from_numpy(next(self.batches)).to(self.world.device)
            with clock.phase("forward"):
                output = self.engine(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:])
            with clock.phase("backward"):
                self.engine.backward(nan_unless_finite(output.loss))
            self.losses.add(output.language_loss, output.diversity_loss)
            self.routers.add(output.router_statistics)
            self.agree()
            if left and self.stopping and self.plan(left / count) != "finish the step":
                set_random_state(before)
                self.losses.end_step(taken=False)
                raise Stopped
            with clock.phase("step"):
                self.engine.step()
        verdict = self.guard.judge(self.step, self.losses)
        taken = verdict is not Verdict.LEFT_OUT
        self.losses.end_step(taken)
        if not taken:
            self.routers.reset()
        self.step += taken
        self.clock.step = self.step
        self.step_seconds = time.perf_counter() - begin
        self.throughput.tokens += taken * self.tokens_per_step
        return verdict

    def roll_back(self) -> bool:
        """After a spike: to the newest checkpoint, and on without the batches around it. False where there is none."""
        self.finish_saving()
        if not self.guard.decide(self.step, self.saved_step):
            return False
        with self.clock.phase("loading"):
            resumed = self.restore()
            self.batches.close()
            self.batches = self.read_from(resumed.step, resumed.health)
        self.tracker.log_event("roll_back", self.step, to_step=resumed.step)
        self.guard.state, self.step, self.saved_step = resumed.health, resumed.step, resumed.step
        self.evaluation, self.pending_evaluation = resumed.evaluation, False
        self.losses.restore(resumed.loss_sums, self.world)
        self.routers.reset()
        self.throughput.reset()
        self.step_times = StepTimes(self.clock, self.step)
        return True

    def agree(self) -> None:
        """Once a micro-step, between the batches of an evaluation, after a save: has any rank been asked to stop?"""
        with self.clock.phase("agreement"):
            agreed = self.world.agree({"waited_seconds": self.stop.waited_seconds()})
        self.waited_seconds = agreed["waited_seconds"]

    def stop_if_asked(self) -> None:
        self.agree()
        self.end_if_stopped()

    @property
    def stopping(self) -> bool:
        return self.waited_seconds > 0

    def end_if_stopped(self) -> None:
        if self.stopping:
            raise Stopped

    def plan(self, rest_of_step: float) -> Plan:
        """What still fits into the grace; `rest_of_step` is the part of a step that is left. A collective."""
        own = {"step": self.step_seconds, "save": self.save_seconds, "waited": self.stop.waited_seconds()}
        slowest = self.world.agree(own)
        left = self.config.training.preemption_grace_seconds - slowest["waited"]
        return plan(left, rest_of_step * slowest["step"], slowest["save"])

    def current_learning_rate(self) -> float:
        return learning_rate(self.step, self.max_steps, self.config.optimizer)

    @property
    def tokens_per_step(self) -> int:
        return self.layout.global_batch_size * self.config.data.sequence_length

    def measure(self) -> RankMeasures:
        """What this rank adds to a log line."""
        return RankMeasures(
            seconds=self.step_times.read(self.step),
            device_bytes=peak_memory_bytes(self.world.device),
            host_bytes=self.node.host_bytes(),
            node=node_name(),
            system=self.node.read(),
        )

    def log_step(self, losses: dict[str, float]) -> None:
        gradient_norm = float(self.engine.get_global_grad_norm())  # before clipping
        rate = learning_rate(self.step - 1, self.max_steps, self.config.optimizer)
        by_rank = self.world.gather(self.measure())
        seconds = [rank.seconds for rank in by_rank]
        tokens_per_second = self.throughput.read()
        use = self.utilisation.metrics(tokens_per_second, max(rank.device_bytes for rank in by_rank))
        metrics = {
            **losses,
            "learning_rate": rate,
            "gradient_norm": gradient_norm,
            **use,
            **times_per_step(seconds),
            "memory/host_gib": max(rank.host_bytes for rank in by_rank) / 2**30,
            **system_metrics([(rank.node, rank.system) for rank in by_rank]),
            **self.routers.read(),
            **self.guard.metrics(),
        }
        self.tracker.log_metrics(metrics, self.step)
        left = duration((self.max_steps - self.step) * self.tokens_per_step / tokens_per_second)
        log.info(
            f"step {self.step:,}/{self.max_steps:,}  loss {losses['loss/train']:.4f}  "
            f"lr {rate:.2e}  grad {gradient_norm:.2f}  {tokens_per_second:,.0f} tokens/s ({describe(use)})  left {left}"
        )
        self.report_alarms(self.resources.look(self.clock.seconds["training"], tokens_per_second, seconds))

    def report_alarms(self, alarms: list[Alarm]) -> None:
        """Say, once, which resource has dropped out; every rank knows of it, and rank 0 says it."""
        for alarm in alarms if self.world.is_main else ():
            log.warning(f"step {self.step:,}: {alarm.text}")
            self.tracker.set_tags({f"globallocal.alarm.{alarm.kind}": f"step {self.step}: {alarm.text}"})
            self.tracker.log_event("alarm", self.step, kind=alarm.kind, text=alarm.text)

    def run_evaluation(self) -> None:
        """Raises Stopped, between two batches; the evaluation is then done at the next start."""
        assert self.evaluate is not None
        begin = time.perf_counter()
        with self.clock.phase("evaluation"):
            result = self.evaluate(self.stop_if_asked)
            texts: list[str] = []
            with decorating("samples"):
                texts = self.generate(self.stop_if_asked)
        self.pending_evaluation = False
        self.evaluation = {"step": self.step, **result}
        self.tracker.log_metrics(evaluation_metrics(result), self.step)
        log.info(
            f"step {self.step:,}  held-out loss {result['loss']:.4f}  "
            f"token perplexity {result['token_perplexity']:.1f}  bits per byte {result['bits_per_byte']:.3f}  "
            f"({result['tokens']:,.0f} tokens)"
        )
        self.tracker.log_event("evaluation", self.step, **result, seconds=time.perf_counter() - begin, samples=texts)
        if texts:
            with decorating("samples"):
                rows = [
                    {"step": self.step, "prompt": prompt, "continuation": text.removeprefix(prompt)}
                    for prompt, text in zip(self.config.evaluation.prompts, texts, strict=True)
                ]
                self.tracker.log_table("samples.json", rows, key=("step", "prompt"))
            for text in texts:
                log.info(f"sample: {text!r}")

    def finish_evaluation(self) -> None:
        """The evaluation that a stop kept from being done; the last checkpoint is to hold its result."""
        log.info(f"step {self.step:,}: its evaluation was not done before the stop; done now")
        self.run_evaluation()
        if self.step == self.max_steps:
            self.save()

    def save(self) -> None:
        """Begin to write a checkpoint; `report` hears how it ended."""
        with self.clock.phase("saving"):
            self.saver.start(self.describe(self))

    def report(self, ended: list[Saved]) -> None:
        """Say how saves ended. A failure is survived: the older ones stand, the next interval tries again."""
        for saved in ended:
            for problem in saved.problems:
                log.error(f"checkpoint at step {saved.step:,} not written: {problem}")
                self.tracker.log_event("not_saved", saved.step, problem=problem)
            for warning in saved.warnings:
                log.warning(warning)
            if not saved.problems:
                self.saved_step, self.save_seconds = saved.step, saved.seconds
                deleted = f"; deleted {', '.join(item.name for item in saved.deleted)}" if saved.deleted else ""
                record_saved(self.tracker, saved, self.evaluation)
                size = f"{saved.size_bytes / 1e6:,.1f} MB in {saved.seconds:.1f} s"
                log.info(f"step {saved.step:,}  saved {saved.folder}  {size}{deleted}")

    def finish_saving(self) -> None:
        """Wait for the save in flight."""
        with self.clock.phase("saving"):
            self.report(self.saver.finish())

    def save_last(self) -> None:
        """At the end: the last step is saved, at a second try where need be.

        Raises:
            UserError: it could not be written.
        """
        self.finish_saving()
        if self.saved_step != self.step:
            self.save()
            self.finish_saving()
        if self.saved_step != self.step:
            stands = "no checkpoint stands" if self.saved_step is None else f"step {self.saved_step:,} stands"
            raise SharedUserError(
                f"step {self.step:,} could not be saved, for the reasons above; {stands}: make room and start again, "
                "and the run goes on from there"
            )

    def leave(self) -> bool:
        """Asked to stop: save what stands, where the time allows. True where the run was complete anyway."""
        log.info(f"{self.stop.reason}: stopping after step {self.step:,}")
        grace = self.config.training.preemption_grace_seconds
        self.finish_saving()  # it is begun: whatever the grace, it does no harm
        if self.saved_step == self.step or self.step == 0:
            log.info("nothing to save: " + ("no step is taken yet" if self.step == 0 else "this step is saved"))
        elif self.plan(0) == "leave":
            stands = "no checkpoint stands" if self.saved_step is None else f"step {self.saved_step:,} stands"
            log.warning(
                f"step {self.step:,} is not saved: the last save took {self.save_seconds:.1f} s, and of "
                f"training.preemption_grace_seconds = {grace:g} less is left; {stands}"
            )
        else:
            self.save()
            self.finish_saving()
        return self.step >= self.max_steps and not self.pending_evaluation and self.saved_step == self.step
