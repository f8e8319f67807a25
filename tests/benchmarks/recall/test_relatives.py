"""Gated DeltaNet and Mamba-2: the chunks compute the recurrence, and nothing looks ahead."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks.recall.relatives import CHUNK, GatedDeltaNet, Mamba2, matrix_memory, relative

MIXERS = [GatedDeltaNet, Mamba2]


def recurrence(query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor, rate: Tensor | None) -> Tensor:
    """One position after another, as the papers write it; shapes as in `matrix_memory`."""
    state = value.new_zeros(query.shape[0], query.shape[2], query.shape[3], value.shape[3])
    answers = []
    for t in range(query.shape[1]):
        state = log_keep[:, t, :, None, None].exp() * state
        written = value[:, t]
        if rate is not None:
            held = torch.einsum("bhd,bhdp->bhp", key[:, t], state)
            written = rate[:, t, :, None] * (written - held)
        state = state + torch.einsum("bhd,bhp->bhdp", key[:, t], written)
        answers.append(torch.einsum("bhd,bhdp->bhp", query[:, t], state))
    return torch.stack(answers, dim=1)


@pytest.mark.parametrize("delta_rule", [False, True])
@pytest.mark.parametrize("length", [1, 7, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
def test_chunks_are_the_recurrence_with_its_gradients(length: int, delta_rule: bool) -> None:
    torch.manual_seed(length)
    shape = (2, length, 3)
    inputs = [torch.randn(*shape, width, dtype=torch.float64) for width in (6, 6, 4)]
    inputs[1] = F.normalize(inputs[1], dim=-1)
    inputs.append(F.logsigmoid(torch.randn(shape, dtype=torch.float64) + 2))
    inputs += [torch.rand(shape, dtype=torch.float64)] if delta_rule else []
    weight = torch.randn(*shape, 4, dtype=torch.float64)
    found = []
    for form in (matrix_memory, recurrence):
        leaves = [x.clone().requires_grad_() for x in inputs]
        answer = form(*leaves, *([] if delta_rule else [None]))
        found.append([answer, *torch.autograd.grad((answer * weight).sum(), leaves)])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("mixer", MIXERS)
def test_no_position_sees_a_later_one(mixer: type) -> None:
    torch.manual_seed(0)
    model, length = relative(mixer, 20, 16, 2).double(), 2 * CHUNK + 3
    ids = torch.randint(20, (1, length))
    logits = model(ids)
    for t in (0, CHUNK - 1, CHUNK, length - 2):
        changed = ids.clone()
        changed[:, t + 1 :] = (changed[:, t + 1 :] + 1) % 20
        after = model(changed)
        torch.testing.assert_close(after[:, : t + 1], logits[:, : t + 1], atol=1e-12, rtol=0)
        assert (after[:, t + 1 :] != logits[:, t + 1 :]).any()


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_late_position_sees_the_first_one(mixer: type) -> None:
    torch.manual_seed(0)
    model = relative(mixer, 20, 16, 2).double()
    ids = torch.randint(20, (1, 3 * CHUNK))
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % 20
    assert (model(ids)[:, -1] - model(other)[:, -1]).abs().max() > 1e-12


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_weight_is_trained(mixer: type) -> None:
    torch.manual_seed(0)
    model = relative(mixer, 20, 16, 2)
    ids = torch.randint(20, (2, CHUNK + 5))
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []
