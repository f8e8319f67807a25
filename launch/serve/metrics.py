"""Counters in Prometheus' text format, version 0.0.4."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

HELP = {
    "requests_total": ("counter", "Requests for completions, by status code."),
    "cancelled_total": ("counter", "Requests whose client left before the end."),
    "failures_total": ("counter", "Steps or prompts on which the model failed."),
    "prompt_tokens_total": ("counter", "Tokens of prompts that were accepted."),
    "generated_tokens_total": ("counter", "Tokens that were generated."),
    "steps_total": ("counter", "Steps of the batch; generated tokens per step tell how full it is."),
    "text_seconds": ("summary", "Seconds from the prompt to the end of a text, without waiting."),
    "waiting": ("gauge", "Texts that wait for room in the batch."),
    "decoding": ("gauge", "Texts in the batch."),
}
PREFIX = "globallocal_"


class Metrics:
    """What the server counts; threads may share it.

    Attributes:
        gauges: gives what is not counted but read at the time of asking.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter({name: 0 for name, (kind, _) in HELP.items() if kind == "counter"})
        del self._counts["requests_total"]
        self.gauges: Callable[[], dict[str, int]] = dict

    def add(self, name: str, amount: float = 1) -> None:
        """`name` may carry labels: `requests_total{code="200"}`."""
        with self._lock:
            self._counts[name] += amount  # type: ignore[assignment]

    def text(self) -> str:
        """What Prometheus scrapes."""
        with self._lock:
            values = {**self._counts, **self.gauges()}
        lines = []
        for name, (kind, said) in HELP.items():
            lines += [f"# HELP {PREFIX}{name} {said}", f"# TYPE {PREFIX}{name} {kind}"]
            parts = (name, f"{name}_sum", f"{name}_count") if kind == "summary" else (name,)
            own = [(key, value) for key, value in sorted(values.items()) if key.partition("{")[0] in parts]
            lines += [f"{PREFIX}{key} {value:g}" if value < 1e6 else f"{PREFIX}{key} {value:.0f}" for key, value in own]
        return "\n".join(lines) + "\n"
