"""Two relatives of GlobalLocal in plain torch: Gated DeltaNet (arXiv:2412.06464) and Mamba-2 (arXiv:2405.21060).

Both keep a matrix a head that each token changes and asks; B batch, S sequence, H heads, d key width, p value width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 64
TAPS = 4  # of the short convolutions


def matrix_memory(query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor, rate: Tensor | None = None) -> Tensor:
    """answer[t] = query[t] · state[t], computed in chunks of 64 positions: [B, S, H, p].

    state[t] = keep[t] · state[t − 1] + key[t] ⊗ written[t]. What is written is value[t], or with `rate` (the gated
    delta rule) rate[t] · (value[t] − key[t] · keep[t] · state[t − 1]): the value in place of what the key held.

    Args:
        query, key: [B, S, H, d].
        value: [B, S, H, p].
        log_keep: [B, S, H], at most 0.
        rate: [B, S, H] in 0 … 1.
    """
    length = query.shape[1]
    size = min(CHUNK, length)
    query, key, value, log_keep = (_chunks(x, size) for x in (query, key, value, log_keep.unsqueeze(-1)))
    passed = log_keep.cumsum(dim=3)  # [B, H, n, C, 1], from the chunk's start
    later = torch.ones(size, size, dtype=torch.bool).triu(1)
    decay = (passed - passed.transpose(3, 4)).masked_fill(later, float("-inf")).exp()
    scores = query @ key.transpose(3, 4) * decay
    written, erased = value, None
    if rate is not None:
        rate = _chunks(rate.unsqueeze(-1), size)
        system = torch.eye(size, dtype=key.dtype) + (rate * (key @ key.transpose(3, 4)) * decay).tril(-1)
        both = torch.cat([rate * value, rate * passed.exp() * key], dim=-1)
        solved = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
        written, erased = solved.split([value.shape[-1], key.shape[-1]], dim=-1)
    asked, kept = query * passed.exp(), passed[:, :, :, -1:].exp()
    until_end = key * (passed[:, :, :, -1:] - passed).exp()
    state = key.new_zeros(*key.shape[:2], key.shape[-1], value.shape[-1])
    answers = []
    for n in range(key.shape[2]):
        new = written[:, :, n] if erased is None else written[:, :, n] - erased[:, :, n] @ state
        answers.append(asked[:, :, n] @ state + scores[:, :, n] @ new)
        state = kept[:, :, n] * state + until_end[:, :, n].transpose(2, 3) @ new
    return torch.cat(answers, dim=2).transpose(1, 2)[:, :length]


def _chunks(x: Tensor, size: int) -> Tensor:
    """[B, S, H, c] → [B, H, n, size, c]; the steps that fill the last chunk change nothing."""
    return F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size)).transpose(1, 2).unflatten(2, (-1, size))


class ShortConvolution(nn.Module):
    """A causal convolution of four taps a channel, and SiLU: [B, S, c] → [B, S, c]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(TAPS, channels) * TAPS**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, TAPS - 1, 0))
        return F.silu(sum(self.weight[i] * padded[:, i : i + x.shape[1]] for i in range(TAPS)))


class Forgetting(nn.Module):
    """Logarithms of the shares that each head keeps, −A · step, and the steps: softplus(Wx + b) of the token.

    Begun with steps of 0.1 to 0.01 and A of 1 to 1/16: time constants from ten tokens to 1,600, spread over the heads.
    The papers draw both at random, A up to 16; among two or four heads that can leave none that remembers.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, heads, bias=False)
        steps = torch.logspace(-1, -2, heads)
        self.bias = nn.Parameter(torch.log(torch.expm1(steps)))
        self.log_rate = nn.Parameter(-torch.linspace(0, 4, heads) * math.log(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, h] → log_keep [B, S, H], steps [B, S, H]."""
        steps = F.softplus(self.projection(x) + self.bias)
        return -self.log_rate.exp() * steps, steps


