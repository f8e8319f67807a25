"""The gated delta rule's kernels against the same rule as tensor operations, in float64.

With a GPU they run there; otherwise `test_kernels_interpreted.py` runs this file in Triton's interpreter.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import ops_delta_globallocal, reference
from model.ops_delta_globallocal import gated_delta_rule

from .helpers import make_model, random_ids, reference_weights, tiny_config
from .kernels_helpers import DEVICE, INTERPRETED, gates, results

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'globallocal[dev]' on Linux")
from model import kernels_delta_globallocal as kernels

# batch, length, heads, heads of keys, key size, head width; chunks are 64 long
SHAPES = [(1, 2, 1, 1, 16, 16), (2, 65, 4, 2, 32, 24), (1, 150, 2, 1, 64, 64), (1, 130, 1, 1, 40, 96)]
NAMES = ["answers", "last state", "query", "key", "value", "log_keep", "write"]


def inputs(
    batch: int, length: int, heads: int, groups: int, d: int, p: int, kind: str = "usual", width: int = 0
) -> list[Tensor]:
    """query, key, value, log_keep and write; values lie beside `width` other numbers, as a convolution leaves them."""
    torch.manual_seed(length)
    query, key = F.normalize(torch.randn(2, batch, length, groups, d, device=DEVICE), dim=-1).unbind()
    value = torch.randn(batch, length, heads * p + width, device=DEVICE)[..., width:].unflatten(-1, (heads, p))
    log_keep, write = gates(kind, batch, length, heads).to(DEVICE), torch.rand(batch, length, heads, device=DEVICE)
    return [x.detach().requires_grad_() for x in (query, key, value, log_keep, write)]


def plain(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    assert tensors[0].dtype == torch.float64  # which no kernel takes
    return gated_delta_rule(*(*tensors, None))


def assert_as_exact(tensors: list[Tensor], tolerance: float) -> None:
    assert kernels.fits(*tensors)
    found = results(kernels.delta_attention, tensors)
    wanted = results(plain, [x.detach().double().requires_grad_() for x in tensors])
    for name, one, other in zip(NAMES, found, wanted, strict=True):
        assert one.shape == other.shape, name
        assert (one - other).abs().max() <= tolerance * other.abs().max(), name


class TestKernels:
    __test__ = DEVICE == "cuda" or INTERPRETED

    @pytest.mark.parametrize("shape", SHAPES)
    def test_results_and_gradients(self, shape: tuple[int, ...]) -> None:
        assert_as_exact(inputs(*shape), 1e-5)

    @pytest.mark.parametrize("kind", ["open", "closed"])
    def test_extreme_gates(self, kind: str) -> None:
        assert_as_exact(inputs(1, 130, 2, 1, 16, 16, kind, width=8), 2e-5)

    def test_one_key_again_and_again(self) -> None:
        """Each value stands in place of the one before, 130 times: sums of powers would have lost all digits."""
        _, key, value, log_keep, write = inputs(1, 130, 1, 1, 16, 16)
        key, whole = key[:, :1].expand_as(key), torch.ones_like(write)
        answers, _ = kernels.delta_attention(key, key, value, 0 * log_keep, whole)
        torch.testing.assert_close(answers, value, rtol=0, atol=2e-5)

    def test_two_runs_give_the_same_bits(self) -> None:
        tensors = inputs(1, 66, 2, 1, 16, 16)
        first, second = (results(kernels.delta_attention, tensors) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))

    def test_compiled_as_one_graph(self) -> None:
        tensors = inputs(1, 66, 1, 1, 16, 16)
        compiled = torch.compile(kernels.delta_attention, fullgraph=True, backend="aot_eager")
        pairs = zip(results(compiled, tensors), results(kernels.delta_attention, tensors), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)

    def test_operators_keep_their_word(self) -> None:
        """Nothing is changed in place or aliased, and the shapes are as announced."""
        operators = torch.ops.model_kernels_delta_globallocal
        tensors = [x.detach() for x in inputs(1, 66, 2, 1, 16, 16)]
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(operators.delta_forward.default, tuple(tensors), test_utils=checks)
        answers, last, *kept = kernels.delta_forward(*tensors)
        more = (tensors, kept, torch.randn_like(answers), torch.randn_like(last))
        torch.library.opcheck(operators.delta_backward.default, more, test_utils=checks)

    def test_the_model_uses_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Gradients are those of the equations; where a state is there before, plain torch goes on from it."""
        sizes = {"hidden_size": 32, "summary_heads": 2, "summary_key_size": 16, "num_hidden_layers": 1}
        config = tiny_config(router_context="summary", summary_rule="delta", **sizes)
        model = make_model(config, dtype=torch.float32).to(DEVICE)
        ids, calls = random_ids(config, 1, 70).to(DEVICE), []

        def counted(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            calls.append(tensors)
            return kernels.delta_attention(*tensors)

        monkeypatch.setattr(ops_delta_globallocal, "delta_attention", counted)
        weights = {name: x.detach().double().requires_grad_() for name, x in reference_weights(model).items()}
        expected, _ = reference.forward(weights, config, ids)
        expected.square().mean().backward()
        logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-5)
        for name, parameter in model.named_parameters():
            if (goal := weights[name].grad) is not None and parameter.grad is not None:
                assert (parameter.grad - goal).abs().max() < 1e-4 * goal.abs().max().clamp_min(1e-3), name
        assert len(calls) == 1
        with torch.no_grad():
            cache = model(input_ids=ids[:, :66], use_cache=True).cache
            rest = model(input_ids=ids[:, 66:], cache=cache, use_cache=True).logits
        torch.testing.assert_close(rest, logits[:, 66:], rtol=1e-4, atol=1e-4)
        assert len(calls) == 2
