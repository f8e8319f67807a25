"""What `test_kernels_interpreted.py` runs with TRITON_INTERPRET=1: there the kernels serve the CPU."""

import pytest
import torch

from model import kernels_convolution_globallocal as kernels
from model.ops_convolution_globallocal import causal_convolutions, convolution_backward, convolution_forward

# B, S, h, K, dilations: lengths beside the tiles' (64), shorter than a dilation, one tile and several.
SHAPES = [
    (2, 70, 64, 3, [1, 128]),
    (2, 130, 128, 2, [5]),
    (2, 100, 64, 3, [2, 16, 50]),
    (5, 3, 64, 2, [1, 2]),
    (1, 64, 64, 3, [64]),
]


def tensors(batch, length, h, taps, dilations, dtype=torch.float32):
    generator = torch.Generator().manual_seed(length)
    shapes = [
        (batch, length, h),
        (len(dilations), h, taps * h),
        (len(dilations), h),
        (batch, length, len(dilations) * h),
    ]
    x, weight, bias, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    return [tensor.to(dtype) for tensor in (x, weight / (taps * h) ** 0.5, bias, grad)]


def results(function, case, dilations):
    *inputs, grad = case
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(*leaves, torch.tensor(dilations))
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def deviations(actual, expected):
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(actual, expected, strict=True)]


@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_the_products_over_copied_taps(shape):
    case, dilations = tensors(*shape), shape[-1]
    assert kernels.suits_kernels(case[0])
    wide = [tensor.double() for tensor in case]
    assert not kernels.suits_kernels(wide[0])
    expected = results(causal_convolutions, wide, dilations)
    actual = results(causal_convolutions, case, dilations)
    assert max(deviations(actual, expected)) < 1e-6
    again = results(causal_convolutions, case, dilations)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


def test_half_precision_is_rounded_once():
    case = tensors(2, 70, 192, 3, [1, 128], dtype=torch.float16)
    expected = results(causal_convolutions, [tensor.double() for tensor in case], [1, 128])
    assert max(deviations(results(causal_convolutions, case, [1, 128]), expected)) < 2**-10


@pytest.mark.parametrize("name", ["forward", "input", "weight"])
def test_every_configuration_gives_the_same(name):
    x, weight, bias, grad = tensors(1, 70, 256, 2, [3], dtype=torch.float16)
    calls = {
        "forward": lambda tiles: kernels.convolve(x, weight, bias, [3], tiles),
        "input": lambda tiles: kernels.input_gradient(grad, weight, [3], tiles),
        "weight": lambda tiles: kernels.weight_gradient(grad, x, 2, [3], tiles),
    }
    candidates = list(kernels.configurations(name, 256, x.dtype))
    first, *others = [calls[name](tiles).double() for tiles in candidates]
    assert len(candidates) > 1
    assert all(max(deviations([other], [first])) < 2**-10 for other in others)


@pytest.mark.parametrize("splits", [1, 3])
def test_the_weights_gradient_is_the_same_in_any_number_of_parts(splits, monkeypatch):
    x, _, _, grad = tensors(2, 100, 64, 2, [7])
    expected = convolution_backward(grad.double(), x.double(), torch.zeros(1, 64, 128).double(), torch.tensor([7]))[1]
    monkeypatch.setattr(kernels, "_splits", lambda num_tiles, num_blocks: splits)
    assert max(deviations([kernels.weight_gradient(grad, x, 2, [7])], [expected])) < 1e-6


def test_parts_follow_from_the_shapes_and_leave_few_processors_idle():
    for num_tiles in (48, 108, 200, 768):
        splits = kernels._splits(num_tiles, 1024)
        waves = num_tiles * splits / kernels.PROCESSORS
        assert 1 <= splits <= kernels.MOST_SPLITS
        assert waves / -(-waves // 1) > 0.9
    assert kernels._splits(4, 1) == 1


def test_no_position_sees_a_later_one_or_another_sequence():
    x, weight, bias, _ = tensors(3, 90, 64, 3, [1, 40])
    before = convolution_forward(x, weight, bias, torch.tensor([1, 40]))
    x[1, 50:] = torch.nan
    after = convolution_forward(x, weight, bias, torch.tensor([1, 40]))
    assert torch.equal(after[1, :50], before[1, :50])
    assert torch.equal(after[0::2], before[0::2])
    assert after[1, 50:].isnan().all()


def test_parameters_may_lie_anywhere_in_memory():
    x, weight, bias, grad = tensors(2, 70, 64, 2, [3])
    expected = results(causal_convolutions, [x, weight, bias, grad], [3])
    x, weight, bias, grad = (torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t) for t in (x, weight, bias, grad))
    assert all(t.data_ptr() % 16 for t in (x, weight, bias, grad))
    output = convolution_forward(x, weight, bias, torch.tensor([3]))
    gradients = convolution_backward(grad, x, weight, torch.tensor([3]))
    assert all(torch.equal(a, b) for a, b in zip([output, *gradients], expected[:3], strict=True))


def test_compiled_whole():
    case = tensors(2, 70, 64, 3, [1, 16])
    expected = results(causal_convolutions, case, [1, 16])
    compiled = torch.compile(causal_convolutions, fullgraph=True, backend="aot_eager")
    actual = results(compiled, case, [1, 16])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_history_continues_a_sequence():
    x, weight, bias, _ = tensors(2, 90, 64, 3, [1, 20])
    whole = causal_convolutions(x, weight, bias, torch.tensor([1, 20]))
    rest = causal_convolutions(x[:, 50:], weight, bias, torch.tensor([1, 20]), x[:, :50])
    assert max(deviations([rest], [whole[:, 50:].double()])) < 1e-6
