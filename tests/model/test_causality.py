"""No position sees a later one, on any preset and any decoding path."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.configuration_globallocal import GlobalLocalConfig
from model.modeling_globallocal import GlobalLocalForCausalLM
from model.presets_globallocal import PRESETS
from tests.model.helpers import make_model, random_ids, scaled_preset


@pytest.fixture(scope="module", params=[*PRESETS, "seed with summary and product keys"])
def preset_model(request):
    name, _, extra = request.param.partition(" ")
    options = {"router_context": "summary", "router_scores": "product_key", "router_hidden_size": 8, "pool_size": 16}
    return make_model(scaled_preset(name, **(options if extra else {})))


@settings(max_examples=15)
@given(position=st.integers(0, 39), token=st.integers(0, 30), seed=st.integers(0, 99))
def test_editing_a_token_changes_nothing_before_it(preset_model, position, token, seed):
    ids = random_ids(preset_model.config, 1, 40, seed)
    edited = ids.clone()
    edited[0, position] = token
    with torch.no_grad():
        before, after = preset_model(ids).logits, preset_model(edited).logits
        assert torch.equal(before[:, :position], after[:, :position])
        step = preset_model(edited[:, :position], use_cache=True).cache if position else None
        cached = preset_model(edited[:, position:], cache=step, use_cache=True).logits
    assert (cached - after[:, position:]).abs().max() < 1e-12


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("context", ["token", "summary"])
def test_gradients_reach_back_as_far_as_the_config_says(preset, context):
    config = scaled_preset(preset, router_context=context)
    model = make_model(config)
    length = config.receptive_field + 5
    inputs = torch.randn(1, length, config.hidden_size, dtype=torch.float64, requires_grad=True)
    model(inputs_embeds=inputs).logits[0, -1].sum().backward()
    touched = inputs.grad.abs().sum(dim=-1)[0].nonzero().flatten()
    assert touched.min().item() == (length - config.receptive_field if context == "token" else 0)


def test_a_document_sees_the_one_before_it_as_far_as_the_receptive_field():
    """The stated policy of docs/data.md: one stream, no mask between documents, eos is a token like others."""
    config = scaled_preset("quickstart", router_context="token", eos_token_id=2)
    assert config.eos_token_id == 2
    model, reach = make_model(config), config.receptive_field
    ids = random_ids(config, 1, reach + 10)
    ids[0, 3] = config.eos_token_id  # document A is 0..3, document B all behind it
    edited = ids.clone()
    edited[0, 2] = (ids[0, 2] + 1) % config.vocab_size
    with torch.no_grad():
        changed = (model(ids).logits != model(edited).logits).any(dim=-1)[0]
    assert not changed[:2].any()
    assert changed[4 : 2 + reach].any()
    assert not changed[2 + reach :].any()


@pytest.mark.parametrize("target_is_visible", [False, True])
def test_nothing_is_learnt_from_random_tokens(target_is_visible):
    """Without the targets the loss stays at ln V = 5.545; a model that can see them leaves it at once."""
    config = GlobalLocalConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, pool_size=128, pool_dim=64, norm_placement="post"
    )
    torch.manual_seed(0)
    model = GlobalLocalForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(80 if target_is_visible else 120):
        tokens = torch.randint(0, 256, (8, 65), generator=generator)
        inputs = tokens[:, 1:] if target_is_visible else tokens[:, :-1]
        output = model(inputs, shift_labels=tokens[:, 1:])
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.language_loss.item())
    late = sum(losses[-10:]) / 10
    if target_is_visible:
        assert late < 1.0
    else:
        assert late > math.log(256) - 0.02
