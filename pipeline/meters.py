"""What a run measures of itself between two log lines, and the line that says it."""

import logging
from collections.abc import Sequence
from typing import Any

from pipeline.context import RunContext
from pipeline.distributed.clock import Clock
from pipeline.health.resources import Alarm, ResourceWatch
from pipeline.metrics.duration import duration
from pipeline.metrics.losses import LossMeter, RouterMeter
from pipeline.metrics.step_times import RankMeasures, StepTimes, Throughput, times_per_step
from pipeline.metrics.utilisation import Utilisation, describe, device_name, peak_memory_bytes, peak_teraflops
from pipeline.tracking.node import NodeMonitor, node_name, system_metrics
from pipeline.tracking.tracker import NullTracker

log = logging.getLogger("globallocal")


class Meters:
    """One rank's meters.

    Attributes:
        losses: part of a checkpoint; the other meters begin anew at each start.
    """

    def __init__(self, context: RunContext, tracker: NullTracker, clock: Clock) -> None:
        self.context, self.tracker, self.clock = context, tracker, clock
        tracking, world = context.config.tracking, context.world
        self.losses = LossMeter(world.device)
        self.routers = RouterMeter(tracking.routers_per_layer)
        self.throughput = Throughput(clock)
        self.times = StepTimes(clock, 0)
        self.resources = ResourceWatch(clock.seconds["training"])
        self.node = NodeMonitor(tracking.enabled and world.local_rank == 0)
        self.utilisation = find_utilisation(context)

    def go_on_from(self, step: int, loss_sums: Sequence[Sequence[float]]) -> None:
        """Begin anew after `step` steps; `loss_sums` is what a checkpoint holds of the losses."""
        self.losses.reset()
        self.losses.restore(loss_sums, self.context.world)
        self.routers.reset()
        self.throughput.reset()
        self.times = StepTimes(self.clock, step)

    def add(self, output: Any) -> None:
        """Count a micro-batch; `output` is the model's."""
        self.losses.add(output.language_loss, output.diversity_loss)
        self.routers.add(output.router_statistics)

    def end_step(self, taken: bool, samples: int) -> None:
        """Count the step of the micro-batches since the last one; or forget them, where the step was not taken."""
        self.losses.end_step(taken)
        if taken:
            self.throughput.tokens += samples * self.context.config.data.sequence_length
        else:
            self.routers.reset()

    def log(
        self, step: int, losses: dict[str, float], learning_rate: float, gradient_norm: float, health: dict[str, float]
    ) -> None:
        """Say and record the metrics of the steps since the last line. A collective.

        Args:
            losses: what `losses.read` gave.
            learning_rate: of step `step`.
            gradient_norm: likewise, before clipping.
            health: what the guard has counted.
        """
        by_rank: list[RankMeasures] = self.context.world.gather(self.measure(step))
        seconds = [rank.seconds for rank in by_rank]
        tokens_per_second = self.throughput.read()
        use = self.utilisation.metrics(tokens_per_second, max(rank.device_bytes for rank in by_rank))
        metrics = {
            **losses,
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm,
            **use,
            **times_per_step(seconds),
            "memory/host_gib": max(rank.host_bytes for rank in by_rank) / 2**30,
            **system_metrics([(rank.node, rank.system) for rank in by_rank]),
            **self.routers.read(),
            **health,
        }
        self.tracker.log_metrics(metrics, step)
        steps = self.context.steps
        left = (self.context.tokens_after(steps) - self.context.tokens_after(step)) / tokens_per_second
        log.info(
            f"step {step:,}/{steps:,}  loss {losses['loss/train']:.4f}  lr {learning_rate:.2e}  "
            f"grad {gradient_norm:.2f}  {tokens_per_second:,.0f} tokens/s ({describe(use)})  left {duration(left)}"
        )
        self.report_alarms(step, self.resources.look(self.clock.seconds["training"], tokens_per_second, seconds))

    def report_alarms(self, step: int, alarms: Sequence[Alarm]) -> None:
        """Say, once, which resource has dropped out; every rank knows of it, and rank 0 says it."""
        for alarm in alarms if self.context.world.is_main else ():
            log.warning(f"step {step:,}: {alarm.text}")
            self.tracker.set_tags({f"globallocal.alarm.{alarm.kind}": f"step {step}: {alarm.text}"})
            self.tracker.log_event("alarm", step, kind=alarm.kind, text=alarm.text)

    def measure(self, step: int) -> RankMeasures:
        """What this rank adds to a log line."""
        return RankMeasures(
            seconds=self.times.read(step),
            device_bytes=peak_memory_bytes(self.context.world.device),
            host_bytes=self.node.host_bytes(),
            node=node_name(),
            system=self.node.read(),
        )


def find_utilisation(context: RunContext) -> Utilisation:
    """Says what MFU is measured against, or why there is none."""
    config, device, precision = context.config, context.world.device, context.precision
    given, name = config.training.peak_teraflops_per_device, device_name(device)
    peak = given or peak_teraflops(name, precision)
    source = "training.peak_teraflops_per_device" if given else "data sheet"
    if peak:
        log.info(f"device: {name}, peak {peak:g} TFLOP/s in {precision} ({source}), which MFU is a part of")
    elif device.type == "cuda":
        log.info(
            f"device: {name}, whose peak rate in {precision} is not known, so that no MFU is shown; "
            "training.peak_teraflops_per_device gives it"
        )
    return Utilisation(context.model.flops_per_token(config.data.sequence_length), context.world.size, peak)
