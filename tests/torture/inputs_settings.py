"""Wrong settings, made from the types themselves: each field of a run file, of the model and of DeepSpeed's JSON.

Every field gets a value of every wrong kind (`VALUES`), and settings are set against each other (`PAIRS`). What counts
as right is decided by rule (`fault_of`): a setting is refused with one line per problem that names the key, the value
and what it should be, or it is taken as it was given, and DeepSpeed's own parser reads what comes of it.
"""

import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from data_prep.errors import LONGEST_LINE, UserError
from pipeline.config import RunConfig, validate
from pipeline.engine.schema import Knobs
from pipeline.fitting import fit

VALUES: dict[str, Any] = {
    "null": None,
    "NaN": math.nan,
    "inf": math.inf,
    "minus inf": -math.inf,
    "negative": -1,
    "a negative fraction": -0.5,
    "zero": 0,
    "a fraction": 2.5,
    "huge": 10**30,
    "a huge fraction": 1e300,
    "true": True,
    "text": "yes please",
    "empty text": "",
    "long text": "x" * 10_000,
    "a list": [1, "a", None],
    "an empty list": [],
    "a mapping": {"a": {"b": 1}},
}
WORDS = """
must should known nearest valid set remove give take choose write name lower raise required need needs use see make
shows there
"""
REMEDY = re.compile(rf"\b({'|'.join(WORDS.split())})\b")
"""Every line says what the value should be, or what to do."""
LONGEST_SECONDS = 20.0
"""Of one setting: the first builds what is then kept, and the machine may be busy."""
RANKS = 2
ZERO = {
    "stage": 2,
    "reduce_bucket_size": 1000,
    "offload_optimizer": {"device": "none"},
    "offload_param": {"device": "none"},
}


@dataclass(frozen=True)
class Case:
    """Settings that differ from a good run: dotted keys of the run file, or of the JSON where they begin with `ds.`."""

    settings: tuple[tuple[str, Any], ...]
    kind: str
    must_be_refused: bool = False

    @property
    def keys(self) -> list[str]:
        return [key for key, _ in self.settings]


