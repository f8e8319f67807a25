"""The fast path and the slow equations agree in outputs and in every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import ops_loss_globallocal, ops_router_globallocal, ops_summary_globallocal, reference
from model.ops_delta_globallocal import gated_delta_rule
from tests.model.helpers import LAYOUTS, make_model, random_ids, reference_weights, tiny_config


def largest_difference(model, ids, labels):
    """Largest differences of loss, logits, and of gradients relative to the largest one of their tensor."""
    weights = reference_weights(model)
    expected = reference.loss(weights, model.config, ids, labels)
    expected.backward()
    model.zero_grad()
    output = model(ids, shift_labels=labels)
    output.loss.backward()
    gradients = 0.0
    for name, parameter in model.named_parameters():
        if name.endswith(".balance"):
            continue  # its gradient is no derivative
        goal = weights[name].grad
        difference = (parameter.grad - goal).abs().max() / goal.abs().max().clamp_min(1e-4)  # below it, rounding alone
        gradients = max(gradients, difference.item())
    logits = (model(ids).logits - reference.forward(weights, model.config, ids)[0]).abs().max().item()
    return abs(output.loss.item() - expected.item()), logits, gradients


CONTEXTS = ["token", "summary", "delta", "delta with keys per head"]


@settings(max_examples=40)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 70),  # up to a second chunk of the summary
    kernel_size=st.integers(1, 4),
    dilations=st.sampled_from([[1], [1, 2, 4], [3, 1], [[1, 2], [8]], [[16, 1], [2, 3], [5, 7]]]),
    top_k=st.integers(1, 4),
    pool_size=st.sampled_from([4, 6, 20, 100]),  # on both sides of the choice which product is folded
    pool_dim=st.sampled_from([8, 40]),  # narrower and wider than the model
    norm_placement=st.sampled_from(["pre", "post"]),
    tied=st.booleans(),
    head_bias=st.booleans(),
    soft_cap=st.sampled_from([0, 1.5]),
    z_loss=st.sampled_from([0, 0.1]),
    scores=st.sampled_from(["dense", "product_key"]),
    context=st.sampled_from(CONTEXTS),
    boundaries=st.sampled_from(["carry", "reset"]),
    seed=st.integers(0, 99),
)
def test_double_precision_agrees(
    batch,
    length,
    kernel_size,
    dilations,
    top_k,
    pool_size,
    pool_dim,
    norm_placement,
    tied,
    head_bias,
    soft_cap,
    z_loss,
    scores,
    context,
    boundaries,
    seed,
):
    config = tiny_config(
        conv_kernel_size=kernel_size,
        conv_dilations=dilations,
        router_top_k=top_k,
        router_scores=scores,
        **LAYOUTS[context],
        router_hidden_size=8,
        pool_size=pool_size,
        pool_dim=pool_dim,
        norm_placement=norm_placement,
        tie_word_embeddings=tied,
        head_bias=head_bias,
        logit_soft_cap=soft_cap,
        z_loss=z_loss,
        document_boundaries=boundaries,
        eos_token_id=[3, 7],
        diversity_loss_scale=50.0,  # large enough to be seen in the gradients
    )
    model = make_model(config, seed)
    ids, labels = random_ids(config, batch, length, seed), random_ids(config, batch, length, seed + 1)
    labels[0, : length // 2] = -100
    loss, logits, gradients = largest_difference(model, ids, labels)
    assert loss < 1e-12
    assert logits < 1e-11
    assert gradients < 1e-10


@pytest.mark.parametrize("norm_placement", ["pre", "post"])
def test_float32_stays_within_its_rounding(norm_placement):
    config = tiny_config(hidden_size=64, pool_dim=96, norm_placement=norm_placement)
    model = make_model(config, noise=0.02, dtype=torch.float32)
    loss, logits, gradients = largest_difference(model, random_ids(config, 4, 33), random_ids(config, 4, 33, 2))
    assert loss < 1e-5
    assert logits < 1e-4
    assert gradients < 1e-3


def test_bfloat16_stays_within_its_rounding():
    config = tiny_config(hidden_size=32, pool_dim=48)
    exact = make_model(config, noise=0.02)
    rounded = make_model(config, noise=0.02).to(torch.bfloat16)
    ids, labels = random_ids(config, 4, 33), random_ids(config, 4, 33, 2)
    expected, output = exact(ids, shift_labels=labels), rounded(ids, shift_labels=labels)
    assert output.language_loss.dtype == output.diversity_loss.dtype == torch.float32
    assert abs(output.loss - expected.loss) < 0.02
    output.loss.backward()
    expected.loss.backward()
    for (name, parameter), reference_parameter in zip(rounded.named_parameters(), exact.parameters(), strict=True):
        if "score" in name or name.endswith("temperature"):
            continue  # tiny, and another row of a near tie may have been chosen
        goal = reference_parameter.grad.flatten()
        cosine = torch.cosine_similarity(parameter.grad.double().flatten(), goal, dim=0)
        assert cosine > 0.95, f"{name}: cosine {cosine:.3f}"


def test_saturated_scores_have_no_gradient_and_agree():
    config = tiny_config()
    model = make_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "keys_weight" in name:
                parameter *= 100.0  # far outside the clamp
    ids = random_ids(config, 2, 9)
    _, logits, gradients = largest_difference(model, ids, ids)
    assert logits < 1e-10
    assert gradients < 1e-10


@pytest.mark.parametrize("temperature", [0.01, 0.5, 9.0])
def test_temperature_is_clamped_as_in_the_equations(temperature):
    config = tiny_config()
    model = make_model(config, noise=0.0)
    with torch.no_grad():  # where training may carry it
        for name, parameter in model.named_parameters():
            if name.endswith("temperature"):
                parameter.fill_(temperature)
    ids = random_ids(config, 2, 9)
    assert max(largest_difference(model, ids, ids)) < 1e-10


def test_a_balance_chooses_and_moves_towards_rows_that_are_chosen_too_seldom():
    config = tiny_config(router_balance=6.0, diversity_loss_scale=50.0)
    model = make_model(config)
    ids = random_ids(config, 2, 9)
    assert max(largest_difference(model, ids, ids)) < 1e-10
    output = model(ids, shift_labels=ids)
    usage = output.router_statistics["pool_usage"][0, 1]
    gradient = model.model.layers[0].router.scores.balance.grad
    assert (gradient[usage == 0] < 0).all()
    assert gradient.abs().max() < 1e-4
    with torch.no_grad():
        whole = model(ids)
        step = model(ids[:, -1:], cache=model(ids[:, :-1], use_cache=True).cache)
    assert torch.allclose(step.logits[:, -1], whole.logits[:, -1], atol=1e-10)


def test_blocks_do_not_change_the_result(monkeypatch):
    config = tiny_config()
    model = make_model(config)
    ids, labels = random_ids(config, 3, 11), random_ids(config, 3, 11, 2)
    whole = largest_difference(model, ids, labels)
    monkeypatch.setattr(ops_loss_globallocal, "LOGIT_BLOCK_ELEMENTS", 4 * config.vocab_size)
    monkeypatch.setattr(ops_router_globallocal, "SCORE_BLOCK_ELEMENTS", 5 * config.pool_size)
    assert max(*whole, *largest_difference(model, ids, labels)) < 1e-10


@settings(max_examples=30)
@given(length=st.integers(1, 150), seed=st.integers(0, 99))
def test_the_recurrence_is_that_of_a_loop_over_any_number_of_chunks(length, seed):
    generator = torch.Generator().manual_seed(seed)
    decay = torch.rand(2, length, 3, generator=generator, dtype=torch.float64).requires_grad_()
    update = torch.randn(2, length, 3, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.randn(2, length, 3, generator=generator, dtype=torch.float64)
    state, states = torch.zeros(2, 3, dtype=torch.float64), []
    for t in range(length):
        state = decay[:, t] * state + update[:, t]
        states.append(state)
    expected = torch.stack(states, dim=1)
    result = ops_summary_globallocal.linear_recurrence(decay, update)
    assert (result - expected).abs().max() < 1e-12
    goals = torch.autograd.grad((expected * weights).sum(), (decay, update), materialize_grads=True)
    for gradient, goal in zip(torch.autograd.grad((result * weights).sum(), (decay, update)), goals, strict=True):
        assert (gradient - goal).abs().max() < 1e-11


def delta_rule_of_a_loop(query, key, value, log_keep, write, state):
    query, key = (x.repeat_interleave(value.shape[2] // x.shape[2], dim=2) for x in (query, key))
    answers = []
    for t in range(query.shape[1]):
        state = state * log_keep[:, t].exp()[..., None, None]
        wrong = value[:, t] - torch.einsum("bhd,bhdp->bhp", key[:, t], state)
        state = state + torch.einsum("bhd,bhp->bhdp", key[:, t], write[:, t].unsqueeze(-1) * wrong)
        answers.append(torch.einsum("bhd,bhdp->bhp", query[:, t], state))
    return torch.stack(answers, dim=1), state


@settings(max_examples=20)
@given(length=st.integers(1, 200), groups=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_the_delta_rule_is_that_of_a_loop_over_any_number_of_chunks(length, groups, seed):
    """From a state that is there already, and with gradients through answers and last state."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, length, groups, 6), (2, length, groups, 6), (2, length, 4, 5), (2, length, 4), (2, length, 4)]
    query, key, value, log_keep, write = (torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes)
    key = torch.nn.functional.normalize(key, dim=-1)
    state = torch.randn(2, 4, 6, 5, generator=generator, dtype=torch.float64)
    parts = [query, key, value, torch.nn.functional.logsigmoid(log_keep), write.sigmoid(), state]
    parts = [part.requires_grad_() for part in parts]
    expected, results = delta_rule_of_a_loop(*parts), gated_delta_rule(*parts)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in expected]
    goals, gradients = (torch.autograd.grad(x, parts, weights) for x in (expected, results))
    for result, goal in zip((*results, *gradients), (*expected, *goals), strict=True):
        assert (result - goal).abs().max() < 1e-10


