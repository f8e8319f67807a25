"""The program that `deepspeed` starts, once per rank: has the parts built and runs them.

    deepspeed pipeline/train.py --config launch/runs/quickstart.yaml training.max_steps=100

Exit codes: 0 done; 2 something to fix, said in plain lines; 75 asked to stop, left in order, start me again;
76 a rank hung, start me again; 1 anything else, said in one line; its traceback is in the rank's log.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # started as a file: `pipeline/` must not shadow other people's module names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging
import os
import platform
import re
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from pipeline.distributed.stop import Stopped, StopRequest

EARLY = StopRequest() if __name__ == "__main__" else None
"""What follows takes seconds to import, and a signal in these is a wish to stop like any other."""

import pipeline.engine.lean_import  # noqa: F401  # before all that imports DeepSpeed
from data_prep.errors import UserError
from pipeline.build import build, checked
from pipeline.checkpoints.folder import JOB_VARIABLE, lock
from pipeline.config import RunConfig, read_config
from pipeline.distributed.clock import Clock
from pipeline.distributed.turn import take_turn
from pipeline.distributed.watchdog import Watch
from pipeline.distributed.world import SharedUserError, World, outlast, shutdown, start
from pipeline.exit_codes import PREEMPTED

log = logging.getLogger("globallocal")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="run file, for example launch/runs/quickstart.yaml")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    stop = EARLY or StopRequest()
    clock = take_turn()
    with stop.meeting():
        world = start()
    clock.end_part("ranks meet")
    try:
        with world.together():
            config = checked(read_config(options.config, options.overrides), world)
            with writable(config.run_folder):
                config.run_folder.mkdir(parents=True, exist_ok=True)
                open_log(config.run_folder, world.rank)
        return run(config, world, stop, clock)
    except Stopped:
        stop.leave()
    except UserError as error:
        if world.is_main or not isinstance(error, SharedUserError):
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception as error:
        log.critical(last_words(error, world.rank), exc_info=True)
        return 1
    finally:
        shutdown()


LOST_RANK = re.compile(r"connection (reset|closed|refused)|broken pipe|socket (is not connected|closed)", re.I | re.A)
SOURCE_LINE = re.compile(r"\[\S+:\d+\] ")
"""What gloo puts before its words; behind them it wishes good luck."""


def last_words(error: Exception, rank: int) -> str:
    """One line that the launcher takes as the cause of a restart: rank, host, phase, what."""
    phase = getattr(error, "phase", "start")
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if LOST_RANK.search(said):
        said = f"another rank has gone: {SOURCE_LINE.sub('', said).partition('. ')[0]}"
    return f"globallocal: rank {rank} on {platform.node()} failed in {phase}: {said}"


def run(config: RunConfig, world: World, stop: StopRequest, clock: Clock) -> int:
    """Build, train, and say truthfully how it ended."""
    with world.together(), writable(config.run_folder):
        held = lock(config.run_folder) if world.is_main else None
    training = config.training
    stop.listen([signal.Signals[name] for name in training.stop_signals], training.max_seconds)
    with Watch(world, clock, config.run_folder, training.hang_timeout_seconds) as watch:
        trainer = build(config, world, stop, clock)
        outlast(watch.longest_seconds)
        watch.tracker = trainer.tracker
        status = "FAILED"
        try:
            if trainer.is_complete:
                steps = trainer.context.steps
                log.info(f"nothing to do: step {trainer.step:,} of {steps:,} is already saved")
            finished = trainer.train()
            status = "FINISHED" if finished else "KILLED"
            if not finished:
                trainer.tracker.set_tags({"globallocal.status": "preempted"})
            return 0 if finished else PREEMPTED
        finally:
            trainer.profiler.close()
            trainer.saver.close()
            watch.close()  # what follows has bounds of its own
            trainer.batches.close()
            if not trainer.tracker.close(status, closing_seconds(status)):
                log.warning("MLflow did not take everything in time; the rest is delivered at the next start")
            if held:
                held.close()


def closing_seconds(status: str) -> float:
    """Time that MLflow gets at the end: little after a failure, where our launcher sees to it that the rest arrives."""
    return 2.0 if status == "FAILED" and JOB_VARIABLE in os.environ else 20.0


@contextmanager
def writable(run_folder: Path) -> Iterator[None]:
    """An OSError inside becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or run_folder}: {error.strerror}; choose a run.output_dir that you may write, with room"
        ) from None


class TerminalFormatter(logging.Formatter):
    """A line as it is; a warning or error says so at its beginning. Tracebacks stay in the rank's log."""

    def __init__(self, log_file: Path) -> None:
        super().__init__()
        self.log_file = log_file

    def format(self, record: logging.LogRecord) -> str:
        line = record.getMessage()
        if record.exc_info:
            line += f" (traceback: {self.log_file})"
        return line if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {line}"


def open_log(run_folder: Path, rank: int) -> None:
    """Every rank writes its own file, with times; rank 0 speaks on the terminal, the others when they fail."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    folder = run_folder / "logs"
    folder.mkdir(exist_ok=True)
    log_file = folder / f"rank-{rank:05d}.log"
    to_file = logging.FileHandler(log_file)
    where = f"{platform.node()} rank {rank}"
    to_file.setFormatter(logging.Formatter(f"%(asctime)s {where} %(levelname)s %(message)s"))
    to_terminal = logging.StreamHandler(sys.stdout)
    to_terminal.setFormatter(TerminalFormatter(log_file))
    to_terminal.setLevel(logging.INFO if rank == 0 else logging.CRITICAL)
    log.handlers = [to_file, to_terminal]
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.raiseExceptions = False  # where the disk is full, lines miss in the file; no traceback for each


def leave(code: int) -> NoReturn:
    """End this process now: to take down what was imported, piece by piece, would take two seconds."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
