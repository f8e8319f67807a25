"""One batch whose sequences come and go between any two tokens.

The model's state of a sequence has constant size, so that a row is put into the batch, or taken out, by copying it:
no padding, no block tables. Each row has random numbers and logits processors of its own, so its text does not depend
on its neighbours: it is the text that `generate` of transformers gives to that prompt alone, with that seed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from model.decoding_globallocal import GlobalLocalCache
from pipeline.generation.sampling import Sampling
from pipeline.generation.text import StopStrings, TextStream

PREFILL_TOKENS = 1024
"""Of a prompt that go through the model at once: bounds its memory, changes nothing else."""


@dataclass(frozen=True)
class Routing:
    """What the model read to predict one token.

    Attributes:
        gates: per block, 1 is local (the convolutions), 0 global (router and summary).
        rows: per block and router (the attention's, the block's own), the pool rows with their shares, largest first.
    """

    gates: list[float]
    rows: list[list[list[tuple[int, float]]]]


@dataclass(frozen=True)
class Token:
    """A token of a text. Log probabilities are the model's own, before temperature and the rest.

    Attributes:
        text: what it completes; empty inside a character of several tokens.
        log_probability: None where the request asked for no alternatives.
        alternatives: the likeliest tokens at this place and their log probabilities.
    """

    id: int
    text: str
    log_probability: float | None = None
    alternatives: Sequence[tuple[str, float]] = ()
    routing: Routing | None = None


@dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    Attributes:
        ids: the prompt's tokens, at least one.
        alternatives: how many likeliest tokens to name beside each token; None also leaves out its probability.
        routing: whether to tell of each token what the model read to predict it.
        echo: the first piece tells the prompt's tokens too, as `alternatives` says; nothing predicted the first one.
    """

    ids: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    alternatives: int | None = None
    routing: bool = False
    echo: bool = False


@dataclass(frozen=True)
class Piece:
    """What a step adds to a text: some of it may be held back for a while, as the beginning of a stop string."""

    text: str
    tokens: list[Token]
    finish_reason: str | None = None


class Row:
    """One sequence of the batch.

    Attributes:
        generated: ids behind the prompt, the one that ended the text included.
        echoed: tokens of the prompt that the next piece tells.
    """

    def __init__(self, request: Request, tokenizer: Any, device: torch.device, ends: Sequence[int]) -> None:
        self.request, self._ends, self._device = request, ends, device
        self.generated: list[int] = []
        self.echoed: list[Token] = []
        self._processors = request.sampling.processors()
        self._random = torch.Generator(device).manual_seed(request.sampling.seed)
        self._text, self._stop = TextStream(tokenizer), StopStrings(request.sampling.stop)
        self._held: deque[tuple[int, Token]] = deque()
        self._characters = self._shown = 0

    def choose(self, scores: Tensor) -> Tensor:
        """The next id, int64 [1, 1], from the scores [1, V]."""
        penalised = self.request.sampling.repetition_penalty != 1.0
        seen: Any = torch.tensor([[*self.request.ids, *self.generated] if penalised else [0]], device=self._device)
        scores = self._processors(seen, scores.float())
        if self.request.sampling.temperature == 0.0:
            return scores.argmax(dim=-1, keepdim=True)
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=self._random)

    def echo(self, told: Sequence[tuple[float | None, Sequence[tuple[str, float]]]]) -> None:
        """Takes the log probability and the likeliest tokens at each place of the prompt."""
        stream, ids = TextStream(self._text.tokenizer), self.request.ids
        texts = [stream.push(token) for token in ids]
        texts[-1] += stream.end()
        self.echoed = [Token(token, text, *known) for token, text, known in zip(ids, texts, told, strict=True)]

    def add(self, token: Token) -> Piece:
        """Takes the token that was chosen, with everything but its text."""
        piece = self._add(token)
        echoed, self.echoed = self.echoed, []
        return replace(piece, tokens=[*echoed, *piece.tokens]) if echoed else piece

    def _add(self, token: Token) -> Piece:
        self.generated.append(token.id)
        last = len(self.generated) >= self.request.sampling.max_new_tokens
        if token.id in self._ends:
            text = self._stop.push(self._text.end())[0] + self._stop.end()
            return Piece(text, self._release(text), "stop")
        token = replace(token, text=self._text.push(token.id) + (self._text.end() if last else ""))
        self._characters += len(token.text)
        self._held.append((self._characters, token))
        text, stopped = self._stop.push(token.text)
        if stopped:
            return Piece(text, self._release(text, cut=True), "stop")
        if last:
            text += self._stop.end()
        return Piece(text, self._release(text), "length" if last else None)

    def _release(self, text: str, cut: bool = False) -> list[Token]:
        """The tokens whose text is shown as a whole; with `cut` also what is shown of the next one."""
        self._shown += len(text)
        released = []
        while self._held and self._held[0][0] <= self._shown:
            released.append(self._held.popleft()[1])
        if cut and self._held:
            end, token = self._held.popleft()
            if shown := token.text[: len(token.text) - (end - self._shown)]:
                released.append(replace(token, text=shown))
        return released


