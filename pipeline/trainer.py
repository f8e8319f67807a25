"""The training loop. It receives its parts; `build.py` puts them together."""

import logging
import time
from dataclasses import InitVar, dataclass, field, replace

from pipeline.checkpoints.describe import describe
from pipeline.checkpoints.fingerprint import logit_fingerprint
from pipeline.checkpoints.resume import Resumed, newest, resume
from pipeline.checkpoints.saver import Saved, Saver
from pipeline.checkpoints.state import Origin, TrainState
from pipeline.context import RunContext
from pipeline.data.loader import BatchLoader
from pipeline.distributed.clock import Clock
from pipeline.distributed.copies import to_device
from pipeline.distributed.grace import Grace
from pipeline.distributed.stop import Stopped
from pipeline.distributed.world import SharedUserError
from pipeline.engine.internals import Engine, take_global_batches_of
from pipeline.engine.optim import learning_rate, set_learning_rate
from pipeline.evaluation.evaluator import Evaluator
from pipeline.health.guard import Guard, Verdict, nan_unless_finite
from pipeline.meters import Meters
from pipeline.metrics.profiler import StepProfiler
from pipeline.random_state import random_state, set_random_state
from pipeline.record import record_saved
from pipeline.settings.batches import data_step
from pipeline.tracking.tracker import NullTracker

log = logging.getLogger("globallocal")


