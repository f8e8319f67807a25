"""The parts of a GlobalLocal block. Shapes and symbols as in `configuration_globallocal.py`."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_globallocal import SUMMARY_TAPS, UNIT_EPS, GlobalLocalConfig
from .decoding_globallocal import GlobalLocalCache
from .ops_convolution_globallocal import causal_convolutions, short_convolution
from .ops_delta_globallocal import gated_delta_rule
from .ops_summary_globallocal import decayed_attention
from .router_globallocal import TensorRouter, at_least_float32


class CausalConvolution(nn.Module):
    """The local branch: parallel dilated causal convolutions, GELU, concatenated, projected."""

    def __init__(self, config: GlobalLocalConfig, layer: int) -> None:
        super().__init__()
        h, self.kernel_size = config.hidden_size, config.conv_kernel_size
        self.layer, self.dilations = layer, config.dilations_of_layer(layer)
        self.dilation_numbers = torch.tensor(self.dilations, device="cpu")
        self.reach = (self.kernel_size - 1) * max(self.dilations)
        num_branches = len(self.dilations)
        self.branch_weight = nn.Parameter(torch.empty(num_branches, h, self.kernel_size * h))
        self.branch_bias = nn.Parameter(torch.empty(num_branches * h))
        self.projection = nn.Linear(num_branches * h, h)

    def forward(self, x: Tensor, mask: Tensor | None, offsets: Tensor | None, cache: GlobalLocalCache | None) -> Tensor:
        """x [B, S, h], mask [B, S, 1] or None, offsets [B, S] in the document or None → [B, S, h]."""
        if mask is not None:
            x = x * mask
        history = cache.past(self.layer) if cache is not None else None
        if cache is not None:
            padded = F.pad(x, (0, 0, self.reach, 0)) if history is None else torch.cat([history, x], dim=1)
            cache.history[self.layer] = padded[:, -self.reach - 1 :].clone()  # a view would keep a long prompt whole
        bias = self.branch_bias.view(len(self.branch_weight), -1)
        branches = causal_convolutions(x, self.branch_weight, bias, self.dilation_numbers, history, offsets)
        return self.projection(F.gelu(branches))


class RunningSummary(nn.Module):
    """What the prefix held, in constant memory: a gated linear recurrence that each token asks.

    Per head state[t] = a[t] · state[t − 1] + (1 − a[t]) · key[t] ⊗ value[t], with keep gate a = σ(...) of the token;
    the answer query[t] · state[t] is normalised, gated and projected. Keys and queries serve all heads. After
    Mamba-2's state space duality, arXiv:2405.21060, and gated linear attention, arXiv:2312.06635.
    """

    def __init__(self, config: GlobalLocalConfig, layer: int) -> None:
        super().__init__()
        h, key, self.eps = config.hidden_size, config.summary_key_size, config.layer_norm_eps
        self.layer, self.num_heads = layer, config.summary_heads
        self.parts = [key, key, h, h, self.num_heads]  # query, key, value, output gate, keep gates
        self.input = nn.Linear(h, sum(self.parts))
        self.output = nn.Linear(h, h)

    def forward(self, x: Tensor, mask: Tensor | None, offsets: Tensor | None, cache: GlobalLocalCache | None) -> Tensor:
        """x [B, S, h], mask [B, S, 1] or None, offsets [B, S] in the document or None → [B, S, h]."""
        query, key, value, gate, keep = self.input(x).split(self.parts, dim=-1)
        log_keep = F.logsigmoid(at_least_float32(keep))
        share = 1.0 - log_keep.exp()
        if mask is not None:
            share = share * mask  # in front of the sequence the state stays 0
        value = value.unflatten(-1, (self.num_heads, -1)) * share.to(value.dtype).unsqueeze(-1)
        state = None if cache is None else cache.summary[self.layer]
        starts = None if offsets is None else offsets == 0
        answer, state = decayed_attention(query, key, value, log_keep, state, starts)
        if cache is not None:
            cache.summary[self.layer] = state.clone()  # not the states of all chunks
        answer = F.rms_norm(answer, answer.shape[-1:], eps=self.eps).flatten(2)
        return self.output(answer.to(x.dtype) * F.silu(gate))


class DeltaSummary(nn.Module):
    """What the prefix held, in constant memory, and corrected: a gated delta rule that each token asks.

    A short causal convolution, a few taps per feature, and SiLU mix query, key and value with those of the positions
    just before, so that a key can say what a value followed. Keys and queries then have length 1, and per head

        kept[t] = a[t] · state[t − 1]
        state[t] = kept[t] + b[t] · key[t] ⊗ (value[t] − key[t] · kept[t])

    with keep gate a and write gate b = σ(...) of the token. The answer query[t] · state[t] is normalised, gated and
    projected. After gated delta networks, arXiv:2412.06464.
    """

    def __init__(self, config: GlobalLocalConfig, layer: int) -> None:
        super().__init__()
        h, self.eps = config.hidden_size, config.layer_norm_eps
        self.layer, self.num_heads, self.key_size = layer, config.summary_heads, config.summary_key_size
        keys = config.summary_key_heads * config.summary_key_size
        # Query, key and value; output, keep and write gates.
        self.keys, self.parts = keys, [2 * keys + h, h, self.num_heads, self.num_heads]
        self.input = nn.Linear(h, sum(self.parts))
        self.taps = nn.Parameter(torch.empty(SUMMARY_TAPS, self.parts[0]))
        self.output = nn.Linear(h, h)

    def forward(self, x: Tensor, mask: Tensor | None, offsets: Tensor | None, cache: GlobalLocalCache | None) -> Tensor:
        """x [B, S, h], mask [B, S, 1] or None, offsets [B, S] in the document or None → [B, S, h]."""
        mixed, gate, keep, write = self.input(x).split(self.parts, dim=-1)
        write = torch.sigmoid(at_least_float32(write))
        if mask is not None:
            mixed, write = mixed * mask, write * mask  # in front of the sequence the state stays 0
        recent = state = None
        if cache is not None:
            recent, state = cache.recent[self.layer], cache.summary[self.layer]
        reach = SUMMARY_TAPS - 1
        padded = F.pad(mixed, (0, 0, reach, 0)) if recent is None else torch.cat([recent, mixed], dim=1)
        mixed = short_convolution(padded, self.taps, offsets)
        log_keep = F.logsigmoid(at_least_float32(keep))
        starts = None if offsets is None else offsets == 0
        answer, state = gated_delta_rule(*self.heads(mixed), log_keep, write, state, starts)
        if cache is not None:
            cache.recent[self.layer], cache.summary[self.layer] = padded[:, -reach:].clone(), state
        return self.answer(answer, gate)

    def heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Behind the short convolution, [..., c] → query and key [..., G, d], value [..., H, p], at least float32."""
        mixed = at_least_float32(F.silu(mixed))
        keys, value = mixed.split([2 * self.keys, mixed.shape[-1] - 2 * self.keys], dim=-1)
        query, key = _unit(keys.unflatten(-1, (2, -1, self.key_size))).unbind(-3)
        return query, key, value.unflatten(-1, (self.num_heads, -1))

    def answer(self, answer: Tensor, gate: Tensor) -> Tensor:
        """What the states say, [..., H, p], and the output gate [..., h] → [..., h]."""
        answer = F.rms_norm(answer, answer.shape[-1:], eps=self.eps).flatten(-2)
        return self.output(answer.to(gate.dtype) * F.silu(gate))


