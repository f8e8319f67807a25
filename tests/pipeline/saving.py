"""Saves of a real engine on two ranks, in every trouble: `python -m tests.pipeline.saving FOLDER` is one rank."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tests.pipeline.ranks import Run, tiny_overrides

STAGES = (0, 1, 2, 3)
WRITES = {0: 5, 1: 2}
"""Files of a ZeRO-2 checkpoint by rank: model, optimizer, random state, state.json, integrity.json."""


def main(folder: Path) -> None:
    from data_prep.errors import UserError
    from pipeline.config import load_config
    from pipeline.distributed.clock import Clock
    from pipeline.distributed.stop import StopRequest
    from pipeline.distributed.world import shutdown, start
    from pipeline.train import open_log, run

    world, stop = start(), StopRequest()
    dataset = Path((folder / "dataset").read_text())
    results: dict[str, Any] = {}

    def settings(name: str, *overrides: str) -> Any:
        quiet = ["tracking.enabled=false", "evaluation.split=null", "checkpoint.keep_last=2"]
        return load_config(
            "launch/runs/quickstart.yaml", tiny_overrides(Run(name, [*quiet, *overrides]), folder, dataset)
        )

    def built(name: str, *overrides: str) -> Any:
        from pipeline.build import build
        from pipeline.distributed.clock import Clock

        config = settings(name, *overrides)
        with world.together():
            config.run_folder.mkdir(parents=True, exist_ok=True)
            open_log(config.run_folder, world.rank)
        return build(config, world, stop, Clock())

    for stage in STAGES:
        results[f"later-{stage}"] = save_and_go_on(
            built(f"later-{stage}", f"deepspeed.config=ds_configs/zero{stage}.json"), folder / f"plain-{stage}"
        )
    trainer = built("trouble", f"run.output_dir={folder}/trouble")
    results["overtaking"] = overtake(trainer)
    results["deleted"] = delete_underneath(trainer)
    if (folder / "mounted").exists():
        for rank, count in WRITES.items():
            for number in range(count):
                results[f"full-{rank}-{number}"] = full_disk(trainer, rank, number)
        results["read-only"] = read_only(trainer)
        results["no room"] = no_room(trainer)
        try:
            config = settings("tiny", f"run.output_dir={folder}/tiny")
            open_log(config.run_folder, world.rank)
            run(config, world, stop, Clock())
        except UserError as error:
            results["tiny"] = error.problems
    if world.is_main:
        (folder / "results.json").write_text(json.dumps(results))
    shutdown()


def save_and_go_on(trainer: Any, plain: Path) -> dict[str, Any]:
    """A save of step 2 whose writing begins two steps later; DeepSpeed's own save of step 2 beside it."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    trainer.train_step()
    trainer.train_step()
    with held_back(trainer):
        trainer.save()
        deferring, trainer.engine.checkpoint_engine = trainer.engine.checkpoint_engine, TorchCheckpointEngine()
        trainer.engine.save_checkpoint(str(plain), tag="step", save_latest=False)
        trainer.engine.checkpoint_engine = deferring
        trainer.train_step()
        trainer.train_step()
        early = trainer.saver.poll()
    return outcome(trainer) | {"ended_before_written": len(early)}


def overtake(trainer: Any) -> dict[str, Any]:
    trainer.train_step()
    with held_back(trainer, seconds=1):
        trainer.save()
        trainer.train_step()
        trainer.save()  # waits, and is then written as well
    return outcome(trainer)


def delete_underneath(trainer: Any) -> dict[str, Any]:
    root = trainer.saver.root
    trainer.train_step()
    with held_back(trainer):
        trainer.save()
        if trainer.context.world.is_main:
            for item in root.glob(".saving-*"):
                shutil.rmtree(item)
        trainer.context.world.barrier()
    return with_retry(trainer, outcome(trainer))


def full_disk(trainer: Any, rank: int, number: int) -> dict[str, Any]:
    """The disk is full from this rank's `number`-th write on."""
    from pipeline.checkpoints import write as checkpoint_io

    original, calls = checkpoint_io.write_durably, 0

    def write_durably(path: Path, write: Any) -> Any:
        nonlocal calls
        if trainer.context.world.rank == rank and calls == number:
            fill(trainer.saver.root)
        calls += 1
        return original(path, write)

    trainer.train_step()
    with mock.patch.object(checkpoint_io, "write_durably", write_durably):
        trainer.save()
        result = outcome(trainer)
    return with_retry(trainer, result)


def read_only(trainer: Any) -> dict[str, Any]:
    def remount(how: str) -> None:
        if trainer.context.world.is_main:
            subprocess.run(["mount", "-o", f"remount,{how}", str(trainer.saver.root)], check=True)
        trainer.context.world.barrier()

    trainer.train_step()
    remount("ro")
    trainer.save()
    result = outcome(trainer)
    remount("rw")
    return with_retry(trainer, result)


def no_room(trainer: Any) -> dict[str, Any]:
    trainer.train_step()
    if trainer.context.world.is_main:
        fill(trainer.saver.root)
    trainer.save()
    return with_retry(trainer, outcome(trainer))


def outcome(trainer: Any) -> dict[str, Any]:
    from pipeline.checkpoints.folder import list_checkpoints, newest_verified

    ended = trainer.saver.finish()
    newest, passed_over = newest_verified(list_checkpoints(trainer.saver.root), trainer.context.world)
    return {
        "step": trainer.step,
        "steps": [saved.step for saved in ended],
        "problems": [line for saved in ended for line in saved.problems],
        "newest": newest and newest.name,
        "passed_over": passed_over,
        "left": sorted(item.name for item in trainer.saver.root.glob(".*")),
    }


def with_retry(trainer: Any, result: dict[str, Any]) -> dict[str, Any]:
    """Training goes on, and the next save stands once there is room again."""
    trainer.context.world.barrier()
    if trainer.context.world.is_main:
        (trainer.saver.root / "ballast").unlink(missing_ok=True)
    trainer.context.world.barrier()
    trainer.train_step()
    trainer.save()
    return result | {"then": outcome(trainer)}


def fill(root: Path) -> None:
    assert shutil.disk_usage(root).total < 1 << 24, f"{root} is no small disk"
    with open(root / "ballast", "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


@contextmanager
def held_back(trainer: Any, seconds: float | None = None) -> Iterator[None]:
    """What is saved inside is written only at the end of it, or after some seconds."""
    gate = threading.Event()
    trainer.saver._thread.submit(gate.wait)
    if seconds is not None:
        threading.Timer(seconds, gate.set).start()
    yield
    gate.set()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(Path(sys.argv[1]))
