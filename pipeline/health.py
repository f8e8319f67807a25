"""Bad numbers: what a run remembers of them, and what is decided about them (pure functions)."""

from pydantic import BaseModel, ConfigDict

from pipeline.data import Ranges


class HealthState(BaseModel):
    """What the decisions depend on; part of every checkpoint, so that a resumed run decides as the unbroken one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    skipped_batches: Ranges = ()
    """Global batches that the run leaves out."""
