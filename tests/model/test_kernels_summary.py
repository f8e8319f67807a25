"""The running summary's kernels against the same attention as tensor operations, in float64.

With a GPU they run there; otherwise `test_kernels_interpreted.py` runs this file in Triton's interpreter.
"""

import pytest
import torch
from torch import Tensor

from model import ops_summary_globallocal
from model.decoding_globallocal import GlobalLocalCache
from model.ops_summary_globallocal import decayed_attention

from .helpers import make_model, random_ids, tiny_config
from .kernels_helpers import DEVICE, INTERPRETED, gates, results

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'globallocal[dev]' on Linux")
from model import kernels_summary_globallocal as kernels

# batch, length, heads, key size, head width; chunks are 64 long
SHAPES = [
    (1, 2, 1, 16, 16),
    (2, 64, 2, 16, 32),
    (1, 65, 8, 32, 24),
    (1, 150, 2, 64, 8),
    (1, 130, 1, 40, 96),
    (2, 192, 1, 16, 64),
]


def inputs(batch: int, length: int, heads: int, d: int, p: int, kind: str = "usual", spare: int = 8) -> list[Tensor]:
    """query, key, value and log_keep; the first three lie side by side, as one linear layer leaves them."""
    torch.manual_seed(length)
    packed = torch.randn(batch, length, 2 * d + heads * p + spare, device=DEVICE)
    query, key, value, _ = packed.split([d, d, heads * p, spare], dim=-1)
    tensors = [query, key, value.unflatten(-1, (heads, p)), gates(kind, batch, length, heads).to(DEVICE)]
    return [x.detach().requires_grad_() for x in tensors]


def plain(query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor) -> tuple[Tensor, Tensor]:
    assert query.dtype == torch.float64  # which no kernel takes
    return decayed_attention(query, key, value, log_keep, None)


def assert_as_exact(tensors: list[Tensor], tolerance: float) -> None:
    found = results(kernels.summary_attention, tensors)
    wanted = results(plain, [x.detach().double().requires_grad_() for x in tensors])
    names = ["answers", "last state", "query", "key", "value", "log_keep"]
    for name, one, other in zip(names, found, wanted, strict=True):
        assert one.shape == other.shape, name
        assert (one - other).abs().max() <= tolerance * other.abs().max(), name


class TestKernels:
    __test__ = DEVICE == "cuda" or INTERPRETED

    @pytest.mark.parametrize("shape", SHAPES)
    def test_results_and_gradients(self, shape: tuple[int, ...]) -> None:
        assert_as_exact(inputs(*shape), 1e-5)

    @pytest.mark.parametrize("kind", ["open", "closed"])
    def test_extreme_gates(self, kind: str) -> None:
        assert_as_exact(inputs(1, 130, 2, 16, 16, kind), 2e-5)

    def test_a_closed_gate_forgets_all(self) -> None:
        # A difference of two sums of logarithms, each hundreds large, decides what is kept: float32 holds 4 digits.
        assert_as_exact(inputs(1, 130, 2, 16, 16, "mixed"), 2e-4)

    def test_rows_at_odd_addresses_are_copied(self) -> None:
        assert_as_exact(inputs(1, 70, 1, 16, 16, spare=3), 1e-5)

    def test_two_runs_give_the_same_bits(self) -> None:
        tensors = inputs(2, 70, 2, 16, 16)
        first, second = (results(kernels.summary_attention, tensors) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))

    def test_compiled_as_one_graph(self) -> None:
        tensors = inputs(1, 70, 2, 16, 16)
        compiled = torch.compile(kernels.summary_attention, fullgraph=True, backend="aot_eager")
        pairs = zip(results(compiled, tensors), results(kernels.summary_attention, tensors), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)

    def test_operators_keep_their_word(self) -> None:
        """Nothing is changed in place or aliased, and the shapes are as announced."""
        operators = torch.ops.model_kernels_summary_globallocal
        tensors = [x.detach() for x in inputs(2, 70, 2, 16, 16)]
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(operators.summary_forward.default, tuple(tensors), test_utils=checks)
        answers, before, last = kernels.summary_forward(*tensors)
        more = (before, torch.randn_like(answers), torch.randn_like(last))
        torch.library.opcheck(operators.summary_backward.default, (*tensors, *more), test_utils=checks)

    def test_a_second_derivative_is_refused(self) -> None:
        tensors = inputs(1, 2, 1, 16, 16)
        answers, _ = kernels.summary_attention(*tensors)
        (grad,) = torch.autograd.grad(answers.square().sum(), tensors[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    def test_the_model_uses_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Same logits and gradients with and without; a prompt fills the cache for the tokens after it."""
        config = tiny_config(
            num_hidden_layers=1, hidden_size=32, router_context="summary", summary_heads=2, summary_key_size=16
        )
        model = make_model(config, dtype=torch.float32).to(DEVICE)
        ids = random_ids(config, 1, 70).to(DEVICE)
        calls, original = [], kernels.summary_attention

        def counted(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            calls.append(tensors)
            return original(*tensors)

        def logits_and_gradients() -> list[Tensor]:
            model.zero_grad()
            logits = model(input_ids=ids).logits
            logits.square().mean().backward()
            return [logits, *(x.grad for x in model.parameters())]

        monkeypatch.setattr(ops_summary_globallocal, "has_kernels", lambda x: False)
        wanted = logits_and_gradients()
        monkeypatch.setattr(ops_summary_globallocal, "has_kernels", lambda x: True)
        monkeypatch.setattr(ops_summary_globallocal, "summary_attention", counted)
        for one, other in zip(logits_and_gradients(), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.detach().abs().max().item())
        assert len(calls) == config.num_hidden_layers
        with torch.no_grad():
            cache = GlobalLocalCache(config.num_hidden_layers)
            parts = [model(input_ids=part, cache=cache, use_cache=True).logits for part in (ids[:, :69], ids[:, 69:])]
        torch.testing.assert_close(torch.cat(parts, dim=1), wanted[0], rtol=1e-4, atol=1e-4)
        assert len(calls) == 2 * config.num_hidden_layers  # the single token is not worth a kernel
