"""What becomes of each step: taken, left out for a number that is not finite, or gone back from after a spike.

The check is the optimizer's own. A loss that is not finite is handed on as NaN (`nan_unless_finite`), so that every
gradient of it is NaN, and the global gradient norm, which DeepSpeed reduces over all ranks and reads before it moves
anything, tells every rank at once. The step's loss is on its way to the host by then. So a step waits for the device
once, before the optimizer moves, and what comes after is launched while the device still works.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_prep.errors import UserError
from pipeline.context import RunContext
from pipeline.distributed.copies import on_its_way
from pipeline.distributed.world import SharedUserError, World
from pipeline.engine.internals import Engine, loss_scale
from pipeline.files import step_name
from pipeline.health import report as diagnosis
from pipeline.health.decisions import decisions_path, write_decisions
from pipeline.health.state import (
    MAX_OVERFLOWS_IN_A_ROW,
    HealthState,
    RollBack,
    decide_roll_back,
    find_spike,
    plain_number,
)
from pipeline.metrics.losses import LossMeter
from pipeline.redact import failure_message
from pipeline.settings.batches import data_step
from pipeline.settings.section import counted
from pipeline.settings.sections import HealthSection
from pipeline.tracking.tracker import NullTracker

log = logging.getLogger("globallocal")


class Verdict(Enum):
    TAKEN = "taken"
    """The step counts; fp16's overflows, without an update, do too."""
    LEFT_OUT = "left out"
    """The optimizer has not moved; the step is still to be taken, with the next global batch."""
    SPIKE = "spike"
    """Taken, and to be gone back from."""


def nan_unless_finite(loss: torch.Tensor) -> torch.Tensor:
    """The loss, bit for bit; NaN, with gradients of NaN, where it is not finite. Never waits for the device."""
    one = torch.ones_like(loss)
    return loss * torch.where(torch.isfinite(loss.detach()), one, one * math.nan)


