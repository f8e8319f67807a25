"""The learning rate is a function of the step; groups part matrices from the rest."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from model.configuration_globallocal import GlobalLocalConfig
from model.modeling_globallocal import GlobalLocalForCausalLM
from pipeline.config import load_config
from pipeline.engine.muon import Muon, orthogonal
from pipeline.engine.optim import (
    ALIGNED_ELEMENTS,
    build_optimizer,
    describe_groups,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)
from pipeline.settings.sections import OptimizerSection

ROUTER_MATRICES = ("input_weight", "mapping_weight", "output_weight", "scores.hidden_weight")
SCHEDULES = ("cosine", "linear", "wsd")


def section(schedule: str, decay: int = 10, **settings: Any) -> OptimizerSection:
    tail = {"decay_steps": decay} if schedule == "wsd" else {}
    return OptimizerSection(learning_rate=1e-3, schedule=schedule, **tail, **settings)


@given(
    schedule=st.sampled_from(SCHEDULES),
    max_steps=st.integers(1, 10_000),
    warmup=st.integers(0, 500),
    decay=st.integers(1, 500),
    ratio=st.floats(0, 1, allow_subnormal=False),
    step=st.integers(0, 20_000),
)
def test_learning_rate_stays_between_its_bounds(
    schedule: str, max_steps: int, warmup: int, decay: int, ratio: float, step: int
) -> None:
    settings = section(schedule, decay, warmup_steps=warmup, min_learning_rate_ratio=ratio)
    rate = learning_rate(step, max_steps, settings)
    assert 0 < rate <= 1e-3 * (1 + 1e-12) or ratio == 0 <= rate
    if step >= warmup:
        assert rate >= 1e-3 * ratio * (1 - 1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rate_rises_to_its_peak_and_falls_to_its_floor(schedule: str) -> None:
    settings = section(schedule, warmup_steps=10, min_learning_rate_ratio=0.1)
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == pytest.approx(1e-3)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[99] == pytest.approx(1e-4)


def test_half_way_down() -> None:
    half = {
        schedule: learning_rate(50, 101, section(schedule, 100, min_learning_rate_ratio=0)) for schedule in SCHEDULES
    }
    assert half == pytest.approx({"cosine": 5e-4, "linear": 5e-4, "wsd": 1e-3 * (1 - 0.5**0.5)})


@given(short=st.integers(60, 1000), longer=st.integers(0, 1000), decay=st.integers(1, 50))
def test_a_longer_run_of_wsd_begins_as_the_shorter_one_so_that_any_steady_checkpoint_can_decay(
    short: int, longer: int, decay: int
) -> None:
    settings = section("wsd", decay, warmup_steps=10)
    for step in range(short - decay):
        assert learning_rate(step, short, settings) == learning_rate(step, short + longer, settings)
    assert learning_rate(short - decay, short, settings) < 1e-3


def test_what_has_an_odd_size_moves_nothing_from_its_alignment() -> None:
    model = GlobalLocalForCausalLM(GlobalLocalConfig.from_preset("quickstart", num_hidden_layers=1, vocab_size=64))
    for group in parameter_groups(model, OptimizerSection()):
        sizes = [parameter.numel() for parameter in group["params"]]
        odd = next((place for place, size in enumerate(sizes) if size % ALIGNED_ELEMENTS), len(sizes))
        assert all(sum(sizes[:place]) % ALIGNED_ELEMENTS == 0 for place in range(odd + 1))
        assert all(size % ALIGNED_ELEMENTS for size in sizes[odd:])


def test_matrices_decay_and_the_rest_does_not() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    groups = parameter_groups(model, OptimizerSection())
    assert [(group["name"], group["weight_decay"], len(group["params"])) for group in groups] == [
        ("decay", 0.1, 2),
        ("no_decay", 0.0, 3),
    ]
    assert describe_groups(groups) == [
        "decay: 2 tensors, 44 parameters, weight_decay 0.1",
        "no_decay: 3 tensors, 12 parameters, weight_decay 0",
    ]


def test_what_adds_up_a_hidden_state_learns_more_slowly_in_a_wider_model_and_decays_as_much() -> None:
    model = GlobalLocalForCausalLM(GlobalLocalConfig.from_preset("small", num_hidden_layers=1, summary_rule="delta"))
    plain, wider = (
        parameter_groups(model, OptimizerSection(base_hidden_size=base)) for base in (model.config.hidden_size, 128)
    )
    assert plain == parameter_groups(model, OptimizerSection())
    assert [(group["name"], group["rate"], group["weight_decay"]) for group in wider] == [
        ("over_width", 0.25, 0.4),
        ("decay", 1.0, 0.1),
        ("no_decay", 1.0, 0.0),
    ]
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert [names[parameter] for parameter in wider[1]["params"]] == [
        "model.embed_tokens.weight",
        "model.layers.0.attention.summary.taps",
    ]
    assert wider[2]["params"] == plain[1]["params"]
    assert "learning rate × 0.25" in describe_groups(wider)[0]
    optimizer = build_optimizer(wider, OptimizerSection(), offload=False)
    set_learning_rate(optimizer, 1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [2.5e-4, 1e-3, 1e-3]


def test_muon_moves_the_matrices_of_the_blocks_and_nothing_else() -> None:
    model = GlobalLocalForCausalLM(GlobalLocalConfig.from_preset("small", num_hidden_layers=1, vocab_size=64))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {
        group["name"]: [names[item] for item in group["params"]]
        for group in parameter_groups(model, OptimizerSection(name="muon"))
    }
    assert sorted(name.removeprefix("model.layers.0.") for name in groups["matrices"]) == [
        "attention.local.projection.weight",
        *(f"attention.router.{name}" for name in ROUTER_MATRICES),
        "attention.summary.input.weight",
        "attention.summary.output.weight",
        "feed_forward.expansion.weight",
        "feed_forward.projection.weight",
        *(f"router.{name}" for name in ROUTER_MATRICES),
    ]
    plain = parameter_groups(model, OptimizerSection())
    assert sorted(groups["matrices"] + groups["decay"]) == sorted(names[item] for item in plain[0]["params"])
    assert groups["no_decay"] == [names[item] for item in plain[1]["params"]]


def test_muon_takes_torchs_own_steps_and_leaves_adamws_to_adamw() -> None:
    torch.manual_seed(0)
    settings = OptimizerSection(name="muon", learning_rate=0.01, momentum=0.9)
    ours = torch.nn.Sequential(*(torch.nn.Linear(24, 40) for _ in range(2)), torch.nn.Linear(40, 16))
    theirs = deepcopy(ours)
    optimizer = build_optimizer(parameter_groups(ours, settings), settings, offload=False)
    assert isinstance(optimizer, Muon)
    optimizer.attach({}, cut_up=False, dtype=torch.bfloat16)
    matrices, vectors = ([item for item in theirs.parameters() if item.ndim == ndim] for ndim in (2, 1))
    others = (
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(vectors, lr=0.01, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    )
    begin = [parameter.detach().clone() for parameter in ours.parameters()]
    for _ in range(3):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for each in (optimizer, *others):
            each.step()
    for mine, other, first in zip(ours.parameters(), theirs.parameters(), begin, strict=True):
        moved = (other - first).abs().max()
        assert (mine - other).abs().max() <= (0.02 * moved if mine.ndim == 2 else 0)  # bfloat16 has 8 bits


def test_an_orthogonal_update_has_singular_values_near_one() -> None:
    for shape in ((3, 16, 40), (2, 40, 16), (1, 24, 24)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert values.min() > 0.3
        assert values.max() < 1.3


def test_no_decay_tensors_without_a_gradient_signal_do_not_shrink() -> None:
    model = torch.nn.Linear(3, 3)
    with torch.no_grad():
        model.bias.fill_(1.0)
    before = model.weight.detach().clone()
    settings = OptimizerSection(learning_rate=0.1, weight_decay=0.5)
    optimizer = build_optimizer(parameter_groups(model, settings), settings, offload=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(model.bias, torch.ones(3))
    assert torch.allclose(model.weight, before * (1 - 0.1 * 0.5))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            ["schedule=wsd", "decay_steps=90", "warmup_steps=20"],
            "optimizer.warmup_steps (20) and optimizer.decay_steps (90) are together more than the run's 100 steps; ",
        ),
        (["schedule=wsd"], "optimizer.schedule = wsd and optimizer.decay_steps = None do not go together: wsd needs "),
        (["name=muon", "base_hidden_size=128"], "optimizer.base_hidden_size (128) scales AdamW's rate of matrices, "),
        (["decay_steps=10"], "optimizer.schedule = cosine and optimizer.decay_steps = 10 do not go together: "),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(settings: list[str], problem: str) -> None:
    overrides = ["training.max_steps=100", *(f"optimizer.{setting}" for setting in settings)]
    with pytest.raises(UserError) as caught:
        load_config("launch/runs/quickstart.yaml", overrides)
    (line,) = caught.value.problems
    assert problem in line
