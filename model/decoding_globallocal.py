"""Decoding token by token: a state of constant size, and one step on it in place.

The step says what the modules' forward passes say, for one position without padding, with few and fixed operations:
nothing is read by the host, no shape depends on data. Shapes and symbols as in `configuration_globallocal.py`.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .documents_globallocal import ends_document
from .router_globallocal import FoldedRouter, ProductKeyScores, TensorRouter, at_least_float32

if TYPE_CHECKING:
    from .modeling_globallocal import GlobalLocalForCausalLM


class GlobalLocalCache:
    """Decoding state of constant size.

    A call with several tokens puts new tensors here; a step with one token changes them in place.

    Attributes:
        history: per layer [B, 1 + (K − 1) · max dilation, h], a ring of the convolution's last inputs; zeros in front
            of the first token.
        summary: per layer the state of the running summary, [B, key size, heads, head width], of a delta summary
            [B, heads, key size, head width].
        recent: per layer of delta summaries [B, taps − 1, c], what their short convolution read last; zeros in front
            of the first token.
        position: int64 [1] on the device, the place in every ring that the next token takes, modulo its length.
        offset: int64 [B, 1], how many tokens of its document stand before the next one, where documents are told apart.
        steps: the number of `position`, for the host; the rings begin at their oldest entry when it is 0.
        folds: per router, filled at the first call; valid as long as the weights do not change.
        weights: per block what a step reads instead of folds, filled at the first step and as long valid.
    """

    is_compileable = False
    is_linear = (False,)  # to `generate`: what was seen already is not to be given again

    def __init__(self, num_layers: int) -> None:
        self.history: list[Tensor | None] = [None] * num_layers
        self.summary: list[Tensor | None] = [None] * num_layers
        self.recent: list[Tensor | None] = [None] * num_layers
        self.position: Tensor | None = None
        self.offset: Tensor | None = None
        self.steps = 0
        self.folds: dict[nn.Module, FoldedRouter] = {}
        self.weights: list[BlockWeights] | None = None
        self.seen_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far."""
        return self.seen_tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i continues what was row beam_idx[i]."""
        for states in (self.history, self.summary, self.recent):
            states[:] = [s if s is None else s.index_select(0, beam_idx.to(s.device)) for s in states]
        if self.offset is not None:
            self.offset = self.offset.index_select(0, beam_idx.to(self.offset.device))

    def empty(self) -> "GlobalLocalCache":
        """A cache for other sequences, which shares what depends on the weights alone."""
        new = GlobalLocalCache(len(self.history))
        new.folds, new.weights = self.folds, self.weights
        return new

    def append(self, other: "GlobalLocalCache") -> None:
        """The sequences of `other`, of any length, become further rows of this batch."""
        layers = range(len(self.history))
        for states, own, new in (
            (self.history, [self.past(i) for i in layers], [other.past(i) for i in layers]),
            (self.summary, list(self.summary), other.summary),
            (self.recent, list(self.recent), other.recent),
        ):
            states[:] = [_rows_of_both(*pair) for pair in zip(own, new, strict=True)]
        self.offset = _rows_of_both(self.offset, other.offset)
        self.seen_tokens = max(self.seen_tokens, other.seen_tokens)
        if other.position is not None:
            self.passed(0, other.position.device)

    def past(self, layer: int) -> Tensor | None:
        """The history, oldest first."""
        ring = self.history[layer]
        return ring if ring is None or self.steps == 0 else ring.roll(-self.steps % ring.shape[1], dims=1)

    def passed(self, tokens: int, device: torch.device) -> None:
        """All layers have put new tensors here, the rings from their oldest entry."""
        self.seen_tokens += tokens
        self.steps, self.position = 0, torch.zeros(1, dtype=torch.int64, device=device)

    def stepped(self) -> None:
        """One token has gone through all layers."""
        self.seen_tokens += 1
        self.steps += 1


def _rows_of_both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None or second is None else torch.cat([first, second])


class RouterWeights(NamedTuple):
    """A router's weights as a step reads them: scores are divided by the temperature once, here."""

    folded: FoldedRouter
    hidden_weight: Tensor
    hidden_bias: Tensor
    key_biases: tuple[Tensor, ...]
    balanced: tuple[Tensor, Tensor] | None  # keys divided by the temperature, and the bias of the choice alone


class BlockWeights(NamedTuple):
    """A block's weights as a step reads them, where they are not the parameters themselves."""

    # The summary's query, key and negative keep gates | value and output gate, or all that a delta summary has as it
    # has it; then the block's gate.
    input_weight: Tensor
    input_bias: Tensor
    attention: RouterWeights
    router: RouterWeights | None  # of the block's own, where it has one
    lags: Tensor  # int64 [n · K], how far back each tap of each convolution lies
    length: Tensor  # int64 scalar, of the ring


def has_plain_weights(model: nn.Module) -> bool:
    """Whether all tensors are there at any time: no module below gathers or moves them while it runs (ZeRO-3)."""
    below = (module for module in model.modules() if module is not model)
    return not any(module._forward_pre_hooks or module._forward_hooks for module in below)


