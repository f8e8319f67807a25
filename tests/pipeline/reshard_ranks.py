"""Runs of one world size for the resharding tests: `python -m tests.pipeline.reshard_ranks FOLDER WORLD_SIZE`.

A run is named after its shape, for example `z2r4-bf16`: ZeRO stage 2 on four ranks in bf16. With an m for the z it has
Muon, and with a z its matrices learn at half the rate. A resumed one is named after both, `z1r2-to-z3r4`. Groups of
ranks of every size run at the same time, and wait for each other's checkpoints.
"""

import hashlib
import json
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.pipeline.ranks import TINY, outputs, start_ranks, wait

FIRST_STEPS, ALL_STEPS = 3, 13
ONE_FILE = "-file"
"""Behind a source: its checkpoint is put into one file first."""
LONG_SECONDS = 5400


def overrides(shape: str, name: str, folder: Path, dataset: Path) -> list[str]:
    stage, ranks, precision = parse(shape)
    return [
        *TINY,
        "model.dropout=0",
        "model.num_hidden_layers=1",
        f"training.micro_batch_size={8 // max(ranks, 2)}",  # one rank accumulates
        "model.tie_word_embeddings=true",
        f"training.max_steps={ALL_STEPS}",
        f"training.precision={precision}",
        "tracking.enabled=false",
        "checkpoint.background=false",
        f"run.name={name}",
        f"run.output_dir={folder / name}",
        f"data.dataset={dataset}",
        f"deepspeed.config=ds_configs/zero{stage}.json",
        "optimizer.name=muon" if has_muon(shape) else "optimizer.base_hidden_size=16",
    ]


def parse(shape: str) -> tuple[int, int, str]:
    """`z2r4-bf16` → stage 2, four ranks, bf16; fp32 where no precision is named."""
    sizes, _, precision = shape.partition("-")
    stage, ranks = sizes[1:].split("r")
    return int(stage), int(ranks), precision or "fp32"


def has_muon(shape: str) -> bool:
    return shape.startswith("m")


def run_pairs(pairs: list[tuple[str, str]], folder: Path, dataset: Path) -> None:
    """An unbroken run of every source in `pairs`, and for each pair a run that resumes the one as the other.

    Results, a JSON file per run in `folder`: see `measure`.
    """
    sources = sorted({source.removesuffix(ONE_FILE) for source, _ in pairs})
    runs = [(shape, None) for shape in sources] + [(target, source) for source, target in pairs]
    groups = []
    for ranks in sorted({parse(shape)[1] for shape, _ in runs}, reverse=True):
        home = folder / f"ranks-{ranks}"
        home.mkdir()
        plan = []
        for shape, source in runs:
            if parse(shape)[1] == ranks:
                name = f"{source}-to-{shape}" if source else shape
                plan.append({"name": name, "source": source, "overrides": overrides(shape, name, folder, dataset)})
        (home / "plan.json").write_text(json.dumps(plan))
        started = start_ranks(["-m", "tests.pipeline.reshard_ranks", str(folder), str(ranks)], home, ranks)
        groups.append((started, home))
    try:
        for started, home in groups:
            assert set(wait(started, home, LONG_SECONDS)) == {0}, outputs(home)
    finally:
        for process in [process for started, _ in groups for process in started]:
            process.kill()


def measure(trainer: Any, steps: int) -> dict[str, list[Any]]:
    """Train; a value a step: mean loss, norm of the gradient, learning rates and decays of the groups, global batch."""
    found: dict[str, list[Any]] = {"loss": [], "gradient_norm": [], "groups": [], "batch": []}
    own: list[np.ndarray] = []
    batches = trainer.batches

    def watched() -> Any:
        for batch in batches:
            own.append(batch)
            yield batch

    trainer.batches = watched()
    for _ in range(steps):
        trainer.train_step()
        found["loss"].append(trainer.meters.losses.read()["loss/train"])
        found["gradient_norm"].append(float(trainer.engine.get_global_grad_norm()))
        groups = trainer.engine.optimizer.param_groups
        found["groups"].append([[group["name"], group["lr"], group["weight_decay"]] for group in groups])
        by_rank = trainer.context.world.gather(own)
        rows = [by_rank[rank][micro] for micro in range(len(own)) for rank in range(trainer.context.world.size)]
        found["batch"].append(hashlib.sha256(np.concatenate(rows).tobytes()).hexdigest())
        own.clear()
    trainer.batches = batches
    return found


def drawn(world: Any) -> list[float]:
    """The next random number of each rank."""
    import torch

    state = torch.get_rng_state()
    value = float(torch.rand(1))
    torch.set_rng_state(state)
    return world.gather(value)


def one_run(item: dict[str, Any], folder: Path, world: Any) -> dict[str, Any]:
    from pipeline.build import build
    from pipeline.checkpoints.consolidate import consolidate
    from pipeline.config import load_config
    from pipeline.distributed.clock import Clock
    from pipeline.distributed.stop import StopRequest
    from pipeline.train import open_log

    config = load_config("launch/runs/quickstart.yaml", item["overrides"])
    root = config.run_folder / "checkpoints"
    if item["source"] and world.is_main:
        name = item["source"].removesuffix(ONE_FILE)
        source = folder / name / "checkpoints" / f"step-{FIRST_STEPS:08d}"
        while not (source / "integrity.json").exists():
            time.sleep(0.1)
        if item["source"].endswith(ONE_FILE):
            consolidate(source, root, print)
        else:
            shutil.copytree(source, root / source.name)
    world.barrier()
    config.run_folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("globallocal").handlers.clear()  # each run has its own log
    open_log(config.run_folder, world.rank)
    trainer = build(config, world, StopRequest(), Clock())
    result: dict[str, Any] = {"random": drawn(world)}
    if trainer.step:  # what was restored, as a checkpoint of the new shape
        trainer.save()
        trainer.finish_saving()
        (root / f"step-{FIRST_STEPS:08d}").rename(config.run_folder / "restored") if world.is_main else None
        world.barrier()
    else:
        measure(trainer, FIRST_STEPS)
        trainer.save()
        trainer.finish_saving()
    result |= measure(trainer, ALL_STEPS - FIRST_STEPS)
    trainer.save()
    trainer.finish_saving()
    trainer.batches.close()
    return result


def main(folder: Path, processes: str) -> None:
    from pipeline.distributed.world import shutdown, start

    world = start()
    for item in json.loads((folder / f"ranks-{processes}" / "plan.json").read_text()):
        result = one_run(item, folder, world)
        if world.is_main:
            (folder / f"{item['name']}.json").write_text(json.dumps(result))
    shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
