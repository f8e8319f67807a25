"""Ctrl-C to a command that starts no job: within two seconds, one line that says what comes next, exit code 130."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

INTERRUPTED = 130
PATIENCE_SECONDS = 1.5
"""Python raises KeyboardInterrupt between two of its own steps; a step may be a long product in C."""
READING = "nothing was changed; the same command begins anew"
NEXT_TIME = {
    "export": "no folder was published; the same command begins anew",
    "checkpoints prune": "what is deleted stays deleted; the same command goes on with the rest",
    "checkpoints reshard": "no folder was published; the same command begins anew",
    "train": "nothing was started; the same command starts the run, or resumes it",
    "launch": "nothing was started; the same command starts the run, or resumes it",
}
OWN_WAY = ("tokenizer", "prepare", "train", "launch", "doctor", "serve")
"""These have processes of their own, or clients, to attend to first."""


def next_time(words: Sequence[str]) -> str:
    command = " ".join(words[: 2 if words[:1] == ["checkpoints"] else 1])
    return f"interrupted: {NEXT_TIME.get(command, READING)}"


@contextmanager
def bounded_interrupt(words: Sequence[str]) -> Iterator[None]:
    """Inside, SIGINT ends the process in time, whatever C code it is in."""
    if not words or words[0] in OWN_WAY or threading.current_thread() is not threading.main_thread():
        yield
        return
    ear, mouth = socket.socketpair()
    mouth.setblocking(False)
    before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_end_in_time, args=(ear, next_time(words)), name="interrupt", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        mouth.close()


def _end_in_time(ear: socket.socket, line: str) -> None:
    while number := ear.recv(1):
        if number[0] == signal.SIGINT:
            time.sleep(PATIENCE_SECONDS)
            import psutil

            for child in psutil.Process().children(recursive=True):
                child.kill()
            print(line, file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)
