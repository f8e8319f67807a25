"""Operations with their own backward: what autograd would do exactly, but with less work or memory.

All of them are deterministic on the CPU for any number of threads, and on the GPU: sums over tokens that
chose the same row are taken in the order of the tokens (a stable sort), never by atomic additions. Plain torch stands
here; on a GPU the kernels of `kernels_*_globallocal.py` do the same where Triton is installed.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .configuration_globallocal import PIECE_ENTRIES, SUMMARY_CHUNK
from .library_globallocal import has_kernels, opaque

try:  # by their names: so the files travel with an exported model
    from .kernels_convolution_globallocal import convolve, input_gradient, suits_kernels, weight_gradient
    from .kernels_loss_globallocal import cross_entropy_by_kernel_
    from .kernels_router_globallocal import dot_by_kernel, mix_by_kernel, sum_by_row_by_kernel, top_rows_by_kernel
    from .kernels_summary_globallocal import fits, summary_attention
except ImportError:  # without Triton `has_kernels` is false
    pass

# Largest temporary, in elements: a block of pool scores or of vocabulary logits; on a GPU so many times as large.
SCORE_BLOCK_ELEMENTS = 2**22
LOGIT_BLOCK_ELEMENTS = 2**23
GPU_BLOCK_FACTOR = 32
SCAN_CHUNK = 8  # steps that the chunks of a linear recurrence take side by side


def block_rows(elements: int, table: Tensor, num_rows: int) -> int:
    """How many of `num_rows` tokens to compare with a table [N, c] at a time; at least one."""
    elements *= GPU_BLOCK_FACTOR if table.is_cuda else 1
    return max(1, min(num_rows, elements // table.shape[0]))


class RowChoice:
    """Which k rows of a table of N every one of T tokens chose, and the same thing grouped by row.

    Args:
        indices: int64 [T, k], values in [0, N).
        num_rows: N.
        grouped: False where only the chosen rows are read: no sums by row, no gradients.

    Attributes:
        order: int64 [T·k], the choices sorted by row, within a row in the order of the tokens.
        row_starts: int64 [N + 1], where each row begins in `order`.
        piece_starts, piece_rows: the rows cut into pieces, for kernels; see `kernels_router_globallocal.py`.
    """

    def __init__(self, indices: Tensor, num_rows: int, grouped: bool = True) -> None:
        self.indices = indices
        if not grouped:
            return
        narrow = torch.int16 if num_rows < 2**15 else torch.int32  # short keys are sorted in fewer passes
        ordered, self.order = indices.reshape(-1).to(narrow).sort(stable=True)
        rows = torch.arange(num_rows + 1, device=indices.device, dtype=narrow)
        self.row_starts = self.piece_starts = self.piece_rows = torch.searchsorted(ordered, rows)
        if not has_kernels(indices):
            return
        pieces = (self.row_starts.diff() + (PIECE_ENTRIES - 1)) // PIECE_ENTRIES
        self.piece_starts = F.pad(pieces.cumsum(0), (1, 0))
        # How many pieces there are is only known on the device: at most so many.
        most = -(-indices.numel() // PIECE_ENTRIES) + num_rows
        numbers = torch.arange(most, device=indices.device)
        self.piece_rows = torch.searchsorted(self.piece_starts, numbers, right=True) - 1

    def sum_by_row(self, values: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Σ over the choices of row n of `values` [T, k], each times its token's row of `tokens` [T, c].

        Returns [N, c], or nothing to read without `tokens`, and the sums of the values alone, [N].
        """
        return _sum_by_row(values, tokens, self.order, self.row_starts, self.piece_starts, self.piece_rows)


def _sum_by_row_shape(
    values: Tensor, tokens: Tensor | None, order: Tensor, row_starts: Tensor, piece_starts: Tensor, piece_rows: Tensor
) -> tuple[Tensor, Tensor]:
    rows = row_starts.shape[0] - 1
    sums = values.new_empty(rows, 0) if tokens is None else tokens.new_empty(rows, tokens.shape[1])
    return sums, values.new_empty(rows)


@opaque(_sum_by_row_shape)
def _sum_by_row(
    values: Tensor, tokens: Tensor | None, order: Tensor, row_starts: Tensor, piece_starts: Tensor, piece_rows: Tensor
) -> tuple[Tensor, Tensor]:
    if has_kernels(values):
        return sum_by_row_by_kernel(values, tokens, order, row_starts, piece_starts, piece_rows)
    ordered, offsets = values.reshape(-1)[order], row_starts[:-1]
    entries = torch.arange(len(order), device=order.device)
    totals = F.embedding_bag(entries, ordered.unsqueeze(1), offsets, mode="sum").squeeze(1)
    if tokens is None:
        return values.new_empty(len(offsets), 0), totals.clone()
    choice = order // values.shape[1]
    return F.embedding_bag(choice, tokens, offsets, mode="sum", per_sample_weights=ordered), totals.clone()


