"""What a server takes on, so that no client can take it all."""

from __future__ import annotations

from dataclasses import dataclass

MOST_SEQUENCES = 128
"""Of one request: prompts times `n`; never more than may wait."""
MOST_BODY_BYTES = 2**20
BODY_SECONDS = 30.0
"""In which a client must have sent its request."""
MOST_STOPS, LONGEST_STOP = 16, 256
MOST_LOGPROBS = 20
GRACE_SECONDS = 20
"""Of a shutdown: texts under way may end in that time."""


@dataclass(frozen=True)
class Limits:
    """What the person who starts the server decides.

    Attributes:
        max_batch: texts decoded at once.
        max_waiting: texts that may wait for room in the batch; further ones are told to come back.
    """

    max_batch: int = 16
    max_waiting: int = 64
    max_prompt_tokens: int = 4096
    max_new_tokens: int = 1024