PAIRS: list[dict[str, Any]] = [
    {"training.max_steps": 10, "training.max_epochs": 1.0},
    {"training.max_steps": None, "training.max_epochs": None},
    {"training.max_steps": None, "training.max_epochs": 0.01, "optimizer.warmup_steps": 10**6},
    {"training.global_batch_size": 10, "training.micro_batch_size": 3},
    {"training.global_batch_size": 2, "training.micro_batch_size": 4},
    {"training.global_batch_size": 7, "training.micro_batch_size": 1},
    {"training.max_steps": 10, "optimizer.warmup_steps": 11},
    {"optimizer.learning_rate": 5.0, "optimizer.weight_decay": 5.0},
    {"checkpoint.keep_best": 2, "evaluation.split": None},
    {"evaluation.prompts": ["a"], "evaluation.split": None},
    {"health.spike_action": "roll_back", "health.spike_z_score": None},
    {"evaluation.split": "absent"},
    {"data.train_split": "absent"},
    {"data.sequence_length": 2**30},
    {"data.sequence_length": 256, "data.window_tokens": 8},
    {"data.dataset": "no/such/folder"},
    {"data.dataset": [{"dataset": "no/such/folder", "weight": 1}]},
    {"checkpoint.resume": "Auto"},
    {"checkpoint.resume": "runs/none/checkpoints/step-00000007"},
    {"training.stop_signals": ["SIGKILL"]},
    {"training.stop_signals": ["SIGINT"]},
    {"model.router_top_k": 65, "model.pool_size": 64},
    {"model.summary_heads": 5, "model.hidden_size": 64},
    {"model.router_scores": "product_key", "model.router_hidden_size": 9},
    {"model.router_scores": "product_key", "model.pool_size": 10_007},
    {"model.vocab_size": 100},
    {"model.eos_token_id": 10**6},
    {"model.pad_token_id": -1},
    {"model.hidden_size": 2**20, "model.num_hidden_layers": 10_000},
    {"training.micro_batch_size": 2**21, "training.global_batch_size": 2**22, "data.sequence_length": 10_000},
    {"ds.train_batch_size": 9},
    {"ds.train_micro_batch_size_per_gpu": 3},
    {"ds.gradient_accumulation_steps": 5},
    {"ds.gradient_clipping": 77.0},
    {"ds.optimizer": {"type": "Lamb"}},
    {"ds.optimizer": {"type": "AdamW", "params": {"lr": 1}}},
    {"ds.optimizer": {"type": "AdamW", "params": [1]}},
    {"ds.scheduler": {"type": "WarmupLR"}},
    {"ds.fp16": {"enabled": True}, "training.precision": "bf16"},
    {"ds.bf16": {"enabled": True}, "training.precision": "fp32"},
    {"ds.bf16": {"check_grad_overflow": False}},
    {"ds.zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
    {"ds.zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
    {"ds.zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
    {"ds.zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}},
    {"ds.zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
    {"ds.zero_optimization": {"stage": 2, "compute_grad_norm": False}},
    {"ds.zero_optimization": {"stage": "auto"}},
    {"ds.zero_optimization": {"stage": 2, "cpu_offload": True}},
    {"ds.compile": {"deepcompile": True}},
    {"ds.activation_checkpointing": {"contiguous_memory_optimization": True}},
    {"ds.amp": {"enabled": True}},
    {"ds.comms_loger": {"enabled": True}},
    {"ds.comms_logger": {"enabled": "yes please"}},
    {"ds.comms_logger": {"enabeld": True}},
    {"ds.flops_profiler": {"profile_steps": 3}},
    {"ds.timers": {"throughput": {"enable": True}}},
]
"""Settings that contradict each other, or what is there; each is refused."""


def cases() -> Iterator[Case]:
    for key in [*run_fields(), *deepspeed_fields()]:
        for kind, value in VALUES.items():
            yield Case(((key, value),), kind)
    for pair in PAIRS:
        yield Case(tuple(pair.items()), "a pair", must_be_refused=True)


def run_fields() -> Iterator[str]:
    """Every setting of a run file, those of the model included, and every section as a whole."""
    from model.configuration_globallocal import GlobalLocalConfig

    for section, field in RunConfig.model_fields.items():
        yield section
        yield from (f"{section}.{key}" for key in field.annotation.model_fields)
    yield from (f"model.{key}" for key in GlobalLocalConfig.__annotations__)


def deepspeed_fields() -> Iterator[str]:
    """Every knob of the JSON, in each of its sections."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    yield from (f"ds.{key}" for key in ("train_batch_size", "gradient_clipping", "optimizer", "scheduler"))
    yield from (f"ds.{name}" for name in _leaves(Knobs))
    yield "ds.zero_optimization"
    yield from (f"ds.zero_optimization.{name}" for name in _leaves(DeepSpeedZeroConfig))


def _leaves(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        key = prefix + (field.alias or name)
        yield key
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _leaves(kind, f"{key}.")


def settings_of(case: Case, dataset: Path, folder: Path) -> dict[str, Any]:
    """The run file of a case, as nested mappings; its JSON is written into `folder`."""
    run: dict[str, Any] = {
        "run": {"name": "case", "output_dir": str(folder / "run")},
        "model": {"hidden_size": 32, "pool_size": 64, "pool_dim": 32, "router_hidden_size": 32},
        "data": {"dataset": str(dataset), "sequence_length": 32},
        "training": {"max_steps": 6, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
        "tracking": {"enabled": False},
        "deepspeed": {"config": str(folder / "ds.json")},
    }
    knobs: dict[str, Any] = {"zero_optimization": json.loads(json.dumps(ZERO))}
    for key, value in case.settings:
        target, path = (knobs, key.removeprefix("ds.")) if key.startswith("ds.") else (run, key)
        *outer, last = path.split(".")
        for part in outer:
            target = target.setdefault(part, {})
        target[last] = value
    (folder / "ds.json").write_text(json.dumps(knobs))
    return run


def fault_of(case: Case, dataset: Path, folder: Path) -> str | None:
    """What breaks the rule, or None."""
    began = time.monotonic()
    values = settings_of(case, dataset, folder)
    before = set(folder.iterdir())
    try:
        config = validate(values, "case")
        fitted = fit(config, RANKS, "fp32" if config.training.precision == "auto" else config.training.precision, CPU)
    except UserError as error:
        return fault_of_lines(case, error.problems) or _left(before, folder, began)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    if case.must_be_refused:
        return "was taken"
    return fault_of_taken(case, config, fitted.deepspeed) or _left(before, folder, began)


CPU = torch.device("cpu")


def fault_of_lines(case: Case, lines: list[str]) -> str | None:
    told = "\n".join(lines)
    if case.kind != "a pair":  # of a pair the line may name either side
        for key, value in case.settings:
            name = key.removeprefix("ds.").rsplit(".", 1)[-1]
            if name not in told:
                return f"does not name {key}: {told[:300]}"
            if value in ("", None) or isinstance(value, Mapping | list):
                continue
            forms = [str(value), str(value).lower(), *([] if isinstance(value, str) else [f"{value:,}"])]
            if not any(form[:12] in told for form in forms):
                return f"does not name the value {value!r:.20}: {told[:300]}"
    for line in lines:
        if "\n" in line or not line.strip():
            return f"more than one line, or none: {line[:300]!r}"
        if len(line) > LONGEST_LINE:
            return f"a line of {len(line)} characters: {line[:300]}"
        if not REMEDY.search(line):
            return f"no bound and no remedy: {line[:300]}"
        if "Traceback" in line or " object at 0x" in line:
            return f"written for a programmer: {line[:300]}"
    return None


def fault_of_taken(case: Case, config: RunConfig, deepspeed: Mapping[str, Any]) -> str | None:
    """What is taken stands as it was given, and DeepSpeed's own parser reads the outcome."""
    dumped = config.model_dump(mode="json")
    for key, value in case.settings:
        if key.startswith("ds.") or isinstance(value, Mapping | list) or key in RunConfig.model_fields:
            continue
        section, name = key.split(".")
        stands = dumped[section].get(name)
        if stands != value or isinstance(stands, bool) != isinstance(value, bool):
            return f"{key} = {value!r:.40} was taken as {stands!r:.40}"
    from deepspeed.runtime.config import DeepSpeedConfig

    class OneRank(DeepSpeedConfig):
        def _configure_train_batch_size(self) -> None:
            self.world_size, self.global_rank = RANKS, 0
            super()._configure_train_batch_size()

    try:
        OneRank(dict(deepspeed))
    except Exception as error:
        return f"DeepSpeed does not read it: {type(error).__name__}: {str(error)[:200]}"
    return None


def _left(before: set[Path], folder: Path, began: float) -> str | None:
    if new := set(folder.iterdir()) - before:
        return f"left {', '.join(sorted(item.name for item in new))}"
    seconds = time.monotonic() - began
    return f"took {seconds:.0f} s" if seconds > LONGEST_SECONDS else None


def faults(which: list[Case], dataset: Path, folder: Path) -> list[str]:
    """One line for each case that breaks the rule."""
    found = []
    for case in which:
        if fault := fault_of(case, dataset, folder):
            found.append(f"{' + '.join(case.keys)} ({case.kind}): {fault}")
    return found


def two_at_once(count: int, generator: random.Random) -> list[Case]:
    """Two wrong values of unlike sections together: both must be named."""
    singles = [Case(((key, "yes please"),), "two") for key in run_fields() if key.split(".")[0] in ("optimizer",)]
    others = [Case(((key, 10**30),), "two") for key in run_fields() if key.startswith("training.") and "_s" in key]
    made = []
    for _ in range(count):
        one, other = generator.choice(singles), generator.choice(others)
        made.append(Case((*one.settings, *other.settings), "two at once", must_be_refused=True))
    return made


def run(folder: Path) -> dict[str, object]:
    """Every case; called by the `inputs` proof with a prepared dataset under `folder`."""
    from tests.torture.kills import prepare

    dataset, work = prepare(folder), folder / "settings"
    work.mkdir()
    every = [*cases(), *two_at_once(100, random.Random(0))]
    found = faults(every, dataset, work)
    for line in found:
        print(line, flush=True)
    assert not found, f"{len(found)} of {len(every)} settings break the rule"
    kinds = Counter(case.kind for case in every)
    return {
        "wrong settings": f"{len(every):,}",
        "… fields": f"{len(set(run_fields())) + len(set(deepspeed_fields())):,}, each with {len(VALUES)} values",
        "… pairs that contradict": kinds["a pair"],
        "… two mistakes at once": kinds["two at once"],
        "refused in one line per problem, or taken as given and read by DeepSpeed": "all",
    }
