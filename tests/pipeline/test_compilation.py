"""Which runs compile their blocks, what is refused by name, and a compiled run that is resumed, on two real ranks."""

import os
from pathlib import Path

import pytest
import torch

from data_prep.errors import UserError
from pipeline.engine.compilation import keep_cache, resolve_compile
from tests.pipeline.comparing import assert_resumed_is_unbroken
from tests.pipeline.ranks import Run, run_ranks

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("policy", ["none", "full", "every-2"])
def test_auto_compiles_on_a_gpu_alone(stage: int, policy: str) -> None:
    assert resolve_compile("auto", GPU, stage, policy)
    assert not resolve_compile("auto", CPU, stage, policy)
    assert not resolve_compile(False, GPU, stage, policy)
    assert resolve_compile(True, CPU, stage, policy)


def test_auto_leaves_alone_what_true_is_refused_for() -> None:
    assert not resolve_compile("auto", GPU, 3, "none")
    assert not resolve_compile("auto", GPU, 2, "selective")
    with pytest.raises(UserError) as caught:
        resolve_compile(True, GPU, 3, "deepspeed")
    assert len(caught.value.problems) == 2
    assert "ZeRO stage 3" in caught.value.problems[0]
    assert "model.activation_checkpointing = deepspeed" in caught.value.problems[1]


def test_what_is_compiled_stays_for_later_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "a place of its own")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "globallocal" / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "a place of its own"


def test_a_resumed_run_is_bitwise_the_unbroken_one_and_compiles_once(tmp_path: Path, small_dataset: Path) -> None:
    few_kernels = ["model.conv_dilations=[[1]]", "model.router_context=token", "model.block_router=false"]
    settings = ["training.compile=true", *few_kernels]
    plan = [
        Run("unbroken", settings),
        Run("resumed", settings, copy_checkpoint="unbroken/step-00000003"),
    ]
    results = run_ranks(plan, tmp_path, small_dataset, program="tests.pipeline.compiled_once")
    runs = {result["name"]: result for result in results}
    assert_resumed_is_unbroken(runs, tmp_path, "resumed", "unbroken")
    assert "compiled in" in (tmp_path / "unbroken" / "logs" / "rank-00000.log").read_text()
