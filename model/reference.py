"""The model's equations, written slowly: what the fast path is compared with, in outputs and gradients.

Functions of a dictionary of tensors with the names of `GlobalLocalForCausalLM.state_dict()`, in their dtype
(float64 for tests). No dropout, no cache. Every matrix of pool scores, mixtures and logits is really there.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_globallocal import UNIT_EPS, GlobalLocalConfig

Weights = dict[str, Tensor]


def part(weights: Weights, name: str) -> Weights:
    """The tensors below `name`, with the rest of their names."""
    prefix = name + "."
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def linear(weights: Weights, x: Tensor) -> Tensor:
    """x Wᵀ + b; without a bias, x Wᵀ."""
    return x @ weights["weight"].T + weights.get("bias", 0)


def layer_norm(weights: Weights, x: Tensor, eps: float) -> Tensor:
    """(x − mean) / √(variance + eps) · weight + bias over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], weights["weight"], weights["bias"], eps)


def local_branch(weights: Weights, config: GlobalLocalConfig, layer: int, x: Tensor, mask: Tensor) -> Tensor:
    """projection(concat_i GELU(conv_i(x))), each convolution padded on the left only. x [B, S, h]."""
    h, kernel_size = config.hidden_size, config.conv_kernel_size
    channels_first = (x * mask).transpose(1, 2)
    outputs = []
    biases = weights["branch_bias"].view(-1, h)
    for matrix, bias, dilation in zip(weights["branch_weight"], biases, config.dilations_of_layer(layer), strict=True):
        kernel = matrix.view(h, kernel_size, h).transpose(1, 2)  # [out, in, K]
        padded = F.pad(channels_first, ((kernel_size - 1) * dilation, 0))
        outputs.append(F.gelu(F.conv1d(padded, kernel, bias, dilation=dilation)).transpose(1, 2))
    return linear(part(weights, "projection"), torch.cat(outputs, dim=-1))


def pool_scores(weights: Weights, config: GlobalLocalConfig, x: Tensor) -> Tensor:
    """The score of every pool row: [B, S, N]."""
    hidden = x @ weights["hidden_weight"].T + weights["hidden_bias"]
    hidden = (
        F.layer_norm(hidden, hidden.shape[-1:], eps=config.layer_norm_eps) if config.router_balance else F.relu(hidden)
    )
    if config.router_scores == "dense":
        return hidden @ weights["keys_weight"].T + weights["keys_bias"]
    left, right = hidden.chunk(2, dim=-1)
    left_scores = left @ weights["left_weight"].T + weights["left_bias"]
    right_scores = right @ weights["right_weight"].T + weights["right_bias"]
    return (left_scores.unsqueeze(-1) + right_scores.unsqueeze(-2)).flatten(-2)


