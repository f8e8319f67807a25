"""What the model says of the rows that each token read, against what it counts for the whole batch."""

import pytest
import torch

from tests.model.helpers import LAYOUTS, make_model, random_ids, tiny_config


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_gates_and_rows_of_tokens_add_up_to_the_statistics_of_the_batch(layout):
    model = make_model(tiny_config(**LAYOUTS[layout]), noise=0.3)
    ids = random_ids(model.config, 3, 9)
    output = model(ids, output_routing=True, use_cache=False)
    gates, rows, shares = output.routing
    layers, routers, k = model.config.num_hidden_layers, model.config.routers_per_layer, model.config.router_top_k
    assert (gates.shape, rows.shape, shares.shape) == ((3, 9, layers), *[(3, 9, layers, routers, k)] * 2)
    assert torch.allclose(gates.mean(dim=(0, 1)), output.router_statistics["gate_mean"])
    usage = torch.zeros(layers, routers, model.config.pool_size, dtype=shares.dtype)
    usage.scatter_add_(2, rows.movedim((0, 1), (2, 3)).flatten(2), shares.movedim((0, 1), (2, 3)).flatten(2))
    assert torch.allclose(usage, output.router_statistics["pool_usage"])
    assert (shares.diff(dim=-1) <= 0).all()


@torch.no_grad()
def test_looking_changes_nothing_and_may_begin_and_end_between_steps():
    model = make_model(tiny_config(router_context="summary"), noise=0.3)
    ids = random_ids(model.config, 2, 14)
    whole = model(ids, output_routing=True, use_cache=False)
    cache, seen = None, 0
    for step, piece in enumerate(ids.split([5] + [1] * 9, dim=1)):
        output = model(piece, cache=cache, use_cache=True, output_routing=step % 3 == 0)
        cache, seen = output.cache, seen + piece.shape[1]
        assert (output.logits[:, -1] - whole.logits[:, seen - 1]).abs().max() < 1e-12
        if step % 3:
            assert output.routing is None
        else:
            assert torch.equal(output.routing.rows[:, -1], whole.routing.rows[:, seen - 1])
            assert (output.routing.gates[:, -1] - whole.routing.gates[:, seen - 1]).abs().max() < 1e-12
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_sequences_of_any_length_join_a_batch_between_steps():
    model = make_model(tiny_config(router_context="summary"), noise=0.3)
    ids = random_ids(model.config, 3, 16)
    cache = model(ids[:1, :4], use_cache=True).cache
    for at in (4, 5, 6):
        model(ids[:1, at : at + 1], cache=cache)
    for row, length in ((1, 9), (2, 2)):
        cache.append(model(ids[row : row + 1, :length], cache=cache.empty(), use_cache=True).cache)
    lengths = [7, 9, 2]
    for step in range(5):
        column = torch.stack([ids[row, length + step] for row, length in enumerate(lengths)]).unsqueeze(1)
        logits = model(column, cache=cache).logits[:, 0]
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, : length + step + 1], use_cache=False).logits[0, -1]
            assert (logits[row] - alone).abs().max() < 1e-12
