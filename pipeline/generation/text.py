"""Tokens become text one by one, and a text ends in front of a stop string."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Any

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TextStream:
    """The text of tokens as they come: a character of several byte tokens comes with the last of them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; a special token has none."""
        return self._decoder.decode(self._bytes(token_id))

    def end(self) -> str:
        """What stands for a character that was begun and never completed."""
        return self._decoder.decode(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        found = BYTE_TOKEN.fullmatch(self.tokenizer.convert_ids_to_tokens(token_id) or "")
        if found:
            return bytes.fromhex(found[1])
        text: str = self.tokenizer.decode([token_id], skip_special_tokens=True)
        return text.encode()


class StopStrings:
    """Holds text back as long as it may be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What may be shown now, and whether a stop string was found behind it."""
        self._held += text
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            return self._show(min(places)), True
        return self._show(len(self._held) - self._beginning()), False

    def end(self) -> str:
        """What was held back, now that nothing follows."""
        return self._show(len(self._held))

    def _beginning(self) -> int:
        """Characters at the end that a stop string begins with."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(self._held))
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0

    def _show(self, characters: int) -> str:
        shown, self._held = self._held[:characters], self._held[characters:]
        return shown