def test_the_delta_rule_keeps_one_value_under_each_key():
    """Written whole, a value stands in place of what its key held; other keys keep theirs."""
    keys = torch.eye(4, dtype=torch.float64)[[0, 1, 0, 2, 0]].view(1, 5, 1, 4)
    values = torch.arange(10, dtype=torch.float64).view(1, 5, 1, 2)
    whole = torch.ones(1, 5, 1, dtype=torch.float64)
    answers, state = gated_delta_rule(keys, keys, values, 0 * whole, whole, None)
    assert torch.equal(answers, values)
    assert torch.equal(
        state[0, 0], torch.stack([values[0, 4, 0], values[0, 1, 0], values[0, 3, 0], 0 * values[0, 0, 0]])
    )


@settings(max_examples=30)
@given(rows=st.integers(1, 5), columns=st.integers(1, 300), k=st.integers(1, 8), seed=st.integers(0, 99))
def test_the_largest_columns_are_found(rows, columns, k, seed):
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    k = min(k, columns)
    values, indices = ops_router_globallocal._top_columns(scores, k)
    expected = scores.topk(k, dim=-1)
    assert torch.equal(values, expected.values)
    assert torch.equal(indices, expected.indices)


@pytest.mark.parametrize("context", CONTEXTS)
def test_padding_counts_in_no_loss(context):
    config = tiny_config(diversity_loss_scale=50.0, **LAYOUTS[context])
    model = make_model(config)
    ids = random_ids(config, 2, 7)
    padded = torch.nn.functional.pad(ids, (4, 0), value=3)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    with_padding = model(padded, attention_mask=mask)
    without = model(ids)
    assert (with_padding.logits[:, 4:] - without.logits).abs().max() < 1e-12
    assert abs(with_padding.diversity_loss - without.diversity_loss) < 1e-14
    expected, diversity = reference.forward(reference_weights(model), config, padded, mask)
    assert (with_padding.logits[:, 4:] - expected[:, 4:]).abs().max() < 1e-12
    assert abs(with_padding.diversity_loss - diversity) < 1e-14
