"""What `test_kernels_interpreted.py` runs with TRITON_INTERPRET=1: there the kernels serve the CPU."""

import pytest
import torch
import torch.nn.functional as F

from model import ops_router_globallocal as ops
from model import reference
from model.configuration_globallocal import GlobalLocalConfig
from model.kernels_loss_globallocal import cross_entropy_by_kernel_
from model.modeling_globallocal import GlobalLocalForCausalLM

# Tokens, rows, width, k: beside the tiles' sizes, and more choices than rows in a tile.
SHAPES = [(70, 300, 48, 2), (33, 64, 192, 3), (16, 5, 16, 4), (130, 200, 300, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_best_rows_are_those_of_all_scores(shape):
    tokens, rows, width, k = shape
    generator = torch.Generator().manual_seed(rows)
    x, table, bias = (torch.randn(size, generator=generator) for size in ((tokens, width), (rows, width), (rows,)))
    values, indices = ops.top_rows(x, table, bias, k)
    expected = (x.double() @ table.double().T + bias).topk(k)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(values.double(), expected.values, rtol=2**-16, atol=1e-4)  # compared to 17 bits


def test_of_equal_scores_the_earlier_row_comes_first():
    _, indices = ops.top_rows(torch.ones(3, 16), torch.ones(100, 16), torch.zeros(100), 4)
    assert indices.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("spread", ["even", "one row", "most rows none"])
def test_rows_are_summed_mixed_and_dotted_as_by_index(spread):
    generator = torch.Generator().manual_seed(1)
    tokens, rows, k, width = 150, 40, 2, 37
    most = {"even": rows, "one row": 1, "most rows none": 3}[spread]
    indices = torch.randint(most, (tokens, k), generator=generator)
    values, x, table = (
        torch.randn(size, generator=generator) for size in ((tokens, k), (tokens, width), (rows, width))
    )
    choice = ops.RowChoice(indices, rows)
    products = (values.double().unsqueeze(2) * x.double().unsqueeze(1)).flatten(0, 1)
    expected = torch.zeros(rows, width, dtype=torch.float64).index_add_(0, indices.flatten(), products)
    expected_totals = torch.zeros(rows, dtype=torch.float64).index_add_(0, indices.flatten(), values.double().flatten())
    sums, totals = choice.sum_by_row(values, x)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(totals.double(), expected_totals, rtol=1e-5, atol=1e-4)
    again = choice.sum_by_row(values, x)
    assert torch.equal(sums, again[0])
    assert torch.equal(totals, again[1])
    assert torch.equal(choice.sum_by_row(values)[1], totals)
    torch.testing.assert_close(ops._mix(table, indices, values), (table[indices] * values.unsqueeze(2)).sum(1))
    torch.testing.assert_close(ops._dot(table, indices, x), (table[indices] * x.unsqueeze(1)).sum(2))


def test_logits_become_the_gradient_of_their_loss():
    generator = torch.Generator().manual_seed(2)
    logits = 5 * torch.randn(9, 9000, generator=generator)
    targets = torch.randint(9000, (9,), generator=generator)
    targets[3] = -100
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf, targets, reduction="none", ignore_index=-100)
    expected.sum().backward()
    torch.testing.assert_close(cross_entropy_by_kernel_(logits, targets), expected.detach())
    torch.testing.assert_close(logits, leaf.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scores", ["dense", "product_key"])
def test_the_whole_model_by_kernels_is_that_of_the_equations(scores):
    torch.manual_seed(0)
    config = GlobalLocalConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, pool_size=36, pool_dim=16, router_hidden_size=32,
        router_scores=scores, router_context="summary", summary_heads=4, summary_key_size=16, router_top_k=3,
        conv_dilations=[[1, 2], [4]], diversity_loss_scale=50.0,
    )  # fmt: skip
    model = GlobalLocalForCausalLM(config).train()
    ids = torch.randint(97, (1, 70))
    labels = ids.clone()
    labels[0, 3] = -100
    weights = {
        name: tensor.detach().double().clone().requires_grad_(name != "model.pool")
        for name, tensor in model.state_dict().items()
    }
    reference.loss(weights, config, ids, labels).backward()
    model(ids, shift_labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        goal = weights[name].grad
        assert (parameter.grad - goal).abs().max() < 1e-3 * goal.abs().max().clamp_min(1e-4), name