def step(model: "GlobalLocalForCausalLM", ids: Tensor, cache: GlobalLocalCache) -> Tensor:
    """ids [B] → logits [B, 1, V]; the cache's tensors are brought forward in place, its counts are not."""
    base, position = model.model, cache.position
    assert position is not None
    assert cache.weights is not None
    x = base.embed_tokens(ids)
    states = zip(cache.history, cache.summary, cache.recent, strict=True)
    for block, weights, (ring, state, recent) in zip(base.layers, cache.weights, states, strict=True):
        assert ring is not None
        x = _block(block, x, base.pool, weights, (ring, state, recent), position, cache.offset)
    position.add_(1)
    if cache.offset is not None:
        ended = ends_document(ids, model.config.document_ends)
        cache.offset.add_(1).masked_fill_(ended.unsqueeze(1), 0)
    return model.lm_head(base.norm(x)).unsqueeze(1)


def _block(
    block: Any,
    x: Tensor,
    pool: Tensor,
    weights: BlockWeights,
    states: tuple[Tensor, Tensor | None, Tensor | None],
    position: Tensor,
    offset: Tensor | None,
) -> Tensor:
    attention, first, (ring, state, recent) = block.attention, block.norm_first, states
    before = block.attention_norm(x) if first else x
    projected = F.linear(before, weights.input_weight, weights.input_bias)
    local = _convolve(attention.local, before, weights, ring, position, offset)
    if state is None:
        routed = _route(attention.router, before, pool, weights.attention)
    else:
        if offset is not None:
            state.masked_fill_((offset == 0)[..., None, None], 0)
        answer = _summarise(attention.summary, projected, state, recent, offset)
        routed = _route(attention.router, before + answer, pool, weights.attention).add_(answer)
    x = torch.add(x, torch.lerp(routed, local, torch.sigmoid(projected[:, -1:])), alpha=block.branch_gain)
    x = x if first else block.attention_norm(x)
    if weights.router is not None:
        x = x + _route(block.router, block.router_norm(x) if first else x, pool, weights.router)
        x = x if first else block.router_norm(x)
    if first:
        return x + block.feed_forward(block.feed_forward_norm(x))
    return block.feed_forward_norm(x + block.feed_forward(x))


def _convolve(
    local: Any, x: Tensor, weights: BlockWeights, ring: Tensor, position: Tensor, offset: Tensor | None
) -> Tensor:
    """x [B, h] → [B, h]; the ring [B, P, h] holds x afterwards. Taps reach back `offset` [B, 1] at most."""
    branches = len(local.dilations)
    places = (position - weights.lags) % weights.length
    ring.index_copy_(1, places[-1:], x.unsqueeze(1))  # the last tap lies 0 back
    taps = ring.index_select(1, places)
    if offset is not None:
        taps.masked_fill_((offset < weights.lags).unsqueeze(-1), 0)
    taps = taps.view(len(x), branches, -1).transpose(0, 1)
    bias = local.branch_bias.view(branches, 1, -1)
    outputs = torch.baddbmm(bias, taps, local.branch_weight.transpose(1, 2))  # [n, B, h]
    return local.projection(F.gelu(outputs).transpose(0, 1).flatten(1))


def _summarise(summary: Any, projected: Tensor, state: Tensor, recent: Tensor | None, offset: Tensor | None) -> Tensor:
    """projected as in `BlockWeights` → the answer [B, h]; the state [B, d, H, p] is brought forward."""
    if recent is not None:
        return _correct(summary, projected, state, recent, offset)
    _, key_size, hidden_size, _, heads = summary.parts
    small = at_least_float32(projected[:, : 2 * key_size + heads])
    query, key, forget = small.split([key_size, key_size, heads], dim=-1)
    value, gate = projected[:, 2 * key_size + heads : -1].split(hidden_size, dim=-1)
    new = key[:, :, None, None] * value.unflatten(-1, (heads, -1)).unsqueeze(1)
    state.lerp_(new, torch.sigmoid(forget)[:, None, :, None])
    answer = (query.unsqueeze(1) @ state.flatten(2)).view(len(state), heads, -1)
    answer = F.rms_norm(answer, answer.shape[-1:], eps=summary.eps).flatten(1)
    return summary.output((answer * F.silu(gate)).to(projected.dtype))


