"""Wrong settings, made from the types themselves: each field of a run file, of the model and of DeepSpeed's JSON.

Every field gets a value of every wrong kind (`VALUES`), and pairs are set against each other (`PAIRS`). What counts as
right is decided by rule (`verdict`): a setting is refused with one line a problem that names the key, the value and
what it should be, or it is taken as it was given, and DeepSpeed's own parser reads it.
"""

import json
import math
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUGE = 10**30
VALUES: dict[str, Any] = {
    "null": None,
    "NaN": math.nan,
    "inf": math.inf,
    "minus inf": -math.inf,
    "negative": -1,
    "a negative fraction": -0.5,
    "zero": 0,
    "a fraction": 2.5,
    "huge": HUGE,
    "a huge fraction": 1e300,
    "true": True,
    "text": "yes please",
    "empty text": "",
    "long text": "x" * 100_000,
    "a list": [1, "a", None],
    "an empty list": [],
    "a mapping": {"a": {"b": 1}},
}
REMEDY = re.compile(
    r"\b(must|should|known|nearest|valid|set|remove|give|take|choose|write|name|leave|lower|raise|is required|need|one of)\b"
)
LONGEST_LINE = 700
"""Characters; a list of all known settings is the longest."""
