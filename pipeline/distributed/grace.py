"""The wish to stop as all ranks know it, and what still fits into the grace that a stop leaves."""

from pipeline.distributed.clock import Clock
from pipeline.distributed.stop import Plan, Stopped, StopRequest, plan
from pipeline.distributed.world import World


class Grace:
    """One rank's share of the decisions; each method but `end_if_stopped` is a collective.

    Attributes:
        seconds: from the signal to the end of this process (`training.preemption_grace_seconds`).
        step_seconds: what this rank's last step took.
        save_seconds: what the last save took, waiting for steps not counted.
    """

    def __init__(self, stop: StopRequest, world: World, clock: Clock, seconds: float) -> None:
        self.stop, self.world, self.clock, self.seconds = stop, world, clock, seconds
        self.step_seconds = 0.0
        self.save_seconds = 0.0
        self._waited_seconds = 0.0

    @property
    def reason(self) -> str:
        return self.stop.reason

    @property
    def stopping(self) -> bool:
        """Whether a rank had been asked to stop when the ranks agreed last."""
        return self._waited_seconds > 0

    def agree(self) -> None:
        """Once per micro-step, between the batches of an evaluation, after a save: has any rank been asked to stop?"""
        with self.clock.phase("agreement"):
            agreed = self.world.agree({"waited_seconds": self.stop.waited_seconds()})
        self._waited_seconds = agreed["waited_seconds"]

    def stop_if_asked(self) -> None:
        """Raises Stopped on every rank where one was asked to stop."""
        self.agree()
        self.end_if_stopped()

    def end_if_stopped(self) -> None:
        """Raises Stopped where the ranks have agreed on it already."""
        if self.stopping:
            raise Stopped

    def plan(self, rest_of_step: float) -> Plan:
        """What still fits into the grace; `rest_of_step` is the part of a step that is left."""
        own = {"step": self.step_seconds, "save": self.save_seconds, "waited": self.stop.waited_seconds()}
        slowest = self.world.agree(own)
        return plan(self.seconds - slowest["waited"], rest_of_step * slowest["step"], slowest["save"])
