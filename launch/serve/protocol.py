"""OpenAI's completions: what a client may send, and the forms of answers and errors.

https://platform.openai.com/docs/api-reference/completions; beyond it there are `top_k`, `repetition_penalty` and
`routing`, which asks what the model read for each token.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from launch.serve.limits import LONGEST_STOP, MOST_LOGPROBS, MOST_SEQUENCES, MOST_STOPS, Limits
from pipeline.generation.sampling import Sampling, prompt_ids

if TYPE_CHECKING:
    from pipeline.generation.decoder import Token

LARGEST_SEED = 2**63 - 1


class Refusal(Exception):
    """An answer other than 200, in OpenAI's form.

    Attributes:
        headers: of HTTP.
    """

    def __init__(
        self, status: int, problems: list[str], param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__("\n".join(problems))
        self.status, self.param, self.code = status, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> dict[str, Any]:
        kind = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        return {
            "error": {
                "message": str(self),
                "type": kind.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }


@dataclass(frozen=True)
class Prompt:
    """A prompt as ids, and as the text that `echo` gives back."""

    ids: list[int]
    text: str


@dataclass(frozen=True)
class Server:
    """What a request is held against."""

    name: str
    tokenizer: Any
    vocab_size: int
    limits: Limits


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class Completion(BaseModel):
    """The body of a request. A field that is null counts as absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: Any
    model: str = ""
    max_tokens: Annotated[int, Field(ge=0)] = Sampling.max_new_tokens
    temperature: Annotated[float, Field(ge=0, le=100)] = Sampling.temperature
    top_p: Annotated[float, Field(gt=0, le=1)] = Sampling.top_p
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = Sampling.top_k
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = Sampling.repetition_penalty
    seed: Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)] | None = None
    stop: Any = []
    n: Annotated[int, Field(ge=1, le=MOST_SEQUENCES)] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool = False
    routing: bool = False
    user: str = ""
    # Of OpenAI's fields these are known, and only their neutral values are taken.
    best_of: int | None = None
    suffix: Literal[""] = ""
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data

    @field_validator("prompt")
    @classmethod
    def _prompts(cls, value: Any, info: ValidationInfo) -> list[Prompt]:
        server: Server = _server(info)
        parts = [value] if isinstance(value, str) or (isinstance(value, list) and _are_ids(value)) else value
        if not isinstance(parts, list) or not parts or not all(isinstance(p, str) or _are_ids(p) for p in parts):
            raise ValueError("must be a text, a list of token ids, or a list of such; none may be empty lists")
        if len(parts) > MOST_SEQUENCES:
            raise ValueError(f"holds {len(parts):,} prompts; the limit is {MOST_SEQUENCES}")
        return [_read_prompt(part, server) for part in parts]

    @field_validator("max_tokens")
    @classmethod
    def _bounded(cls, value: int, info: ValidationInfo) -> int:
        limit = _server(info).limits.max_new_tokens
        if value > limit:
            raise ValueError(f"is {value:,}; the limit of this server is {limit:,}")
        return value

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: Any) -> list[str]:
        stops = [value] if isinstance(value, str) else value
        texts = [stop for stop in stops if isinstance(stop, str)] if isinstance(stops, list) else []
        if texts != stops or len(texts) > MOST_STOPS or not all(0 < len(stop) <= LONGEST_STOP for stop in texts):
            raise ValueError(f"must be up to {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters")
        return texts

    @model_validator(mode="after")
    def _together(self, info: ValidationInfo) -> Completion:
        limits = _server(info).limits
        most = min(MOST_SEQUENCES, limits.max_batch + limits.max_waiting)  # more would never find room
        problems = []
        if len(self.prompt) * self.n > most:
            problems.append(f"prompt, n: {len(self.prompt)} × {self.n} texts; the limit is {most}")
        if self.best_of is not None and self.best_of != self.n:
            problems.append(f"best_of: is {self.best_of}; only n, {self.n}, is known: leave it out")
        if self.max_tokens == 0 and not self.echo:
            problems.append("max_tokens: is 0; without echo that is no answer: ask for 1 or more, or set echo")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def samplings(self) -> list[Sampling]:
        """One per text of a prompt: their seeds follow each other, at random where none was given."""
        seed = random.randrange(2**31) if self.seed is None else self.seed
        return [
            Sampling(
                max(1, self.max_tokens),
                self.temperature,
                self.top_k,
                self.top_p,
                self.repetition_penalty,
                seed + i,
                self.stop,
            )
            for i in range(self.n)
        ]


def _server(info: ValidationInfo) -> Server:
    assert isinstance(info.context, Server)
    return info.context


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _read_prompt(part: str | list[int], server: Server) -> Prompt:
    ids = prompt_ids(server.tokenizer, part) if isinstance(part, str) else part
    if len(ids) > server.limits.max_prompt_tokens:
        raise ValueError(f"has {len(ids):,} tokens; the limit of this server is {server.limits.max_prompt_tokens:,}")
    if wrong := next((token for token in ids if not 0 <= token < server.vocab_size), None):
        raise ValueError(f"holds token {str(wrong)[:30]}; the model knows 0 to {server.vocab_size - 1:,}")
    return Prompt(ids, part if isinstance(part, str) else server.tokenizer.decode(ids, skip_special_tokens=True))


def read_completion(body: bytes, server: Server) -> Completion:
    """Raises Refusal with everything that is wrong."""
    try:
        asked = Completion.model_validate_json(body, context=server)
    except ValidationError as error:
        found = error.errors(include_url=False)
        first = found[0]["loc"]
        raise Refusal(
            400, [line for item in found for line in _lines(item)], str(first[0]) if first else None
        ) from None
    if asked.model not in ("", server.name):
        text = f"the model {asked.model[:100]!r} does not exist; this server has {server.name!r}"
        raise Refusal(404, [text], "model", "model_not_found")
    return asked


def _lines(item: Any) -> list[str]:
    """What pydantic found, for a person."""
    where = ".".join(map(str, item["loc"]))
    kind, said = item["type"], item["msg"].removeprefix("Value error, ")
    if kind == "json_invalid":
        return [f"the body is not JSON: {said.removeprefix('Invalid JSON: ')}"]
    if kind == "extra_forbidden":
        return [f"{where[:100]}: unknown field; known: {', '.join(Completion.model_fields)}"]
    if kind == "missing":
        return [f"{where}: is required"]
    if not where:
        return [said] if kind != "model_type" else ["the body must be a JSON object"]
    given = repr(item["input"])
    shown = given if len(given) <= 60 else given[:57] + "…"
    return [f"{where}: {said}" if kind == "value_error" else f"{where}: is {shown}; {said[:1].lower()}{said[1:]}"]


def logprobs_of(tokens: list[Token], names: list[str], offset: int) -> dict[str, Any]:
    """OpenAI's form; `offset` is how many characters stand in front of the first token. The first token of a prompt has
    no probability, but null."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": names,
        "token_logprobs": [token.log_probability for token in tokens],
        "top_logprobs": [None if token.log_probability is None else dict(token.alternatives) for token in tokens],
        "text_offset": offsets,
    }


def routing_of(tokens: list[Token]) -> list[dict[str, Any]]:
    """Of each token its text, its gates by block, and [row, share] of the pool rows by block and router."""
    return [
        {
            "text": token.text,
            "gates": [round(gate, 4) for gate in token.routing.gates],
            "rows": [
                [[[row, round(share, 4)] for row, share in router] for router in block] for block in token.routing.rows
            ],
        }
        for token in tokens
        if token.routing is not None
    ]
