"""Which runs compile their blocks, and what is refused by name."""

import pytest
import torch

from data_prep.errors import UserError
from pipeline.engine.compilation import resolve_compile

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
