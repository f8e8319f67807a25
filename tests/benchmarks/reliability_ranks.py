"""One rank of the benchmarks `reliability` and `tracking`: `… -m tests.benchmarks.reliability_ranks FOLDER WHAT`."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from launch.preflight.estimate import Machine, estimate
from pipeline.build import build
from pipeline.checkpoints import folder as checkpoint
from pipeline.checkpoints import write as checkpoint_io
from pipeline.checkpoints.saver import Saved
from pipeline.checkpoints.space import copy_bytes
from pipeline.config import RunConfig, load_config
from pipeline.distributed.clock import Clock
from pipeline.distributed.stop import StopRequest
from pipeline.distributed.watchdog import Watch
from pipeline.distributed.world import World, shutdown, start
from pipeline.tracking.journal import Journal
from pipeline.tracking.node import NodeMonitor
from pipeline.tracking.tracker import LocalTracker, NullTracker
from pipeline.trainer import Trainer
from tests.benchmarks.disk import forget, read
from tests.benchmarks.turns import over, spread
from tests.launch.memory_ranks import peak_of_training
from tests.launch.small_model import MODEL
from tests.pipeline.ranks import Run, tiny_overrides

TURNS = 3
SPEED_STEPS = 10
TRACKING_PAIRS = 20
LARGE = [
    "model.hidden_size=512",
    "model.num_hidden_layers=8",
    "model.pool_size=1024",
    "model.pool_dim=128",
    "model.router_hidden_size=128",
]
EIGHT_GIGABYTES = [
    *("model.hidden_size=2112", "model.num_hidden_layers=6", "model.pool_size=1024"),
    *("model.pool_dim=512", "model.router_hidden_size=512"),
    *("training.precision=bf16", "training.global_batch_size=1", "training.micro_batch_size=1"),
]
"""With AdamW 14 bytes per parameter in a checkpoint."""
USUAL = [
    *LARGE[:1],
    "model.num_hidden_layers=4",
    *LARGE[2:],
    "model.dropout=0",
    "data.sequence_length=256",
    "training.log_interval_steps=10",
]


def main(folder: Path, what: str) -> None:
    world, stop = start(), StopRequest()
    if what == "tracking":
        figures = tracking(folder, world, stop)
    elif what.startswith("large"):
        figures = large(folder, world, stop, int(what.removeprefix("large")))
    else:
        figures = costs(folder, world, stop) if what == "costs" else memory(folder, world)
    if world.is_main:
        (folder / f"{what}.json").write_text(json.dumps(figures))
    shutdown()


def settings(folder: Path, name: str, *overrides: str) -> RunConfig:
    rare = [f"{key}=1000000" for key in ("training.max_steps", "checkpoint.interval_steps")]
    run = Run(name, [*rare, "evaluation.split=null", *overrides])
    config = load_config("launch/runs/quickstart.yaml", tiny_overrides(run, folder, folder / "data"))
    config.run_folder.mkdir(parents=True, exist_ok=True)
    (config.run_folder / "logs").mkdir(exist_ok=True)
    return config


def costs(folder: Path, world: World, stop: StopRequest) -> dict[str, Any]:
    zero = "deepspeed.config=ds_configs/zero1.json"
    trainer = build(settings(folder, "saving", zero, *LARGE, "tracking.enabled=false"), world, stop, Clock())
    trainer.train_step()
    figures = blocked(trainer, folder / "plain") | save_bandwidth(trainer) | load_bandwidth(trainer)
    trainer.batches.close()
    shutil.rmtree(folder / "saving", ignore_errors=True)
    return figures | speed(folder, world, stop)


def blocked(trainer: Trainer, plain: Path) -> dict[str, Any]:
    """Seconds that the training thread gives to a background save, its polls included, over a plain save."""
    times: dict[str, list[float]] = {"plain": [], "background": []}
    for turn in range(TURNS + 1):
        times["plain"].append(timed(trainer.context.world, lambda turn=turn: plain_save(trainer, plain / str(turn))))
        shutil.rmtree(plain, ignore_errors=True)
        seconds, ended = timed(trainer.context.world, trainer.save), []
        while not ended:
            trainer.train_step()
            begin = time.perf_counter()
            ended = trainer.saver.poll()
            seconds += time.perf_counter() - begin
        assert not ended[0].problems, ended
        times["background"].append(seconds)
    cold, warm, plain_seconds = times["background"][0], times["background"][1:], times["plain"][1:]
    best = min(plain_seconds)
    return {
        "checkpoint_megabytes": ended[0].size_bytes / 1e6,
        "plain_save_seconds": best,
        "blocked_by_a_background_save_over_a_plain_save": over(plain_seconds, warm),
        "blocked_by_turns": spread(plain_seconds, warm),
        "the_first_one_which_makes_the_buffers": cold / best,
    }


def timed(world: World, work: Callable[[], Any]) -> float:
    """Seconds of the slowest rank."""
    world.barrier()
    begin = time.perf_counter()
    work()
    return world.agree({"seconds": time.perf_counter() - begin})["seconds"]


def plain_save(trainer: Trainer, folder: Path) -> None:
    """As DeepSpeed does it by itself: no hashes, no fsync."""
    engine: Any = trainer.engine  # DeepSpeed's own, with what it keeps private
    ours, engine.checkpoint_engine = engine.checkpoint_engine, TorchCheckpointEngine(engine._config)
    engine.save_checkpoint(str(folder), tag="step")
    engine.checkpoint_engine = ours


def saved(trainer: Trainer) -> Saved:
    trainer.step += 1
    trainer.save()
    (ended,) = trainer.saver.finish()
    assert not ended.problems, ended
    return ended


def save_bandwidth(trainer: Trainer) -> dict[str, Any]:
    """Writing, hashing, fsyncing and committing over writing and fsyncing the same bytes, each rank its own."""
    engine, world, root = trainer.engine, trainer.context.world, trainer.saver.root
    files, _ = checkpoint_io.collect(engine, trainer.saver.deferring, root / ".saving-measure", "measure", world.rank)
    checkpoint_io.write_files(root, files)
    contents = [bytes((root / name).read_bytes()) for name in files]
    ours, plain = [], []
    for _ in range(TURNS):
        plain.append(timed(world, lambda: [write(root / f"plain-{world.rank}-{i}", c) for i, c in enumerate(contents)]))
        ours.append(saved(trainer).seconds)
    total = sum(map(len, contents))
    by_rank = world.gather(total)
    return {
        "plain_write_megabytes_per_second": sum(by_rank) / min(plain) / 1e6,
        "save_bandwidth_over_plain_write_and_fsync": over(ours, plain),
        "save_bandwidth_by_turns": spread(ours, plain),
    }


def write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def load_bandwidth(trainer: Trainer) -> dict[str, Any]:
    """Verifying and loading over reading the same files, all from the disk, the ranks sharing the reading."""
    world, folder = trainer.context.world, saved(trainer).folder
    names = sorted(checkpoint.read_listing(folder)[0])
    plain, ours = [], []
    for _ in range(TURNS):
        forget(folder)
        plain.append(timed(world, lambda: [read(folder / name) for name in names[world.rank :: world.size]]))
        forget(folder)
        ours.append(timed(world, lambda: verified_load(trainer, folder)))
    total = sum((folder / name).stat().st_size for name in names)
    return {
        "plain_read_megabytes_per_second": total / min(plain) / 1e6,
        "verified_load_bandwidth_over_plain_read": over(ours, plain),
        "verified_load_bandwidth_by_turns": spread(ours, plain),
    }


def verified_load(trainer: Trainer, folder: Path) -> None:
    assert checkpoint.verify_together(folder, trainer.context.world) == []
    checkpoint_io.load(trainer.engine, folder, trainer.context.world)


class Enough(Exception):
    pass


def speed(folder: Path, world: World, stop: StopRequest) -> dict[str, Any]:
    """Tokens per second of the whole trainer (loader, MLflow, watch, checks) over forward, backward, step."""
    config, clock = settings(folder, "speed", "deepspeed.config=ds_configs/zero1.json", *USUAL), Clock()
    ours, bare = [], []
    with Watch(world, clock, config.run_folder, config.training.hang_timeout_seconds):
        trainer = build(config, world, stop, clock)
        loader, batch = trainer.batches, torch.from_numpy(next(trainer.batches))
        for _ in range(TURNS):
            bare.append(timed(world, lambda: bare_loop(trainer, batch)))
            trainer.batches = some(loader, SPEED_STEPS * trainer.context.layout.gradient_accumulation_steps)
            ours.append(timed(world, lambda: whole_trainer(trainer)))
        loader.close()
        trainer.tracker.close("FINISHED")
    ratios = [b / o for b, o in zip(bare, ours, strict=True)]
    return {
        "bare_tokens_per_second": SPEED_STEPS * trainer.context.tokens_per_step / min(bare),
        "tokens_per_second_over_a_bare_deepspeed_loop": over(ours, bare),
        "tokens_per_second_by_turns": spread(ours, bare),
        "the_same_turn_by_turn_median": median(ratios),
    }


def large(folder: Path, world: World, stop: StopRequest, stage: int) -> dict[str, Any]:
    """Steps while 8 GB are written in the background, and the memory that the copy takes, under a stage of ZeRO."""
    name, zero = f"large{stage}", f"deepspeed.config=ds_configs/zero{stage}.json"
    config = settings(folder, name, zero, *EIGHT_GIGABYTES, "tracking.enabled=false")
    trainer = build(config, world, stop, Clock())
    context = trainer.context
    forecast = copy_bytes(context.model, config.optimizer.name, stage, context.precision, world.size)
    trainer.train_step()
    saved(trainer)  # makes the buffers
    alone = [timed(world, trainer.train_step) for _ in range(TURNS)]
    copying = timed(world, trainer.save)
    beside, ended = [], []
    while not ended:
        beside.append(timed(world, trainer.train_step))
        ended = trainer.saver.poll()
    assert not ended[0].problems, ended
    trainer.batches.close()
    shutil.rmtree(config.run_folder)
    copied = sum(buffer.nbytes for buffer in trainer.saver.deferring.buffers._buffers)
    return {
        "checkpoint_gigabytes": ended[0].size_bytes / 1e9,
        "host_memory_of_the_copy_over_the_forecast": copied / forecast,
        "seconds_of_the_copy": copying,
        "seconds_of_a_step": median(alone),
        "seconds_of_the_first_step_beside_the_save": beside[0],
        "what_it_takes_longer_over_the_copy": (beside[0] - median(alone)) / copying,
        "gigabytes_per_second": ended[0].size_bytes / ended[0].seconds / 1e9,
    }


def tracking(folder: Path, world: World, stop: StopRequest) -> dict[str, Any]:
    """With MLflow (a store in SQLite), its thread and the node's meters, over the record in the run folder alone."""
    overrides = [f"run.output_dir={folder / 'tracked'}", f"data.dataset={folder / 'data'}", "evaluation.split=null"]
    overrides += ["evaluation.prompts=[]", f"tracking.uri=sqlite:///{folder}/mlflow.db"]
    overrides += ["training.max_steps=1000000", "checkpoint.interval_steps=1000000"]
    config, clock = load_config("launch/runs/quickstart.yaml", overrides), Clock()
    (config.run_folder / "logs").mkdir(parents=True, exist_ok=True)
    with Watch(world, clock, config.run_folder, config.training.hang_timeout_seconds):
        trainer = build(config, world, stop, clock)
        loader, tracker = trainer.batches, trainer.tracker
        record = LocalTracker(Journal(folder, trainer.context.tokens_after)) if world.is_main else NullTracker()
        contenders = {True: (tracker, trainer.meters.node), False: (record, NodeMonitor(False))}
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for pair in range(TRACKING_PAIRS + 1):
            for tracked in (True, False) if pair % 2 else (False, True):
                trainer.meters.tracker, trainer.meters.node = contenders[tracked]
                trainer.batches = some(loader, SPEED_STEPS * trainer.context.layout.gradient_accumulation_steps)
                seconds[tracked].append(timed(world, lambda: whole_trainer(trainer)))
        loader.close()
        tracker.close("FINISHED")
    ratios = sorted(off / on for on, off in zip(seconds[True][1:], seconds[False][1:], strict=True))
    return {
        "steps_per_second_without": SPEED_STEPS / median(seconds[False][1:]),
        "steps_per_second_with_tracking_over_without": median(ratios),
        "the_middle_half_of_the_pairs": f"{ratios[len(ratios) // 4]:.3f} to {ratios[-1 - len(ratios) // 4]:.3f}",
    }