class GatedDeltaNet(nn.Module):
    """The gated delta rule: short convolutions, normed keys and queries, values twice as wide as keys; two heads."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        key_size = width // heads
        self.heads, keys, values = heads, heads * key_size, 2 * heads * key_size
        self.parts = [keys + keys + values, values, heads]
        self.input = nn.Linear(width, sum(self.parts), bias=False)
        self.convolution = ShortConvolution(self.parts[0])
        self.forgetting = Forgetting(width, heads)
        self.norm = nn.RMSNorm(2 * key_size)
        self.output = nn.Linear(values, width, bias=False)
        self.state_size = keys * 2 * key_size + (TAPS - 1) * self.parts[0]

    def forward(self, x: Tensor) -> Tensor:
        mixed, gate, rate = self.input(x).split(self.parts, dim=-1)
        query, key, value = (
            self.convolution(mixed)
            .unflatten(-1, (4 * self.heads, -1))
            .split([self.heads, self.heads, 2 * self.heads], dim=2)
        )
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        value = value.reshape(*value.shape[:2], self.heads, -1)
        answer = matrix_memory(query, key, value, self.forgetting(x)[0], torch.sigmoid(rate))
        return self.output(self.norm(answer).flatten(2) * F.silu(gate))


class Mamba2(nn.Module):
    """State space duality: one key and one query for all heads, values of twice the model's width."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, key_size, inner = heads, width, 2 * width
        self.parts = [inner, inner + 2 * key_size]
        self.mixed = [inner, key_size, key_size]
        self.input = nn.Linear(width, sum(self.parts), bias=False)
        self.convolution = ShortConvolution(self.parts[1])
        self.forgetting = Forgetting(width, heads)
        self.passed_by = nn.Parameter(torch.ones(heads, 1))
        self.norm = nn.RMSNorm(inner)
        self.output = nn.Linear(inner, width, bias=False)
        self.state_size = inner * key_size + (TAPS - 1) * self.parts[1]

    def forward(self, x: Tensor) -> Tensor:
        gate, mixed = self.input(x).split(self.parts, dim=-1)
        value, key, query = self.convolution(mixed).split(self.mixed, dim=-1)
        value = value.unflatten(-1, (self.heads, -1))
        key, query = (y.unsqueeze(2).expand(-1, -1, self.heads, -1) for y in (key, query))
        log_keep, steps = self.forgetting(x)
        answer = matrix_memory(query, key, value * steps.unsqueeze(-1), log_keep) + self.passed_by * value
        return self.output(self.norm(answer.flatten(2) * F.silu(gate)))


class SwiGLU(nn.Module):
    """The Llama's feed-forward."""

    state_size = 0

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, 2 * inner, bias=False)
        self.output = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.input(x).chunk(2, dim=-1)
        return self.output(F.silu(gate) * value)


class Relative(nn.Module):
    """Embedding, residual sublayers with an RMS norm in front of each, final norm, tied head.

    Begun as GlobalLocal is: matrices with deviation 1/√fan_in, those that write to the residual stream smaller by
    1/√sublayers, the embedding with 0.5/√width.
    """

    def __init__(self, vocab_size: int, width: int, sublayers: list[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.sublayers = nn.ModuleList(sublayers)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in sublayers)
        self.norm = nn.RMSNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.5 * width**-0.5)
        for name, module in self.sublayers.named_modules():
            if isinstance(module, nn.Linear):
                scale = len(sublayers) ** -0.5 if name.endswith("output") else 1.0
                nn.init.normal_(module.weight, std=scale * module.in_features**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [B, S] → logits [B, S, V]."""
        x = self.embedding(ids)
        for norm, sublayer in zip(self.norms, self.sublayers, strict=True):
            x = x + sublayer(norm(x))
        return F.linear(self.norm(x), self.embedding.weight)

    def state_size(self) -> int:
        """Numbers that decoding has to keep for one sequence, however long."""
        return sum(sublayer.state_size for sublayer in self.sublayers)


def relative(mixer: type[GatedDeltaNet] | type[Mamba2], vocab_size: int, width: int, layers: int = 3) -> Relative:
    """Layers of a mixer and a SwiGLU, as the Llama has them."""
    parts = [(mixer(width), SwiGLU(width, round(width / 3) * 8)) for _ in range(layers)]
    return Relative(vocab_size, width, [part for layer in parts for part in layer])