def _unit(x: Tensor) -> Tensor:
    """Of length 1 along the last dimension; zeros stay zeros."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + UNIT_EPS)


SUMMARIES = {"average": RunningSummary, "delta": DeltaSummary}


class GlobalLocalAttention(nn.Module):
    """Per token, a gate between the local branch (convolutions) and the global one (router, and summary)."""

    def __init__(self, config: GlobalLocalConfig, layer: int) -> None:
        super().__init__()
        self.local = CausalConvolution(config, layer)
        self.summary = SUMMARIES[config.summary_rule](config, layer) if config.router_context == "summary" else None
        self.router = TensorRouter(config)
        self.gate = nn.Linear(config.hidden_size, 1)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, pool: Tensor, mask: Tensor | None, offsets: Tensor | None, cache: GlobalLocalCache | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B, S, h] → output [B, S, h], diversity loss, pool usage [N], mean gate."""
        local = self.dropout(self.local(x, mask, offsets, cache))
        folds = None if cache is None else cache.folds
        if self.summary is None:
            routed, diversity, usage = self.router(x, pool, mask, folds)
        else:
            answer = self.summary(x, mask, offsets, cache)
            routed, diversity, usage = self.router(x + answer, pool, mask, folds)
            routed = routed + answer
        gate = torch.sigmoid(self.gate(x))
        mean_gate = at_least_float32(gate.detach()).mean()
        return self.dropout(torch.lerp(routed, local, gate)), diversity, usage, mean_gate


class FeedForward(nn.Module):
    """Linear, GELU, dropout, Linear, dropout."""

    def __init__(self, config: GlobalLocalConfig) -> None:
        super().__init__()
        self.expansion = nn.Linear(config.hidden_size, config.intermediate_size)
        self.projection = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, h] → [B, S, h]."""
        return self.dropout(self.projection(self.dropout(F.gelu(self.expansion(x)))))


class GlobalLocalBlock(nn.Module):
    """Attention replacement, router where the block has one, feed-forward: residual sublayers with a norm each."""

    def __init__(self, config: GlobalLocalConfig, layer: int) -> None:
        super().__init__()
        self.norm_first, self.branch_gain = config.norm_placement == "pre", config.branch_gain
        self.attention = GlobalLocalAttention(config, layer)
        self.router = TensorRouter(config) if config.block_router else None
        self.feed_forward = FeedForward(config)
        norm = partial(nn.LayerNorm, config.hidden_size, eps=config.layer_norm_eps)
        self.attention_norm = norm()
        self.router_norm = norm() if config.block_router else None
        self.feed_forward_norm = norm()
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        pool: Tensor,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
        cache: GlobalLocalCache | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, h], pool [N, D], mask [B, S, 1], offsets [B, S] in the document.

        Returns:
            x, diversity loss, mean gate and n routers' usage [1 + n · N].
        """
        before = self.attention_norm(x) if self.norm_first else x
        update, diversity, usage, gate = self.attention(before, pool, mask, offsets, cache)
        x = torch.add(x, self.dropout(update), alpha=self.branch_gain)
        x = x if self.norm_first else self.attention_norm(x)

        statistics = [gate.reshape(1), usage]
        if self.router is not None and self.router_norm is not None:
            before = self.router_norm(x) if self.norm_first else x
            update, more, usage = self.router(before, pool, mask, None if cache is None else cache.folds)
            x = x + self.dropout(update)
            x = x if self.norm_first else self.router_norm(x)
            diversity = diversity + more
            statistics.append(usage)

        if self.norm_first:
            x = x + self.feed_forward(self.feed_forward_norm(x))
        else:
            x = self.feed_forward_norm(x + self.feed_forward(x))
        return x, diversity, torch.cat(statistics)