class Decoder:
    """The batch: rows join it, each step takes one token in every row, and rows leave.

    One thread at a time may use it.

    Attributes:
        rows: those being decoded, in the order of joining.
    """

    def __init__(self, model: Any, tokenizer: Any, device: torch.device) -> None:
        self.model, self.tokenizer, self.device = model.to(device).eval(), tokenizer, device
        ends = model.config.eos_token_id
        self._ends = [ends] if isinstance(ends, int) else list(ends or [])
        self.clear()

    def clear(self) -> None:
        """Forgets all rows; the way on after an error."""
        self.rows: list[Row] = []
        self._cache = GlobalLocalCache(self.model.config.num_hidden_layers)
        self._fresh: list[tuple[Any, GlobalLocalCache]] = []  # what the prompts of the newest rows gave

    @torch.no_grad()
    def join(self, request: Request) -> Row:
        """Reads the prompt; the row takes part from the next step on.

        Raises:
            ValueError: a token id outside the vocabulary, or none at all.
        """
        vocabulary = self.model.config.vocab_size
        if not request.ids or not all(0 <= token < vocabulary for token in request.ids):
            raise ValueError(f"a prompt needs one token or more, each from 0 to {vocabulary - 1:,}")
        ids = torch.tensor([list(request.ids)], device=self.device)
        cache, output = self._cache.empty(), None
        told: list[tuple[float | None, list[tuple[str, float]]]] = [(None, [])]
        keep = 0 if request.echo else 1  # 0 keeps all
        for piece in ids.split(PREFILL_TOKENS, dim=1):
            output = self.model(piece, cache=cache, use_cache=True, logits_to_keep=keep, output_routing=request.routing)
            cache = output.cache
            if request.echo:
                following = ids[0, len(told) : len(told) + piece.shape[1]]
                told += self._told(following, output.logits[0, : len(following)], request.alternatives or 0)
                output.logits = output.logits[:, -1:].clone()  # not all until the next step
        row = Row(request, self.tokenizer, self.device, self._ends)
        if request.echo:
            row.echo(told)
        self.rows.append(row)
        self._fresh.append((output, cache))
        return row

    @torch.no_grad()
    def step(self) -> list[tuple[Row, Piece]]:
        """One token more in each row. Rows whose text ends leave.

        Raises:
            ArithmeticError: the model's scores are not numbers.
        """
        logits, routing = self._advance()
        if not bool(logits.isfinite().all()):
            raise ArithmeticError("the model's scores are not finite; its weights are damaged, or training diverged")
        chosen = torch.cat([row.choose(logits[i : i + 1]) for i, row in enumerate(self.rows)])
        tokens = self._tokens(chosen, logits, routing)
        pieces = [(row, row.add(token)) for row, token in zip(self.rows, tokens, strict=True)]
        self.leave(row for row, piece in pieces if piece.finish_reason)
        return pieces

    def leave(self, rows: Iterable[Row]) -> None:
        """Takes rows out of the batch, finished or not."""
        gone = set(map(id, rows))
        if not gone:
            return
        old = len(self.rows) - len(self._fresh)
        kept = [i for i, row in enumerate(self.rows) if id(row) not in gone]
        self._cache.reorder_cache(torch.tensor([i for i in kept if i < old], dtype=torch.int64))
        self._fresh = [self._fresh[i - old] for i in kept if i >= old]
        self.rows = [self.rows[i] for i in kept]

    def _advance(self) -> tuple[Tensor, list[Routing | None]]:
        """Scores [rows, V] of the next token of every row, and what was read for it where a row asks."""
        old = self.rows[: len(self.rows) - len(self._fresh)]
        logits: list[Tensor] = []
        routing: list[Routing | None] = []
        if old:
            ids = torch.tensor([[row.generated[-1]] for row in old], device=self.device)
            wanted = any(row.request.routing for row in old)
            output = self.model(ids, cache=self._cache, use_cache=True, output_routing=wanted)
            logits.append(output.logits[:, -1])
            routing = _routing(output, [row.request.routing for row in old])
        for output, cache in self._fresh:
            logits.append(output.logits[:, -1])
            routing += _routing(output, [output.routing is not None])
            self._cache.append(cache)
        self._fresh = []
        return torch.cat(logits), routing

    def _tokens(self, chosen: Tensor, logits: Tensor, routing: Sequence[Routing | None]) -> list[Token]:
        """Tokens without their text: chosen int64 [rows, 1], logits [rows, V]."""
        ids: list[int] = chosen[:, 0].tolist()
        asked = [row.request.alternatives for row in self.rows]
        if all(number is None for number in asked):
            return [Token(token, "", routing=read) for token, read in zip(ids, routing, strict=True)]
        told = self._told(chosen[:, 0], logits, max(number or 0 for number in asked))
        return [
            Token(token, "", None if number is None else value, names[: number or 0], read)
            for token, number, read, (value, names) in zip(ids, asked, routing, told, strict=True)
        ]

    def _told(self, chosen: Tensor, logits: Tensor, number: int) -> list[tuple[float, list[tuple[str, float]]]]:
        """Of each of the ids [n] its log probability by logits [n, V], and so many likeliest tokens with theirs."""
        log_probabilities = logits.float().log_softmax(dim=-1)
        own = log_probabilities.gather(1, chosen.unsqueeze(1))[:, 0].tolist()
        best = log_probabilities.topk(number, dim=-1)
        likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        names = [[(self.name(other), value) for other, value in zip(*pair, strict=True)] for pair in likeliest]
        return list(zip(own, names, strict=True))

    def name(self, token_id: int) -> str:
        """A token's text by itself; the piece's own name where it has none, or only a part of a character."""
        text: str = self.tokenizer.decode([token_id])
        return text if text and "\ufffd" not in text else str(self.tokenizer.convert_ids_to_tokens(token_id))


def _routing(output: Any, wanted: Sequence[bool]) -> list[Routing | None]:
    """Of the last position of each row of the batch."""
    if output.routing is None:
        return [None] * len(wanted)
    gates = output.routing.gates[:, -1].tolist()
    rows, shares = output.routing.rows[:, -1].tolist(), output.routing.shares[:, -1].tolist()
    found: list[Routing | None] = []
    for i, asked in enumerate(wanted):
        pairs = [
            [list(zip(*both, strict=True)) for both in zip(*block, strict=True)]
            for block in zip(rows[i], shares[i], strict=True)
        ]
        found.append(Routing(gates[i], pairs) if asked else None)
    return found


def decode(decoder: Decoder, requests: Sequence[Request], batch_size: int) -> Iterator[tuple[int, Piece]]:
    """Texts of all requests as they come, each piece with its request's number; the next joins where one has ended."""
    numbers: dict[int, int] = {}
    waiting = deque(enumerate(requests))
    while waiting or decoder.rows:
        while waiting and len(decoder.rows) < batch_size:
            number, request = waiting.popleft()
            numbers[id(decoder.join(request))] = number
        for row, piece in decoder.step():
            yield numbers[id(row)], piece