@dataclass
class Trainer:
    """One rank's share of a run.

    Attributes:
        resumed: where this start goes on.
        guard: what becomes of each step.
        step: optimizer steps taken.
        begun_from: the exported model whose weights the run began with.
        saved_step: the step of the newest checkpoint that stands; None while there is none.
        batches: this rank's micro-batches from the current position on, int64 [micro_batch_size, S+1].
    """

    context: RunContext
    engine: Engine
    resumed: InitVar[Resumed]
    saver: Saver
    guard: Guard
    evaluator: Evaluator
    meters: Meters
    grace: Grace
    profiler: StepProfiler
    tracker: NullTracker
    clock: Clock
    step: int = field(init=False)
    saved_step: int | None = field(init=False)
    begun_from: Origin | None = field(init=False)
    batches: BatchLoader = field(init=False)

    def __post_init__(self, resumed: Resumed) -> None:
        self.go_on_from(resumed)

    def train(self) -> bool:
        """Train to the last step. Returns False where a stop ended it early.

        Raises:
            UserError: the last step could not be saved.
        """
        config, evaluator = self.context.config, self.evaluator
        self.clock.move("training")
        try:
            self.grace.stop_if_asked()
            if evaluator.pending:
                self.finish_evaluation()
            while self.step < self.context.steps:
                with self.profiler.step(self.step + 1), self.clock.phase("training"):
                    verdict = self.train_step()
                    # Reading the losses waits for the device, so that the clock counts work and not its queueing.
                    logged = verdict is not Verdict.LEFT_OUT and self.due(config.training.log_interval_steps)
                    losses = self.meters.losses.read() if logged else None
                if verdict is Verdict.LEFT_OUT or (verdict is Verdict.SPIKE and self.roll_back()):
                    self.grace.end_if_stopped()
                    continue
                if losses:
                    self.log_step(losses)
                evaluator.pending = evaluator.wanted and self.due(config.evaluation.interval_steps)
                self.grace.end_if_stopped()
                if evaluator.pending:
                    evaluator.evaluate(self.step)
                if self.due(config.checkpoint.interval_steps):
                    self.save()
                    self.grace.stop_if_asked()
                self.report(self.saver.poll())
        except Stopped:
            return self.leave()
        except SharedUserError:  # on every rank, so that what is being saved can be finished together
            self.finish_saving()
            raise
        self.save_last()
        return True

    @property
    def is_complete(self) -> bool:
        """The last step is taken and evaluated; a checkpoint may still be missing."""
        return self.step >= self.context.steps and not self.evaluator.pending

    def due(self, interval_steps: int) -> bool:
        """Every cadence: each `interval_steps`, and the last step."""
        return self.step % interval_steps == 0 or self.step == self.context.steps

    # ---- steps

    def train_step(self) -> Verdict:
        """One optimizer step over the global batch, or none of it; and what becomes of it.

        Raises:
            Stopped: the rest of the step would outlast the grace; all is as it was before the step.
            UserError: a number that is not finite ends the run.
        """
        clock, grace, layout = self.clock, self.grace, self.context.layout
        samples = layout.size(data_step(self.step, self.guard.state.skipped_batches))
        count = samples // (layout.micro_batch_size * layout.world_size)
        take_global_batches_of(self.engine, samples)
        before, begin = random_state(), time.perf_counter()
        set_learning_rate(self.engine.optimizer, self.learning_rate(self.step))
        for left in reversed(range(count)):
            with clock.phase("data"):
                tokens = to_device(next(self.batches), self.context.world.device)
            with clock.phase("forward"):
                output = self.engine(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:])
            with clock.phase("backward"):
                self.engine.backward(nan_unless_finite(output.loss))
            self.meters.add(output)
            grace.agree()
            if left and grace.stopping and grace.plan(left / count) != "finish the step":
                set_random_state(before)
                self.meters.losses.end_step(taken=False)
                raise Stopped
            with clock.phase("step"):
                if not left:
                    self.guard.look_ahead(self.meters.losses)
                self.engine.step()
        verdict = self.guard.judge(self.step, self.meters.losses)
        taken = verdict is not Verdict.LEFT_OUT
        self.meters.end_step(taken, samples)
        self.step += taken
        clock.step = self.step
        grace.step_seconds = time.perf_counter() - begin
        return verdict

    def learning_rate(self, step: int) -> float:
        """Of the step that is taken after `step` steps."""
        return learning_rate(step, self.context.steps, self.context.config.optimizer)

    def log_step(self, losses: dict[str, float]) -> None:
        gradient_norm = float(self.engine.get_global_grad_norm())  # before clipping
        self.meters.log(self.step, losses, self.learning_rate(self.step - 1), gradient_norm, self.guard.metrics())

    def finish_evaluation(self) -> None:
        """The evaluation that a stop kept from being done; the last checkpoint is to hold its result."""
        log.info(f"step {self.step:,}: its evaluation was not done before the stop; done now")
        self.evaluator.evaluate(self.step)
        if self.step == self.context.steps:
            self.save()

    # ---- where the run stands

    def state(self) -> TrainState:
        """Where the run stands now. A collective."""
        return TrainState(
            step=self.step,
            loss_sums=self.context.world.gather(self.meters.losses.sums.tolist()),
            evaluation=self.evaluator.latest,
            pending_evaluation=self.evaluator.pending,
            health=self.guard.state,
            seconds=dict(self.clock.seconds),
            begun_from=self.begun_from,
        )

    def go_on_from(self, resumed: Resumed) -> None:
        """Stand where a checkpoint stood; the engine has been restored from it. The clock goes on as it is."""
        state, context = resumed.state, self.context
        own = resumed.folder is not None and resumed.folder.parent == context.config.checkpoints
        self.step, self.saved_step = state.step, state.step if own else None
        self.guard.state = state.health
        self.begun_from = state.begun_from
        self.evaluator.latest = state.evaluation
        self.evaluator.pending = state.pending_evaluation and self.evaluator.wanted
        self.meters.go_on_from(state.step, state.loss_sums)
        skipped = state.health.skipped_batches
        self.tracker.leave_out(skipped)
        consumed_samples = context.layout.first_sample(data_step(state.step, skipped))
        self.batches = BatchLoader(context.source, context.layout, context.world.rank, consumed_samples, skipped)

    def roll_back(self) -> bool:
        """After a spike: to the newest checkpoint, and on without the batches around it. False where there is none."""
        self.finish_saving()
        if not self.guard.decide(self.step, self.saved_step):
            return False
        with self.clock.phase("loading"):
            resumed = resume(newest(self.context), self.engine)
            self.batches.close()
            self.tracker.log_event("roll_back", self.step, to_step=resumed.state.step)
            done = replace(resumed.state, pending_evaluation=False)  # it was made at this start, before the next step
            self.go_on_from(replace(resumed, state=done))
        return True

    # ---- saving

    def save(self) -> None:
        """Begin to write a checkpoint; `report` hears how it ended."""
        with self.clock.phase("saving"):
            fingerprint = logit_fingerprint(self.engine, self.context.model.vocab_size)
            self.saver.start(describe(self.context, self.state(), fingerprint, self.tracker.run_id))

    def report(self, ended: list[Saved]) -> None:
        """Say how saves ended. A failure is survived: the older ones stand, the next interval tries again."""
        for saved in ended:
            for problem in saved.problems:
                log.error(f"checkpoint at step {saved.step:,} not written: {problem}")
                self.tracker.log_event("not_saved", saved.step, problem=problem)
            for warning in saved.warnings:
                log.warning(warning)
            if not saved.problems:
                self.saved_step, self.grace.save_seconds = saved.step, saved.seconds
                deleted = f"; deleted {', '.join(item.name for item in saved.deleted)}" if saved.deleted else ""
                record_saved(self.tracker, saved, self.evaluator.latest)
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
            raise SharedUserError(
                f"step {self.step:,} could not be saved, for the reasons above; {self.what_stands}: make room and "
                "start again, and the run goes on from there"
            )

    @property
    def what_stands(self) -> str:
        return "no checkpoint stands" if self.saved_step is None else f"step {self.saved_step:,} stands"

    def leave(self) -> bool:
        """Asked to stop: save what stands, where the time allows. True where the run was complete anyway."""
        log.info(f"{self.grace.reason}: stopping after step {self.step:,}")
        self.finish_saving()  # it is begun: whatever the grace, it does no harm
        if self.saved_step == self.step or self.step == 0:
            log.info("nothing to save: " + ("no step is taken yet" if self.step == 0 else "this step is saved"))
        elif self.grace.plan(0) == "leave":
            log.warning(
                f"step {self.step:,} is not saved: the last save took {self.grace.save_seconds:.1f} s, and of "
                f"training.preemption_grace_seconds = {self.grace.seconds:g} less is left; {self.what_stands}"
            )
        else:
            self.save()
            self.finish_saving()
        return self.is_complete and self.saved_step == self.step