def router(weights: Weights, config: GlobalLocalConfig, x: Tensor, pool: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Output projection of mapping([LayerNorm(input(x)), Σ_j w_j pool[i_j]]), and the diversity loss."""
    scores = pool_scores(part(weights, "scores"), config, x)
    # Clamping only creates ties; among those the larger plain score wins.
    favoured = scores + config.router_balance * weights["scores.balance"] if config.router_balance else scores
    chosen = favoured.topk(config.router_top_k, dim=-1).indices
    scaled = (scores / weights["temperature"].clamp(0.1, 5.0)).clamp(-10.0, 10.0)
    chosen_weights = scaled.gather(-1, chosen).softmax(dim=-1)
    mixture = torch.einsum("bsk,bskd->bsd", chosen_weights, pool[chosen])

    norm = {"weight": weights["input_norm_weight"], "bias": weights["input_norm_bias"]}
    projected = layer_norm(norm, x @ weights["input_weight"].T + weights["input_bias"], config.layer_norm_eps)
    combined = torch.cat([projected, mixture], dim=-1)
    transformation = combined @ weights["mapping_weight"].T + weights["mapping_bias"]
    output = transformation @ weights["output_weight"].T + weights["output_bias"]

    counted = (chosen_weights * mask).flatten()
    usage = torch.zeros_like(pool[:, 0]).scatter_add(0, chosen.flatten(), counted)
    uniform = torch.full_like(usage, 1.0 / config.pool_size)
    coverage = mask.sum().item() * config.hidden_size / (config.pool_size * config.router_top_k)
    diversity = F.mse_loss(usage / (usage.sum() + 1e-8), uniform) * min(1.0, coverage)
    return output, diversity * config.diversity_loss_scale


def running_summary(weights: Weights, config: GlobalLocalConfig, x: Tensor, mask: Tensor) -> Tensor:
    """output(RMSNorm(query[t] · state[t]) · SiLU(gate[t])), one position after another.

    state[t] = a[t] · state[t − 1] + (1 − a[t]) · key[t] ⊗ value[t], [B, heads, key size, head width].
    """
    h, size, heads = config.hidden_size, config.summary_key_size, config.summary_heads
    query, key, value, gate, keep = linear(part(weights, "input"), x).split([size, size, h, h, heads], dim=-1)
    keep, value = torch.sigmoid(keep), value.unflatten(-1, (heads, h // heads))
    state, answers = x.new_zeros(x.shape[0], heads, size, h // heads), []
    for t in range(x.shape[1]):
        kept, content = keep[:, t, :, None, None], torch.einsum("bd,bhp->bhdp", key[:, t], value[:, t])
        state = kept * state + (1 - kept) * content * mask[:, t, :, None, None]
        answers.append(torch.einsum("bd,bhdp->bhp", query[:, t], state))
    answer = torch.stack(answers, dim=1)
    answer = answer * torch.rsqrt(answer.square().mean(dim=-1, keepdim=True) + config.layer_norm_eps)
    return linear(part(weights, "output"), answer.flatten(2) * F.silu(gate))


def delta_summary(weights: Weights, config: GlobalLocalConfig, x: Tensor, mask: Tensor) -> Tensor:
    """output(RMSNorm(query[t] · state[t]) · SiLU(gate[t])), one position after another.

    state[t] = kept + b[t] · key[t] ⊗ (value[t] − key[t] · kept), kept = a[t] · state[t − 1], [B, heads, d, p].
    """
    h, heads, eps = config.hidden_size, config.summary_heads, config.layer_norm_eps
    keys = config.summary_key_heads * config.summary_key_size
    mixed, gate, keep, write = linear(part(weights, "input"), x).split([2 * keys + h, h, heads, heads], dim=-1)
    taps = weights["taps"]  # [K, c], the last one of the position itself
    padded = F.pad(mixed * mask, (0, 0, len(taps) - 1, 0))
    mixed = F.silu(torch.stack([taps[j] * padded[:, j : j + x.shape[1]] for j in range(len(taps))]).sum(dim=0))
    query, key, value = mixed.split([keys, keys, h], dim=-1)
    query, key = (y.unflatten(-1, (config.summary_key_heads, -1)) for y in (query, key))
    query, key = (y / (y.square().sum(dim=-1, keepdim=True) + UNIT_EPS).sqrt() for y in (query, key))
    query, key = (y.repeat_interleave(heads // config.summary_key_heads, dim=2) for y in (query, key))
    value, keep, write = value.unflatten(-1, (heads, -1)), torch.sigmoid(keep), torch.sigmoid(write) * mask
    state, answers = x.new_zeros(x.shape[0], heads, config.summary_key_size, h // heads), []
    for t in range(x.shape[1]):
        kept = keep[:, t, :, None, None] * state
        wrong = value[:, t] - torch.einsum("bhd,bhdp->bhp", key[:, t], kept)
        state = kept + torch.einsum("bhd,bhp->bhdp", key[:, t], write[:, t].unsqueeze(-1) * wrong)
        answers.append(torch.einsum("bhd,bhdp->bhp", query[:, t], state))
    answer = torch.stack(answers, dim=1)
    answer = answer * torch.rsqrt(answer.square().mean(dim=-1, keepdim=True) + eps)
    return linear(part(weights, "output"), answer.flatten(2) * F.silu(gate))


def by_document(mix: Callable[[Tensor, Tensor], Tensor], x: Tensor, mask: Tensor, ends: Tensor) -> Tensor:
    """What `mix` makes of each document alone: x [B, S, h], mask [B, S, 1], ends bool [B, S] at its last token."""
    rows = []
    for i in range(len(x)):
        cuts = [0, *(ends[i].nonzero().flatten() + 1).tolist(), x.shape[1]]
        pieces = [slice(*pair) for pair in pairwise(cuts) if pair[0] < pair[1]]
        rows.append(torch.cat([mix(x[i : i + 1, piece], mask[i : i + 1, piece]) for piece in pieces], dim=1))
    return torch.cat(rows)


def attention(
    weights: Weights, config: GlobalLocalConfig, layer: int, x: Tensor, pool: Tensor, masks: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """gate · local + (1 − gate) · global, and the diversity loss. With a summary, global is router(x + s) + s."""
    mask, ends = masks
    local = by_document(partial(local_branch, part(weights, "local"), config, layer), x, mask, ends)
    answer = torch.zeros_like(x)
    if config.router_context == "summary":
        summary = delta_summary if config.summary_rule == "delta" else running_summary
        answer = by_document(partial(summary, part(weights, "summary"), config), x, mask, ends)
    routed, diversity = router(part(weights, "router"), config, x + answer, pool, mask)
    routed = routed + answer
    gate = torch.sigmoid(linear(part(weights, "gate"), x))
    return gate * local + (1 - gate) * routed, diversity


def block(
    weights: Weights, config: GlobalLocalConfig, layer: int, x: Tensor, pool: Tensor, masks: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Residual sublayers, without the router two; the norm stands before each of them, or behind each sum."""
    diversity_losses = []

    def attend(y: Tensor) -> Tensor:
        output, diversity = attention(part(weights, "attention"), config, layer, y, pool, masks)
        diversity_losses.append(diversity)
        return config.branch_gain * output

    def route(y: Tensor) -> Tensor:
        output, diversity = router(part(weights, "router"), config, y, pool, masks[0])
        diversity_losses.append(diversity)
        return output

    def feed(y: Tensor) -> Tensor:
        layers = part(weights, "feed_forward")
        return linear(part(layers, "projection"), F.gelu(linear(part(layers, "expansion"), y)))

    routers = [("router", route)] if config.block_router else []
    for name, sublayer in [("attention", attend), *routers, ("feed_forward", feed)]:
        norm = part(weights, f"{name}_norm")
        if config.norm_placement == "pre":
            x = x + sublayer(layer_norm(norm, x, config.layer_norm_eps))
        else:
            x = layer_norm(norm, x + sublayer(x), config.layer_norm_eps)
    return x, torch.stack(diversity_losses).sum()


def forward(
    weights: Weights, config: GlobalLocalConfig, input_ids: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits [B, S, V] and the diversity loss of the whole model.

    Args:
        weights: the model's state dict, `model.pool` included.
        input_ids: int64 [B, S].
        attention_mask: [B, S], 0 at padding.
    """
    x = F.embedding(input_ids, weights["model.embed_tokens.weight"])
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    ends = torch.isin(input_ids, torch.tensor(config.document_ends, dtype=torch.int64)) & (mask != 0)
    masks = mask.unsqueeze(-1).to(x.dtype), ends
    diversity = x.new_zeros(())
    for layer in range(config.num_hidden_layers):
        x, more = block(part(weights, f"model.layers.{layer}"), config, layer, x, weights["model.pool"], masks)
        diversity = diversity + more
    x = layer_norm(part(weights, "model.norm"), x, config.layer_norm_eps)
    head = part(weights, "lm_head")
    if config.tie_word_embeddings:
        head["weight"] = weights["model.embed_tokens.weight"]
    logits, cap = linear(head, x), config.logit_soft_cap
    return cap * torch.tanh(logits / cap) if cap else logits, diversity * 0.01


def loss(weights: Weights, config: GlobalLocalConfig, input_ids: Tensor, shift_labels: Tensor) -> Tensor:
    """Mean cross entropy of the targets (−100 ignored), and diversity loss and z-loss on top."""
    logits, diversity = forward(weights, config, input_ids)
    counted = torch.logsumexp(logits, dim=-1)[shift_labels >= 0]
    z_loss = config.z_loss * counted.square().mean()
    return F.cross_entropy(logits.flatten(0, 1), shift_labels.flatten(), ignore_index=-100) + diversity + z_loss