def _dot_shape(table: Tensor, indices: Tensor, tokens: Tensor) -> Tensor:
    return table.new_empty(indices.shape)


@opaque(_dot_shape)
def _dot(table: Tensor, indices: Tensor, tokens: Tensor) -> Tensor:
    """tokens[t] · table[indices[t, j]] for every t, j: [T, k]."""
    if has_kernels(tokens):
        return dot_by_kernel(table, indices, tokens)
    return torch.bmm(table[indices], tokens.unsqueeze(2)).squeeze(2)


def _mix_shape(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return table.new_empty(indices.shape[0], table.shape[1])


@opaque(_mix_shape)
def _mix(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Σ_j weights[t, j] · table[indices[t, j]] for every t: [T, c]."""
    if has_kernels(weights):
        return mix_by_kernel(table, indices, weights)
    return F.embedding_bag(indices, table, mode="sum", per_sample_weights=weights)


class _DotRows(Function):
    @staticmethod
    def forward(ctx, tokens, table, bias, choice):
        ctx.save_for_backward(tokens, table)
        ctx.choice = choice
        return _dot(table, choice.indices, tokens) + bias[choice.indices]

    @staticmethod
    def backward(ctx, grad):
        tokens, table = ctx.saved_tensors
        grad = grad.contiguous()
        grad_table, grad_bias = ctx.choice.sum_by_row(grad, tokens)
        return _mix(table, ctx.choice.indices, grad), grad_table, grad_bias, None


class _MixRows(Function):
    @staticmethod
    def forward(ctx, weights, table, choice):
        ctx.save_for_backward(weights, table)
        ctx.choice = choice
        return _mix(table, choice.indices, weights)

    @staticmethod
    def backward(ctx, grad):
        weights, table = ctx.saved_tensors
        grad = grad.contiguous()
        grad_table = ctx.choice.sum_by_row(weights, grad)[0] if ctx.needs_input_grad[1] else None
        return _dot(table, ctx.choice.indices, grad), grad_table, None


class _SumByRow(Function):
    @staticmethod
    def forward(ctx, values, choice):
        ctx.choice = choice
        return choice.sum_by_row(values)[1]

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.choice.indices], None


def dot_rows(tokens: Tensor, table: Tensor, bias: Tensor, choice: RowChoice) -> Tensor:
    """Scores of the chosen rows alone: tokens [T, c], table [N, c], bias [N] → [T, k].

    Equal to gathering from `tokens @ table.T + bias`, whose dense gradient would be zero elsewhere.
    """
    return _DotRows.apply(tokens, table, bias, choice)


def mix_rows(weights: Tensor, table: Tensor, choice: RowChoice) -> Tensor:
    """Weighted sum of each token's rows: weights [T, k], table [N, c] → [T, c]."""
    return _MixRows.apply(weights, table, choice)


def sum_by_row(values: Tensor, choice: RowChoice) -> Tensor:
    """How much each row received: values [T, k] → [N]."""
    return _SumByRow.apply(values, choice)


def _top_rows_shape(tokens: Tensor, table: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values = tokens.new_empty(tokens.shape[0], k)
    return values, torch.empty_like(values, dtype=torch.int64)


@opaque(_top_rows_shape)
def _top_rows(tokens: Tensor, table: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if has_kernels(tokens):
        return top_rows_by_kernel(tokens, table, bias, k)
    block = block_rows(SCORE_BLOCK_ELEMENTS, table, tokens.shape[0])
    scores = tokens.new_empty(block, table.shape[0])  # `out=`: no checkpointing policy keeps it
    parts = [
        _top_columns(torch.addmm(bias, part, table.T, out=scores[: part.shape[0]]), k) for part in tokens.split(block)
    ]
    return torch.cat([values for values, _ in parts]), torch.cat([indices for _, indices in parts])


@torch.no_grad()
def top_rows(tokens: Tensor, table: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and int64 indices, each [T, min(k, N)], of the largest of `tokens @ table.T + bias`.

    The [T, N] scores never exist: plain torch works in blocks of tokens, a kernel in blocks of both.
    """
    return _top_rows(tokens, table, bias, min(k, table.shape[0]))


def _top_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k largest in each row of [n, N]: they lie in the k groups with the largest maxima."""
    columns = scores.shape[1]
    size = next((size for size in range(64, 15, -1) if columns % size == 0 and columns >= size * k), None)
    if size is None:
        values, indices = scores.topk(k, dim=-1)
        return values, indices
    groups = scores.unflatten(1, (-1, size))
    best = groups.amax(dim=2).topk(k, dim=-1).indices
    values, place = groups.gather(1, best.unsqueeze(2).expand(-1, -1, size)).flatten(1).topk(k, dim=-1)
    return values, best.gather(1, place // size) * size + place % size


def _taps(padded: Tensor, length: int, kernel_size: int, dilation: int) -> list[Tensor]:
    """Views of the K inputs of a causal convolution, each [B, S, h]; the last is the current position."""
    start = padded.shape[1] - length - (kernel_size - 1) * dilation
    return [padded[:, start + j * dilation :][:, :length] for j in range(kernel_size)]


def _convolve(padded: Tensor, weight: Tensor, bias: Tensor, length: int, dilations: list[int]) -> Tensor:
    """[B, P + S, h], S positions behind P ≥ (K − 1) · max dilation earlier ones → [B, S, n·h]."""
    kernel_size = weight.shape[2] // padded.shape[2]
    outputs = [
        F.linear(torch.cat(_taps(padded, length, kernel_size, dilation), dim=-1), matrix, offset)
        for matrix, offset, dilation in zip(weight, bias, dilations, strict=True)
    ]
    return torch.cat(outputs, dim=-1)


def _pad(x: Tensor, weight: Tensor, dilations: list[int]) -> Tensor:
    """Zeros in front of a sequence, as far as its convolutions reach."""
    return F.pad(x, (0, 0, (weight.shape[2] // x.shape[2] - 1) * max(dilations), 0))


@opaque(lambda x, weight, bias, dilations: x.new_empty(*x.shape[:2], weight.shape[0] * weight.shape[1]))
def convolution_forward(x: Tensor, weight: Tensor, bias: Tensor, dilations: Tensor) -> Tensor:
    """Output [B, S, n·h] of `causal_convolutions` without history."""
    steps = dilations.tolist()
    if has_kernels(x) and suits_kernels(x, weight, bias):
        return convolve(x, weight, bias, steps)
    return _convolve(_pad(x, weight, steps), weight, bias, x.shape[1], steps)


@opaque(lambda grad, x, weight, dilations: (x.new_empty(x.shape), weight.new_empty(weight.shape)))
def convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, dilations: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x [B, S, h] and weight [n, h, K·h] from that of the output [B, S, n·h]."""
    steps = dilations.tolist()
    length, kernel_size = x.shape[1], weight.shape[2] // x.shape[2]
    if has_kernels(x) and suits_kernels(x, weight, grad):
        return input_gradient(grad, weight, steps), weight_gradient(grad, x, kernel_size, steps)
    padded = _pad(x, weight, steps)
    grad_padded, grad_weight = torch.zeros_like(padded), weight.new_empty(weight.shape)
    for i, (part, dilation) in enumerate(zip(grad.chunk(len(weight), dim=-1), steps, strict=True)):
        rows = part.flatten(0, 1)
        taps = torch.cat(_taps(padded, length, kernel_size, dilation), dim=-1)
        torch.mm(rows.T, taps.flatten(0, 1), out=grad_weight[i])
        grad_taps = (rows @ weight[i]).view_as(taps).chunk(kernel_size, dim=-1)
        for target, source in zip(_taps(grad_padded, length, kernel_size, dilation), grad_taps, strict=True):
            target += source
    return grad_padded[:, -length:].clone(), grad_weight


class _CausalConvolutions(Function):
    """Keeps the input alone for the backward pass; the taps side by side, K times as large, are not kept."""

    @staticmethod
    def forward(ctx, x, weight, bias, dilations):
        ctx.save_for_backward(x, weight, dilations)
        return convolution_forward(x, weight, bias, dilations)

    @staticmethod
    def backward(ctx, grad):
        x, weight, dilations = ctx.saved_tensors
        grad_x, grad_weight = convolution_backward(grad.contiguous(), x, weight, dilations)
        return grad_x, grad_weight, grad.sum(dim=(0, 1)).view(len(weight), -1), None


def causal_convolutions(
    x: Tensor, weight: Tensor, bias: Tensor, dilations: Tensor, history: Tensor | None = None
) -> Tensor:
    """Parallel dilated causal convolutions, each a matrix product over shifted inputs.

    On a GPU without history, kernels that copy nothing; elsewhere products over the shifted inputs side by side.

    Args:
        x: [B, S, h].
        weight: [n, h, K·h], one matrix a dilation; tap K − 1 is the current position, tap j lies
            (K − 1 − j) · dilation before it.
        bias: [n, h].
        dilations: int64 [n], on the CPU: as data, so that layers which differ in them share what is compiled.
        history: [B, P, h], P ≥ (K − 1) · max dilation positions before x; None for zeros.

    Returns:
        [B, S, n·h], the outputs side by side.
    """
    if history is not None:
        return _convolve(torch.cat([history, x], dim=1), weight, bias, x.shape[1], dilations.tolist())
    return _CausalConvolutions.apply(x, weight, bias, dilations)


def _scan(decay: Tensor, update: Tensor, reverse: bool = False) -> Tensor:
    """state[t] = decay[t] · state[t − 1] + update[t] from state 0, [B, S, c]; reversed, from t + 1 instead.

    All chunks step along side by side; then the chunks' last states are scanned the same way, and what was there
    before a chunk is added to it. So the data are passed over a few times, however long the sequence.
    """
    length = update.shape[1]
    if length == 1:
        return update
    num_chunks = -(-length // SCAN_CHUNK)
    missing = num_chunks * SCAN_CHUNK - length
    padding = (0, 0, missing, 0) if reverse else (0, 0, 0, missing)  # where the scan ends
    decay, state = (F.pad(x, padding).unflatten(1, (num_chunks, SCAN_CHUNK)) for x in (decay, update))
    passed = decay.clone()  # the share of what was before the chunk
    steps = range(SCAN_CHUNK - 1, -1, -1) if reverse else range(SCAN_CHUNK)
    for previous, t in pairwise(steps):
        state[:, :, t].addcmul_(decay[:, :, t], state[:, :, previous])
        passed[:, :, t].mul_(passed[:, :, previous])
    if num_chunks > 1:
        ends = _scan(passed[:, :, t].contiguous(), state[:, :, t].contiguous(), reverse)
        into, before = (slice(None, -1), ends[:, 1:]) if reverse else (slice(1, None), ends[:, :-1])
        state[:, into].addcmul_(passed[:, into], before.unsqueeze(2))
    state = state.flatten(1, 2)
    return state[:, missing:] if reverse else state[:, :length]


class _LinearRecurrence(Function):
    """The gradient of a linear recurrence is the same recurrence backwards in time."""

    @staticmethod
    def forward(ctx, decay, update):
        state = _scan(decay, update)
        ctx.save_for_backward(decay, state)
        return state

    @staticmethod
    def backward(ctx, grad):
        decay, state = ctx.saved_tensors
        later_decay = F.pad(decay[:, 1:], (0, 0, 0, 1))
        grad_update = _scan(later_decay, grad, reverse=True)
        return grad_update * F.pad(state[:, :-1], (0, 0, 1, 0)), grad_update


def linear_recurrence(decay: Tensor, update: Tensor) -> Tensor:
    """state[t] = decay[t] · state[t − 1] + update[t] along dimension 1, from state 0: [B, S, c] each.

    Decays in [0, 1] keep every intermediate product there: nothing is divided.
    """
    return _LinearRecurrence.apply(decay, update)


def decayed_attention(
    query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """answer[t] = query[t] · state[t], state[t] = keep[t] · state[t − 1] + key[t] ⊗ value[t], a state a head.

    In chunks: inside one the answers are an attention with decaying scores, and what was before it is one state.
    (State space duality, https://arxiv.org/abs/2405.21060, section 6.)

    Args:
        query, key: [B, S, d], for all heads.
        value: [B, S, H, p].
        log_keep: [B, S, H], logarithms of the shares kept, at most 0; float32 or wider.
        state: [B, d, H, p] before the first position, or None for zeros.

    Returns:
        Answers [B, S, H, p], and the last state [B, d, H, p], in the dtype of `log_keep`; a kernel on the GPU leaves
        the answers in the value's.
    """
    parts = (query, key, value, log_keep)
    if has_kernels(query) and state is None and query.shape[1] > 1 and fits(*parts):
        return summary_attention(*parts)
    wide, length = log_keep.dtype, query.shape[1]
    size = min(SUMMARY_CHUNK, length)
    missing = -length % size
    if missing:  # steps that change nothing
        query, key, log_keep = (F.pad(x, (0, 0, 0, missing)) for x in (query, key, log_keep))
        value = F.pad(value, (0, 0, 0, 0, 0, missing))
    query, key, value = (x.unflatten(1, (-1, size)) for x in (query, key, value))  # [B, n, C, d or H, p]
    passed = log_keep.unflatten(1, (-1, size)).cumsum(dim=2)  # [B, n, C, H], from the chunk's start

    by_head = passed.transpose(2, 3)
    later = torch.ones(size, size, dtype=torch.bool, device=query.device).triu(1)
    decay = (by_head.unsqueeze(-1) - by_head.unsqueeze(-2)).masked_fill(later, float("-inf")).exp()
    scores = (query @ key.transpose(2, 3)).unsqueeze(2) * decay  # [B, n, H, C, C]
    inside = (scores.to(value.dtype) @ value.transpose(2, 3)).transpose(2, 3)

    # Keys and queries are of all heads, so that one product serves them all: [d, C] · [C, H · p].
    until_end = (passed[:, :, -1:] - passed).exp().unsqueeze(-1)
    added = (key.transpose(2, 3).to(wide) @ (value * until_end).flatten(3)).unflatten(-1, value.shape[3:])
    kept = passed[:, :, -1, None, :, None].exp()  # of the state, by a whole chunk: [B, n, 1, H, 1]
    if state is not None:
        added = torch.cat([torch.addcmul(added[:, :1], kept[:, :1], state.unsqueeze(1)), added[:, 1:]], dim=1)
    states = linear_recurrence(kept.expand_as(added).flatten(2), added.flatten(2)).view_as(added)
    first = torch.zeros_like(states[:, :1]) if state is None else state.unsqueeze(1).to(wide)
    before = torch.cat([first, states[:, :-1]], dim=1)
    asked = (query.to(wide) @ before.flatten(3)).unflatten(-1, value.shape[3:])
    answer = inside + asked * passed.exp().unsqueeze(-1)
    return answer.flatten(1, 2)[:, :length], states[:, -1]


def _cross_entropy(logits: Tensor, targets: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [T], float32 or wider, of logits [T, V], and their gradients, in `memory`, which is as wide.

    targets: int64 [T]; what stands at negative ones does not count and is left to the caller to drop.
    """
    goal = targets.clamp_min(0).unsqueeze(1)
    error = torch.softmax(logits, dim=1, dtype=memory.dtype, out=memory)
    # log Σ exp by way of the largest entry: its probability cannot vanish.
    normaliser = logits.amax(dim=1, keepdim=True).to(error.dtype) - error.amax(dim=1, keepdim=True).log()
    losses = (normaliser - logits.gather(1, goal)).squeeze(1)
    error.scatter_add_(1, goal, torch.full_like(normaliser, -1.0))  # softmax − one-hot
    return losses, error if logits.dtype == error.dtype else logits.copy_(error)


class _VocabularyLoss(Function):
    """Sum of cross entropies; its gradient is computed block by block along with the loss."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        need = ctx.needs_input_grad
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if need[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if need[2] else None
        total = hidden.new_zeros((), dtype=wide)
        block = block_rows(LOGIT_BLOCK_ELEMENTS, weight, hidden.shape[0])
        memory = hidden.new_empty(block, weight.shape[0])  # the same for all blocks
        wide_memory = None if has_kernels(hidden) else torch.empty_like(memory, dtype=wide)
        for start in range(0, hidden.shape[0], block):
            part, goal = hidden[start : start + block], targets[start : start + block]
            valid = (goal >= 0).to(hidden.dtype)
            logits = torch.addmm(bias, part, weight.T, out=memory[: len(part)])
            if wide_memory is None:
                losses, error = cross_entropy_by_kernel_(logits, goal), logits  # in place
            else:
                losses, error = _cross_entropy(logits, goal, wide_memory[: len(part)])
            total += (losses * valid).sum()
            if not any(need):
                continue
            # Where nothing counts, the input is as good as absent.
            if grad_bias is not None:
                grad_bias += error.sum(dim=0, dtype=wide) if wide_memory is None else torch.mv(error.T, valid)
            if grad_hidden is not None:
                torch.mm(error, weight, out=grad_hidden[start : start + block]).mul_(valid.unsqueeze(1))
            if grad_weight is not None:
                grad_weight += error.T @ (part * valid.unsqueeze(1))
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype)
        return total

    @staticmethod
    def backward(ctx, grad):
        scaled = [
            None if part is None else (part * grad).to(dtype)
            for part, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None


def vocabulary_loss(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of `hidden @ weight.T + bias` against `targets`, in blocks of tokens.

    The [T, V] logits never exist; the loss and its reductions are float32 (float64 for float64 inputs).

    Args:
        hidden: [T, h]. weight: [V, h]. bias: [V].
        targets: int64 [T]; negative values (−100) do not count. Without any valid target the loss is 0.
    """
    valid_tokens = (targets >= 0).sum().clamp_min(1)
    return _VocabularyLoss.apply(hidden, weight, bias, targets) / valid_tokens