def _correct(summary: Any, projected: Tensor, state: Tensor, recent: Tensor, offset: Tensor | None) -> Tensor:
    """`_summarise` of a delta summary: the state [B, H, d, p] and recent [B, taps − 1, c] are brought forward."""
    mixed, gate, keep, write, _ = projected.split([*summary.parts, 1], dim=-1)
    window = torch.cat([recent, mixed.unsqueeze(1)], dim=1)
    recent.copy_(window[:, 1:])
    if offset is not None:
        lags = torch.arange(window.shape[1] - 1, -1, -1, device=window.device)
        window.masked_fill_((offset < lags).unsqueeze(-1), 0)
    query, key, value = summary.heads((window * summary.taps).sum(dim=1))
    query, key = (x.repeat_interleave(summary.num_heads // x.shape[1], dim=1) for x in (query, key))  # [B, H, d]
    keep, write = (torch.sigmoid(at_least_float32(x)).unsqueeze(-1) for x in (keep, write))
    held = key.unsqueeze(-2) @ state.mul_(keep.unsqueeze(-1))
    state.add_(key.unsqueeze(-1) * (write.unsqueeze(-1) * (value.unsqueeze(-2) - held)))
    return summary.answer((query.unsqueeze(-2) @ state).squeeze(-2), gate)


def _route(router: TensorRouter, x: Tensor, pool: Tensor, weights: RouterWeights) -> Tensor:
    """x [B, h] → [B, h], a tensor of its own."""
    if weights.balanced is None:
        hidden = F.relu(F.linear(x, weights.hidden_weight, weights.hidden_bias))
        scores, rows = _best_rows(router.scores, hidden, weights.key_biases)
    else:
        scores = F.linear(router.scores.hidden(x), weights.balanced[0], *weights.key_biases)
        rows = (scores + weights.balanced[1]).topk(router.scores.top_k, dim=-1, sorted=False).indices
        scores = scores.gather(1, rows)
    shares = scores.clamp(-10.0, 10.0).softmax(dim=-1)
    mixture = torch.bmm(shares.unsqueeze(1), F.embedding(rows, pool)).squeeze(1)
    return router._from_input(x, weights.folded).addmm_(mixture, weights.folded.mixture_weight.T)


def _best_rows(scores: Any, hidden: Tensor, key_biases: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The k best scores of hidden [B, R] and their pool rows, [B, k] each, in no order."""
    if not isinstance(scores, ProductKeyScores):
        best = F.linear(hidden, scores.keys_weight, *key_biases).topk(scores.top_k, dim=-1, sorted=False)
        return best.values, best.indices
    sides = zip(hidden.chunk(2, dim=-1), (scores.left_weight, scores.right_weight), key_biases, strict=True)
    left, right = (
        F.linear(half, keys, bias).topk(min(scores.top_k, len(keys)), dim=-1, sorted=False)
        for half, keys, bias in sides
    )
    pairs = (left.values.unsqueeze(2) + right.values.unsqueeze(1)).flatten(1)
    best = pairs.topk(scores.top_k, dim=-1, sorted=False)
    rows = left.indices.unsqueeze(2) * len(scores.right_weight) + right.indices.unsqueeze(1)
    return best.values, rows.flatten(1).gather(1, best.indices)


def step_weights(model: "GlobalLocalForCausalLM", cache: GlobalLocalCache) -> list[BlockWeights]:
    """What a step reads, from the model's weights as they are now."""
    return [_block_weights(block, cache.folds) for block in model.model.layers]


def _block_weights(block: Any, folds: dict[nn.Module, FoldedRouter]) -> BlockWeights:
    attention, local = block.attention, block.attention.local
    summary = attention.summary
    weight, bias = attention.gate.weight, attention.gate.bias
    if hasattr(summary, "taps"):  # a delta summary
        weight, bias = torch.cat([summary.input.weight, weight]), torch.cat([summary.input.bias, bias])
    elif summary is not None:
        query, key, value, gate, keep = summary.input.weight.split(summary.parts)
        weight = torch.cat([query, key, -keep, value, gate, weight])
        query, key, value, gate, keep = summary.input.bias.split(summary.parts)
        bias = torch.cat([query, key, -keep, value, gate, bias])
    lags = [(local.kernel_size - 1 - j) * dilation for dilation in local.dilations for j in range(local.kernel_size)]
    return BlockWeights(
        input_weight=weight,
        input_bias=bias,
        attention=_router_weights(attention.router, folds),
        router=None if block.router is None else _router_weights(block.router, folds),
        lags=torch.tensor(lags, device=weight.device),
        length=torch.tensor(local.reach + 1, device=weight.device),
    )


def _router_weights(router: TensorRouter, folds: dict[nn.Module, FoldedRouter]) -> RouterWeights:
    scores: Any = router.scores
    temperature = at_least_float32(router.temperature).clamp(0.1, 5.0)
    names = ("left_bias", "right_bias") if isinstance(scores, ProductKeyScores) else ("keys_bias",)
    # relu(x) / T = relu(x / T), as T > 0.
    hidden_weight, hidden_bias, *key_biases = (
        (tensor / temperature).to(tensor.dtype)
        for tensor in (scores.hidden_weight, scores.hidden_bias, *(getattr(scores, name) for name in names))
    )
    balanced = None
    if scores.balance_speed:
        favour = (scores.choice_bias() - scores.keys_bias) / temperature
        balanced = (scores.keys_weight / temperature).to(scores.keys_weight.dtype), favour.to(scores.keys_bias.dtype)
    return RouterWeights(router._folded(folds), hidden_weight, hidden_bias, tuple(key_biases), balanced)
