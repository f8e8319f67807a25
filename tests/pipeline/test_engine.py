"""One DeepSpeed configuration out of two files that may not contradict each other."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator

from data_prep.errors import UserError
from pipeline.config import load_config
from pipeline.data.loader import BatchLayout
from pipeline.engine.deepspeed_json import autos, lacks
from pipeline.engine.engine import check_machine, deepspeed_config, zero_stage
from tests.conftest import ROOT

LAYOUT = BatchLayout(global_batch_size=16, micro_batch_size=4, world_size=2)


def merged(tmp_path: Path, knobs: Any, precision: str = "fp32", *overrides: str) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(knobs if isinstance(knobs, str) else json.dumps(knobs))
    config = load_config("launch/runs/quickstart.yaml", [f"deepspeed.config={path}", *overrides])
    return deepspeed_config(config, LAYOUT, precision)


def problems_of(tmp_path: Path, knobs: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        merged(tmp_path, knobs)
    return caught.value.problems


def test_the_run_fills_in_what_it_owns(tmp_path: Path) -> None:
    settings = merged(tmp_path, {"zero_optimization": {"stage": 2}}, "bf16")
    assert settings["train_batch_size"] == 16
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 1.0
    assert settings["bf16"] == {"enabled": True}
    assert settings["fp16"] == {"enabled": False}
    assert zero_stage(settings) == 2


def test_auto_and_equal_values_are_welcome(tmp_path: Path) -> None:
    knobs = {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": 2,
        "optimizer": "auto",
        "bf16": {"enabled": "auto"},
    }
    assert merged(tmp_path, knobs)["gradient_accumulation_steps"] == 2


def test_every_contradiction_is_told_naming_both_sides(tmp_path: Path) -> None:
    knobs = {"train_batch_size": 32, "fp16": {"enabled": True}, "optimizer": {"type": "Lamb"}, "gradient_clipping": 5}
    problems = "\n".join(problems_of(tmp_path, knobs))
    assert (
        "train_batch_size = 32, but the run gives training.global_batch_size 16 = "
        "training.micro_batch_size 4 × 2 ranks × 2 accumulation steps"
    ) in problems
    assert "fp16.enabled = True, but training.precision gives False" in problems
    assert "optimizer.type = Lamb, but optimizer.name in the run file is adamw; remove it from the JSON" in problems
    assert "gradient_clipping = 5, but optimizer.max_gradient_norm gives 1.0" in problems
    assert len(problems.splitlines()) == 4


@pytest.mark.parametrize(
    ("knobs", "line"),
    [
        ({"zero_optimisation": {}}, "unknown key zero_optimisation; nearest: zero_optimization"),
        ("{", "Expecting property name"),
        ("[]", "must hold a JSON object, holds a list"),
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage = "auto" cannot be filled in'),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "auto"}}},
            'zero_optimization.offload_param.device = "auto" cannot be filled in',
        ),
        (
            {"zero_optimization": {"reduce_bucket_sise": 5}},
            "unknown key zero_optimization.reduce_bucket_sise; nearest: zero_optimization.reduce_bucket_size",
        ),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage = 4: input should be 0, 1, 2 or 3"),
        ({"zero_optimization": 2}, "zero_optimization = 2: must be an object"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param does nothing at stage 2; set stage to 3 or more",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device = nvme needs stage 3, the file has stage 2",
        ),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile = true: training does not use DeepCompile"),
        ({"scheduler": {"type": "WarmupLR"}}, "is set there, and by optimizer.warmup_steps"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1, "betas": [0.9, 0.95]}}},
            "optimizer.params.lr = 1, but optimizer.learning_rate gives",
        ),
    ],
)
def test_what_deepspeed_would_ignore_is_refused(tmp_path: Path, knobs: Any, line: str) -> None:
    (problem,) = problems_of(tmp_path, knobs)
    assert line in problem


def test_muon_takes_no_offloaded_states_and_may_be_repeated(tmp_path: Path) -> None:
    repeated = {"optimizer": {"type": "Muon", "params": {"momentum": 0.95, "muon_lr": 0.1, "adam_lr": "auto"}}}
    offloaded = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(UserError) as caught:
        merged(tmp_path, repeated | offloaded, "bf16", "optimizer.name=muon")
    rate, offload = caught.value.problems
    assert "optimizer.params.muon_lr = 0.1, but optimizer.learning_rate gives " in rate
    assert "zero_optimization.offload_optimizer.device = cpu, but optimizer.name = muon, whose products of " in offload
    assert "remove the one, or set optimizer.name to adamw" in offload


USERS_OWN = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
    },
    "steps_per_print": 2000,
}
"""As people bring it from other trainers, "auto" wherever that is possible."""


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_json_of_autos_is_resolved_as_the_shipped_files_stand(tmp_path: Path, precision: str) -> None:
    settings = merged(tmp_path, USERS_OWN, precision)
    shipped = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())["zero_optimization"]
    assert {key: settings["zero_optimization"][key] for key in shipped} == shipped
    assert settings["train_batch_size"] == 16
    assert [settings[key]["enabled"] for key in ("bf16", "fp16")] == [precision == "bf16", precision == "fp16"]
    assert settings["fp16"]["initial_scale_power"] == 16
    assert "optimizer" not in settings
    assert not autos(settings)


def test_contradicting_batch_sizes_are_one_line_with_all_four_numbers(tmp_path: Path) -> None:
    knobs = {"train_batch_size": 6, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    (problem,) = problems_of(tmp_path, knobs)
    assert problem.startswith(f"{tmp_path}/ds.json: train_batch_size = 6, train_micro_batch_size_per_gpu = 2, but ")
    assert "global_batch_size 16 = training.micro_batch_size 4 × 2 ranks × 2 accumulation steps" in problem


SHIPPED = sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))
NEEDS = {
    "zero3_hpz.json": ["zero_hpz_partition_size (8) must divide the ranks (2); set it to the ranks of a node"],
    "zero3_zeropp.json": [
        "zero_hpz_partition_size (8) must divide the ranks (2)",
        "zero_quantized_weights = true and zero_quantized_gradients = true need CUDA kernels, this machine has CPU "
        "cores only; take ds_configs/zero3_hpz.json",
    ],
}
"""What keeps a shipped file from two ranks on CPU cores; the others train there (test_ds_configs.py)."""


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_file_loads_and_says_what_this_machine_lacks(name: str) -> None:
    config = load_config("launch/runs/quickstart.yaml", [f"deepspeed.config=ds_configs/{name}"])
    settings = deepspeed_config(config, LAYOUT, "bf16")
    said = lacks(settings, 2, cuda=False)
    expected = NEEDS.get(name, [])
    assert [line[: len(start)] for line, start in zip(said, expected, strict=True)] == expected
    if expected:
        with pytest.raises(UserError, match=f"ds_configs/{name}: "):
            check_machine(config, settings, 2, cuda=False)


def test_nvme_is_refused_because_a_run_could_not_be_resumed() -> None:
    (problem,) = lacks({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, 2, cuda=False)
    assert problem.startswith(f"DeepSpeed {version('deepspeed')} does not bring back what lies on NVMe when it loads a")


def test_every_shipped_file_has_a_row_that_says_when_to_take_it() -> None:
    page = (ROOT / "ds_configs" / "README.md").read_text()
    assert re.findall(r"^\| `(\w+\.json)` \|", page, flags=re.MULTILINE)
    assert sorted(re.findall(r"^\| `(\w+\.json)` \|", page, flags=re.MULTILINE)) == SHIPPED


def test_a_missing_json_names_those_that_are_there() -> None:
    config = load_config("launch/runs/quickstart.yaml", ["deepspeed.config=ds_configs/zero9.json"])
    with pytest.raises(UserError, match=r"ds_configs/zero9\.json: no such file; there are: .*zero2\.json"):
        deepspeed_config(config, LAYOUT, "fp32")


@pytest.mark.skipif(get_accelerator().is_fp16_supported(), reason="DeepSpeed trains in fp16 on this machine")
def test_fp16_where_deepspeed_does_not_train_in_it_is_one_line(tmp_path: Path) -> None:
    config = load_config("launch/runs/quickstart.yaml", ["training.precision=fp16"])
    with pytest.raises(UserError) as caught:
        check_machine(config, merged(tmp_path, {}, "fp16"), 2, cuda=False)
    (line,) = caught.value.problems
    assert line.startswith("training.precision = fp16, which DeepSpeed does not train in here")
    check_machine(config, merged(tmp_path, {}, "fp32"), 2, cuda=False)


def test_a_rank_imports_mlflow_and_the_compiler_only_where_it_uses_them() -> None:
    """DeepSpeed would bring both along, over a third of all that a rank imports; they are there for who wants them."""
    program = (
        "import pipeline.train, sys, torch; from pipeline.distributed.world import start; start(); "
        "from deepspeed.runtime.zero.utils import is_zero_supported_optimizer as ask; "
        "ask(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])); "
        "assert not {'mlflow', 'torch._inductor.compile_fx'} & set(sys.modules); "
        "import mlflow; assert mlflow.__version__; torch.compile(lambda x: x); assert 'torch._inductor' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