def bare_loop(trainer: Trainer, tokens: torch.Tensor) -> None:
    for _ in range(SPEED_STEPS * trainer.context.layout.gradient_accumulation_steps):
        output = trainer.engine(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:])
        trainer.engine.backward(output.loss)
        trainer.engine.step()


def some(loader: Iterator[Any], count: int) -> Any:
    for _ in range(count):
        yield next(loader)
    raise Enough


def whole_trainer(trainer: Trainer) -> None:
    with suppress(Enough):
        trainer.train()


def memory(folder: Path, world: World) -> dict[str, float]:
    """Most bytes of tensors that a rank holds in a training step over the forecast, by stage (as in test_memory.py)."""
    found = {}
    for stage in range(4):
        zero = {"stage": stage, "reduce_bucket_size": 300_000, "allgather_bucket_size": 300_000}
        if stage == 3:
            zero |= {"stage3_prefetch_bucket_size": 100_000, "stage3_param_persistence_threshold": 1_000}
        path = folder / f"zero{stage}.json"
        if world.is_main:
            path.write_text(json.dumps({"zero_optimization": zero}))
        world.barrier()
        overrides = [*MODEL, f"deepspeed.config={path}"]
        peak = peak_of_training(overrides, world)
        config = load_config("launch/runs/quickstart.yaml", overrides)
        forecast = estimate(config, Machine(ranks=world.size)).memory[stage].total
        found[f"stage {stage}"] = peak / forecast
    return found


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(Path(sys.argv[1]), sys.argv[2])
