"""How far a tokenizer's training is: a line on standard error every ten seconds, with the time left.

`python -m data_prep.tokenizers.training_progress SETTINGS` hears what sentencepiece writes while it trains: there,
sentencepiece holds the interpreter.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TextIO

from data_prep.tokenizers.tokenizer import TokenizerSettings

LINE_SECONDS = 10.0
NOT_MERGED = 260  # the pieces of a vocabulary that BPE does not make: bytes and special ones


class Pace:
    """Says how far something is, and when it will be done at this pace."""

    def __init__(self, what: str, out: TextIO, line_seconds: float = LINE_SECONDS) -> None:
        self._what, self._out, self._line_seconds = what, out, line_seconds
        self._began = self._said = time.monotonic()

    def __call__(self, words: str, share: float | None) -> None:
        """`share` of it is done, from 0 to 1; None where nobody knows."""
        now = time.monotonic()
        if now - self._said < self._line_seconds:
            return
        self._said, seconds = now, now - self._began
        left = f", {100 * share:.0f} %, {seconds / share * (1 - share):,.0f} s left" if share else ""
        print(f"{self._what}: {words}{left}", file=self._out, flush=True)


class SentencepieceLog:
    """Reads sentencepiece's log: `share` is how much of the training is done."""

    OWN = re.compile(r"[IW]\d{4} .*\.cc:\d+\] |WARNING: All log messages before absl::")
    SETTINGS = "trainer_spec {", "denormalizer_spec {"  # between these it lists its settings
    MERGES = re.compile(r" merges=(\d+)")
    SEED = re.compile(r"Initialized (\d+) seed pieces")
    SIZE = re.compile(r"EM sub_iter=\d+ size=(\d+)")

    def __init__(self, settings: TokenizerSettings) -> None:
        self._vocab_size = settings.vocab_size
        self._seed_pieces = 0
        self._in_settings = False
        self.share = 0.0
        self.words = "counting"

    def hear(self, line: str) -> bool:
        """Whether the line is sentencepiece's; another one is an error of somebody's."""
        own = bool(self.OWN.match(line))
        begin, end = map(line.startswith, self.SETTINGS)
        self._in_settings = begin or (self._in_settings and not own)
        own, self._in_settings = own or self._in_settings, self._in_settings and not end
        if merges := self.MERGES.search(line):  # BPE makes one piece with each
            self.share = int(merges[1]) / max(self._vocab_size - NOT_MERGED, 1)
            self.words = f"{int(merges[1]):,} of about {self._vocab_size - NOT_MERGED:,} merges"
        elif seed := self.SEED.search(line):
            self._seed_pieces = int(seed[1])
        elif (size := self.SIZE.search(line)) and self._seed_pieces > 1.1 * self._vocab_size:
            # Unigram keeps three quarters of the pieces in each round, down to 1.1 times the vocabulary.
            rounds = math.log(self._seed_pieces / int(size[1])), math.log(self._seed_pieces / (1.1 * self._vocab_size))
            self.share = max(0.0, rounds[0] / rounds[1])
            self.words = f"{int(size[1]):,} pieces, on the way to {self._vocab_size:,}"
        self.share = min(self.share, 0.99)
        return own


@contextmanager
def heard(settings: TokenizerSettings) -> Iterator[TextIO]:
    """What native code writes to standard error inside is heard by a process, which says how far the training is, and
    passes on what is not sentencepiece's log.

    Yields the standard error that was there before.
    """
    before = os.dup(2)
    command = [sys.executable, "-m", "data_prep.tokenizers.training_progress", json.dumps(asdict(settings))]
    listener = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=before)
    assert listener.stdin
    os.dup2(listener.stdin.fileno(), 2)
    listener.stdin.close()
    try:
        with os.fdopen(os.dup(before), "w") as out:
            yield out
    finally:
        os.dup2(before, 2)
        os.close(before)
        listener.wait()


def main(settings: TokenizerSettings) -> None:
    log, pace = SentencepieceLog(settings), Pace("training", sys.stderr)
    for line in io.TextIOWrapper(sys.stdin.buffer, "utf-8", "replace"):
        if not log.hear(line):
            print(line, end="", file=sys.stderr, flush=True)
        if log.share:  # while it reads, the reader says how far it is
            pace(log.words, log.share)


if __name__ == "__main__":
    main(TokenizerSettings(**json.loads(sys.argv[1])))