@dataclass
class Guard:
    """One rank's share of the decisions; each method is a collective.

    Attributes:
        tokenizer: decodes what a bad batch was.
        state: what the decisions depend on; the checkpoint holds it.
        loss_sum: gives the step's language loss, summed over the ranks.
    """

    context: RunContext
    engine: Engine
    tokenizer: Any
    tracker: NullTracker
    state: HealthState = field(default_factory=HealthState)
    loss_sum: Callable[[], list[float]] = field(init=False)

    @property
    def settings(self) -> HealthSection:
        return self.context.config.health

    @property
    def world(self) -> World:
        return self.context.world

    @property
    def run_folder(self) -> Path:
        return self.context.config.run_folder

    def judge(self, step: int, losses: LossMeter) -> Verdict:
        """What becomes of the step that was just tried; `step` steps were taken before it.

        Raises:
            UserError: a number that is not finite, and `health.non_finite` is `stop`, or it was one too many.
        """
        if not self.engine.was_step_applied():
            return self.not_applied(step, losses)
        self.state = self.state.applied()
        if self.settings.spike_z_score is None:
            return Verdict.TAKEN
        loss, norm = self.read()
        reason = find_spike(self.state, loss, norm, self.settings.spike_z_score)
        begins = reason is not None and not self.state.spiking
        self.state = self.state.remembering(loss, norm, reason is not None)
        if not begins:
            return Verdict.TAKEN
        log.warning(f"step {step + 1:,}: spike: {reason}")
        self.tracker.set_tags({"globallocal.spike": f"step {step + 1}: {reason}"})
        self.tracker.log_event("spike", step + 1, reason=reason)
        if self.settings.spike_action != "none":
            self.dump(step, f"spike: {reason}", losses)
        return Verdict.SPIKE if self.settings.spike_action == "roll_back" else Verdict.TAKEN

    def look_ahead(self, losses: LossMeter) -> None:
        """Before the optimizer moves: the step's mean language loss sets out for the host, where spikes are watched."""
        if self.settings.spike_z_score is None:
            return
        total = torch.stack(losses.step)[:, :1].mean(dim=0)
        dist.all_reduce(total)
        self.loss_sum = on_its_way(total)

    def read(self) -> tuple[float, float]:
        """Language loss and gradient norm of the step, the same on every rank."""
        (loss,) = self.loss_sum()
        return loss / self.world.size, float(self.engine.get_global_grad_norm())

    def metrics(self) -> dict[str, float]:
        """What has happened so far, where anything has; no collective."""
        numbers = {
            "health/left_out_batches": self.state.bad_batches,
            "health/roll_backs": len(self.state.roll_backs),
            "health/overflows": self.state.overflows,
        }
        return {name: float(number) for name, number in numbers.items() if number}

    def batch(self, step: int) -> int:
        """The global batch that a step reads, the first step being 0."""
        return data_step(step, self.state.skipped_batches)

    # ---- numbers that are not finite

    def not_applied(self, step: int, losses: LossMeter) -> Verdict:
        finite = bool(torch.stack(losses.step).isfinite().all())
        if self.engine.fp16_enabled() and all(self.world.gather(finite)):
            return self.overflowed(step)
        batch = self.batch(step)
        report = self.dump(step, "a loss or gradient is not finite", losses)
        line = f"step {step + 1:,}: {diagnosis.culprit(report)}; no weight has moved"
        if self.settings.non_finite == "stop":
            raise SharedUserError(
                f"{line}, and nothing new is saved; what the batch was: {self.dump_folder(step)}. A restart would meet "
                "it again: set health.non_finite=skip to leave such batches out, or lower optimizer.learning_rate"
            )
        self.state = self.state.without_batch(batch)
        self.tracker.leave_out(self.state.skipped_batches)
        limit = self.settings.max_skipped_steps
        if self.state.bad_in_a_row > limit:
            raise SharedUserError(
                f"{line}; that is {self.state.bad_in_a_row} global batches in a row (health.max_skipped_steps "
                f"{limit}): it is not the data; go on from an older checkpoint (checkpoint.resume) with a lower "
                f"optimizer.learning_rate; what the batches were: {self.dump_folder(step)}"
            )
        log.warning(f"{line}: global batch {batch:,} is left out ({self.state.bad_in_a_row} of {limit} in a row)")
        self.tracker.set_tags({"globallocal.left_out": f"step {step + 1}: global batch {batch}, not finite"})
        self.tracker.log_event("left_out", step + 1, batch=batch)
        return Verdict.LEFT_OUT

    def overflowed(self, step: int) -> Verdict:
        """fp16: the scaled gradient left the format's range, the losses did not. DeepSpeed halves the scale."""
        self.state = self.state.overflowed()
        scale = loss_scale(self.engine)
        if self.state.overflows_in_a_row > MAX_OVERFLOWS_IN_A_ROW:
            raise SharedUserError(
                f"step {step + 1:,}: the gradient overflowed fp16 in {self.state.overflows_in_a_row} steps in a row, "
                f"at a loss scale of {scale:g} in the end, and no weight has moved in them; use "
                "training.precision=bf16 or fp32, or let the loss scale fall (fp16.loss_scale 0 in the DeepSpeed JSON)"
            )
        log.info(f"step {step + 1:,}: the scaled gradient overflowed fp16, no update; the loss scale is now {scale:g}")
        return Verdict.TAKEN

    # ---- reports

    def dump_folder(self, step: int) -> Path:
        return self.run_folder / "health" / step_name(step + 1)

    def dump(self, step: int, reason: str, losses: LossMeter) -> dict[str, Any]:
        """What the global batch was, in the run folder and as artifacts; the same report on every rank."""
        batch, source = self.batch(step), self.context.source
        with self.world.together():
            samples = list(diagnosis.micro_batches(source, self.context.layout, self.world.rank, batch))
            tokens = [source.read(numbers) for numbers in samples]
            places = [[source.locate(number) for number in numbers.tolist()] for numbers in samples]
        measured = diagnosis.measure(self.engine, tokens, self.world.device)
        then = torch.stack(losses.step).tolist()
        mine = [
            {
                "rank": self.world.rank,
                "micro_batch": number,
                "language_loss_then": plain_number(then[number][0]),
                "diversity_loss_then": plain_number(then[number][1]),
                **numbers,
                "samples": places[number],
            }
            for number, numbers in enumerate(measured)
        ]
        report = {
            "reason": reason,
            "step": step + 1,
            "global_batch": batch,
            "weight_norms": diagnosis.weight_norms(self.engine.module),
            "recent_losses": self.state.losses,
            "recent_gradient_norms": self.state.gradient_norms,
            "micro_batches": [item for items in self.world.gather(mine) for item in items],
        }
        if self.world.is_main:
            folder = self.dump_folder(step)
            try:
                files = diagnosis.write_report(folder, f"batch-{batch:08d}", report, source, self.tokenizer)
                for name, text in files:
                    self.tracker.log_text(text, f"health/{folder.name}/{name}")
                log.info(f"step {step + 1:,}: what its global batch {batch:,} was is in {folder}")
            except (OSError, UserError) as error:
                log.warning(f"{folder}: the report could not be written: {failure_message(error)}")
        return report

    # ---- roll back

    def decide(self, step: int, to_step: int | None) -> RollBack | None:
        """After a spike in the step that made it `step`: the roll back, written down before anyone acts on it.

        Args:
            to_step: of the newest checkpoint.

        Returns:
            None where there is nothing to go back to.

        Raises:
            UserError: this checkpoint was gone back to often enough, or the decision cannot be written.
        """
        if to_step is None:
            log.warning("no checkpoint to go back to yet: training goes on")
            return None
        limit = self.settings.max_roll_backs
        batch = self.batch(step - 1)
        decision = decide_roll_back(self.state, step, batch, to_step, self.batch(to_step), limit)
        if decision is None:
            raise SharedUserError(
                f"step {step:,}: a spike again, after {counted(limit, 'roll back')} to step {to_step:,} "
                "(health.max_roll_backs): it is not the data; go on with a lower optimizer.learning_rate, from an "
                "older checkpoint if need be (checkpoint.resume); what the batches were: "
                f"{self.dump_folder(step).parent}"
            )
        problems: list[str] = []
        if self.world.is_main:
            try:
                write_decisions(self.run_folder, [*self.state.roll_backs, decision])
            except OSError as error:
                problems.append(f"{decisions_path(self.run_folder)}: {failure_message(error)}; no roll back without it")
        self.world.raise_together(self.world.broadcast(problems))
        left_out = f"global batches {decision.first_batch:,} to {decision.last_batch - 1:,}"
        log.warning(f"step {step:,}: going back to step {to_step:,}, leaving out {left_out}")
        made = [*self.state.roll_backs, decision]
        lines = [f"step {item.step} → {item.to_step}, without [{item.first_batch}, {item.last_batch})" for item in made]
        self.tracker.set_tags({"globallocal.roll_backs": "\n".join(lines)})
        return decision
