"""Trained runs that several modules look at."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.manifest import read_manifest
from tests.conftest import ROOT
from tests.pipeline.ranks import Run, run_ranks
from tests.variants import some_of

STAGES = (0, 1, 2, 3)
TRACKED = ("unbroken-2", "resumed-2", "unbroken-3", "resumed-3", "unbroken-growing")
"""Runs whose figures MLflow is given too, which takes a third of rank 0's time."""
GROWING = some_of([3], [0, 1])  # stage 0, in bf16: test_health_ranks.py
SECTIONS: dict[str, dict[str, bool]] = {
    "deepspeed.partitioned": {"partition_activations": True},
    "deepspeed.offloaded": {"partition_activations": True, "cpu_checkpointing": True},
}
"""DeepSpeed's own section for activation checkpointing; empty for other policies."""
# Under ZeRO-3. What is offloaded is partitioned too.
POLICIES = some_of(["full", "every-2", "selective", "deepspeed", "deepspeed.offloaded"], ["deepspeed.partitioned"])


def write_engine(path: Path, activation_checkpointing: dict[str, bool]) -> Path:
    """ds_configs/zero3.json with that section."""
    settings = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    path.write_text(json.dumps(settings | {"activation_checkpointing": activation_checkpointing}))
    return path


def special_configs(folder: Path) -> dict[str, Path]:
    """The shipped files that two ranks on a CPU can train with, beside zero0 … zero3, fitted to this machine."""
    shipped = Path("ds_configs")
    hpz = json.loads((shipped / "zero3_hpz.json").read_text())
    hpz["zero_optimization"]["zero_hpz_partition_size"] = 2
    (folder / "hpz.json").write_text(json.dumps(hpz))
    return {"offload": shipped / "zero3_offload.json", "hpz": folder / "hpz.json"}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a folder for every run of `runs`, and mlflow.db."""
    return tmp_path_factory.mktemp("trained")


def copy_with_another_id(dataset: Path, folder: Path) -> Path:
    shutil.copytree(dataset, folder)
    manifest = read_manifest(folder)
    filters = {**manifest.filters, "drop_duplicates": not manifest.filters["drop_duplicates"]}
    (folder / "manifest.json").write_bytes(manifest.model_copy(update={"filters": filters}).to_json())
    return folder


@pytest.fixture(scope="session")
def runs(trained: Path, small_dataset: Path) -> dict[str, dict[str, Any]]:
    """Six steps on two ranks: for each stage an unbroken run and one resumed at step 3, and others."""
    plan = []
    for stage in STAGES:
        engine = [f"deepspeed.config=ds_configs/zero{stage}.json"]
        plan += [
            Run(f"unbroken-{stage}", engine),
            Run(f"resumed-{stage}", engine, copy_checkpoint=f"unbroken-{stage}/step-00000003"),
        ]
    damaged = trained / "damaged-data"
    shutil.copytree(small_dataset, damaged)
    shard = bytearray((damaged / "train-000000.tar").read_bytes())
    shard[len(shard) // 2] ^= 1
    (damaged / "train-000000.tar").write_bytes(bytes(shard))
    other = copy_with_another_id(small_dataset, trained / "other-data")
    bf16 = ["training.precision=bf16"]
    stages = ", ".join(f"{{steps: {steps}, global_batch_size: {size}}}" for steps, size in ((1, 4), (1, 8), (2, 12)))
    growing = [f"training.batch_size_warmup=[{stages}]", "training.global_batch_size=16"]
    muon = ["optimizer.name=muon", "deepspeed.config=ds_configs/zero3.json"]
    for policy in POLICIES:
        recomputing = write_engine(trained / f"{policy}.json", SECTIONS.get(policy, {}))
        settings = [f"deepspeed.config={recomputing}", f"model.activation_checkpointing={policy.partition('.')[0]}"]
        plan.append(Run(f"recomputed-{policy}", [*settings, "training.max_steps=2", "evaluation.split=null"]))
    # With every row chosen, no rounding error chooses another one: sums in another order stay comparable.
    comparable = ["model.dropout=0", "model.router_top_k=64", "checkpoint.interval_steps=6"]
    plan += [
        Run("unbroken-bf16", bf16),
        Run("resumed-bf16", bf16, copy_checkpoint="unbroken-bf16/step-00000003"),
        Run("unbroken-muon", muon),
        Run("resumed-muon", muon, copy_checkpoint="unbroken-muon/step-00000003"),
        *(Run(f"growing-{stage}", [*growing, f"deepspeed.config=ds_configs/zero{stage}.json"]) for stage in GROWING),
        Run("unbroken-growing", growing),
        Run("resumed-growing", growing, copy_checkpoint="unbroken-growing/step-00000003"),
        Run("whole-batch", ["training.micro_batch_size=4", *comparable]),
        Run("accumulated", ["training.micro_batch_size=1", *comparable]),
        Run("damaged", [f"data.dataset={damaged}"]),
        Run("indivisible", ["training.micro_batch_size=3"]),
        Run("wrong-dataset", [f"data.dataset={other}"], copy_checkpoint="unbroken-2/step-00000003"),
        Run("wrong-model", ["model.hidden_size=64"], copy_checkpoint="unbroken-2/step-00000003"),
        Run("wrong-width", ["optimizer.base_hidden_size=16"], copy_checkpoint="unbroken-2/step-00000003"),
        Run("wrong-optimizer", ["optimizer.name=muon"], copy_checkpoint="unbroken-2/step-00000003"),
        Run("new-rate", ["optimizer.learning_rate=1.0e-4"], copy_checkpoint="unbroken-2/step-00000003"),
        Run("tied", ["model.tie_word_embeddings=true", "tracking.routers_per_layer=true"]),
    ]
    # Two steps are warm-up, so that up to the third loss a run is as any longer one.
    short = ["training.max_steps=3", "evaluation.split=null"]
    plan += [Run(name, [f"deepspeed.config={path}", *short]) for name, path in special_configs(trained).items()]
    untracked = ["tracking.enabled=false"]
    plan = [run if run.name in TRACKED else replace(run, overrides=[*run.overrides, *untracked]) for run in plan]
    return {result["name"]: result for result in run_ranks(plan, trained, small_dataset)}
