"""What a model says of a fixed probe, by which a resumed run knows that its weights are those that were saved."""

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from pipeline.engine.internals import Engine

PROBE_TOKENS = 16
VALUES = 64


class Fingerprint(BaseModel):
    """The logits of a model on the probe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    """Of all of them, fp32."""
    values: list[float]
    """The first 64 of the last token, for a distance."""

    def distance(self, other: "Fingerprint") -> float:
        """0.0 where all logits are bitwise the same, else the largest distance of the values, which is never 0."""
        if self.sha256 == other.sha256:
            return 0.0
        largest = max(abs(a - b) for a, b in zip(self.values, other.values, strict=True))
        return max(largest, float(np.finfo(np.float32).tiny))


def probe_ids(vocab_size: int) -> torch.Tensor:
    """The fixed probe: int64 [1, 16]."""
    return (torch.arange(PROBE_TOKENS) * 7919 % vocab_size).unsqueeze(0)


@torch.no_grad()
def logit_fingerprint(engine: "Engine", vocab_size: int) -> Fingerprint:
    """The fingerprint of the engine's weights as they are now. A collective."""
    training = engine.training
    engine.eval()
    logits = engine(input_ids=probe_ids(vocab_size).to(engine.device)).logits.float().cpu().contiguous()
    engine.train(training)
    digest = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
    return Fingerprint(sha256=digest, values=logits[0, -1, :VALUES].tolist())
