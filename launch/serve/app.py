"""The server's addresses: completions, models, health, metrics, the page."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from launch.serve.limits import BODY_SECONDS, MOST_BODY_BYTES
from launch.serve.metrics import Metrics
from launch.serve.page import page
from launch.serve.protocol import Completion, Refusal, Server, logprobs_of, read_completion, routing_of
from launch.serve.worker import Busy, Job, Worker
from pipeline.generation import decoder as decoding

if TYPE_CHECKING:
    from pipeline.generation.decoder import Piece

EVENTS = "text/event-stream"
PATIENCE_SECONDS = 0.2
"""Between two looks whether a client that waits is still there."""


class Service:
    """Answers requests with a worker's texts."""

    def __init__(self, server: Server, decoder: decoding.Decoder, metrics: Metrics) -> None:
        self.server, self.decoder, self.metrics = server, decoder, metrics
        self.worker = Worker(decoder, server.limits, metrics)
        self.started = int(time.time())

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", self.page),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/health", self.health),
                Route("/metrics", self.show_metrics),
            ],
            exception_handlers={Refusal: refused, HTTPException: not_served, Exception: broken},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        yield
        await run_in_threadpool(self.worker.close)

    async def page(self, request: Request) -> Response:
        text = page(self.server, str(request.base_url).rstrip("/"))
        return HTMLResponse(text, headers={"Content-Security-Policy": "frame-ancestors 'none'"})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.server.name:
            text = f"the model {name[:100]!r} does not exist; this server has {self.server.name!r}"
            raise Refusal(404, [text], "model", "model_not_found")
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {"id": self.server.name, "object": "model", "created": self.started, "owned_by": "globallocal"}

    async def health(self, request: Request) -> Response:
        well = self.worker.is_alive()
        state = {"status": "ok" if well else "the worker has ended", "model": self.server.name}
        return JSONResponse(state | self.metrics.gauges(), 200 if well else 503)

    async def show_metrics(self, request: Request) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def completions(self, request: Request) -> Response:
        try:
            answer = await self._completions(request)
        except Refusal as refusal:
            self.metrics.add(f'requests_total{{code="{refusal.status}"}}')
            raise
        self.metrics.add(f'requests_total{{code="{answer.status_code}"}}')
        return answer

    async def _completions(self, request: Request) -> Response:
        body = await read_body(request)
        asked = await run_in_threadpool(read_completion, body, self.server)
        texts = Texts(self, asked, request)
        try:
            self.worker.submit(texts.jobs)
        except Busy as busy:
            raise Refusal(429, [str(busy)], code="queue_full", Retry_After=str(busy.retry_seconds)) from None
        self.metrics.add("prompt_tokens_total", sum(len(prompt.ids) for prompt in asked.prompt))
        if asked.stream:
            return StreamingResponse(
                texts.events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        return await texts.whole()


class Texts:
    """The texts of one request, from the worker's thread to the client."""

    def __init__(self, service: Service, asked: Completion, request: Request) -> None:
        self._service, self._asked, self._request = service, asked, request
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.server.name,
        }
        loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[int, "Piece | None"]]()

        def deliver(index: int, piece: Piece | None) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody is left to hear it
                loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

        self._offsets = [0] * (len(asked.prompt) * asked.n)
        self._begun: set[int] = set()
        self._generated = 0
        self.jobs: list[Job] = []
        for prompt in asked.prompt:
            for sampling in asked.samplings():
                echo = asked.echo and asked.logprobs is not None
                wanted = decoding.Request(prompt.ids, sampling, asked.logprobs, asked.routing, echo)
                index = len(self.jobs)
                self.jobs.append(Job(wanted, lambda piece, index=index: deliver(index, piece)))  # type: ignore[misc]

    async def _coming(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces until all texts have ended; when the client has left, or anything else ends this, none goes on.

        Raises:
            Refusal: the model failed, or the server ends.
            ClientDisconnect: nobody listens.
        """
        unfinished = len(self.jobs)
        try:
            while unfinished:
                try:
                    index, piece = await asyncio.wait_for(self._pieces.get(), PATIENCE_SECONDS)
                except TimeoutError:
                    if await self._request.is_disconnected():
                        raise ClientDisconnect from None
                    continue
                if piece is None:
                    raise Refusal(500, ["the text could not be finished: the model failed, or the server ends"])
                unfinished -= piece.finish_reason is not None
                yield index, self._asked_for(index, piece)
                if await self._request.is_disconnected():
                    raise ClientDisconnect
        finally:
            if unfinished:
                self._service.worker.cancel(self.jobs)
                self._service.metrics.add("cancelled_total")

    def _asked_for(self, index: int, piece: Piece) -> Piece:
        """The piece, behind its prompt where that is to be echoed, without its own token where none was asked for."""
        prompt = self._asked.prompt[index // self._asked.n]
        if self._asked.max_tokens == 0:
            told = prompt.ids if self._asked.logprobs is not None else []
            return decoding.Piece(prompt.text, piece.tokens[: len(told)], "length")
        self._generated += 1
        if not self._asked.echo or index in self._begun:
            return piece
        self._begun.add(index)
        return replace(piece, text=prompt.text + piece.text)

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events: a piece each, an error if there is one, [DONE]."""
        try:
            async for index, piece in self._coming():
                if piece.text or piece.tokens or piece.finish_reason:
                    yield self._event([self._choice(index, piece.text, piece.tokens, piece.finish_reason)])
        except Refusal as refusal:
            yield f"data: {json.dumps(refusal.body())}\n\n"
            return
        except ClientDisconnect:
            return
        if self._asked.stream_options.include_usage:
            yield self._event([], usage=self._usage())
        yield "data: [DONE]\n\n"

    async def whole(self) -> Response:
        pieces: list[list[Piece]] = [[] for _ in self.jobs]
        try:
            async for index, piece in self._coming():
                pieces[index].append(piece)
        except ClientDisconnect:
            return Response(status_code=499)
        choices = [
            self._choice(
                index,
                "".join(piece.text for piece in own),
                [token for piece in own for token in piece.tokens],
                own[-1].finish_reason,
            )
            for index, own in enumerate(pieces)
        ]
        return JSONResponse({**self._head, "choices": choices, "usage": self._usage()})

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps({**self._head, 'choices': choices, **more})}\n\n"

    def _choice(self, index: int, text: str, tokens: list[decoding.Token], reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
        if self._asked.logprobs is not None:
            names = [token.text or self._service.decoder.name(token.id) for token in tokens]
            choice["logprobs"] = logprobs_of(tokens, names, self._offsets[index])
            self._offsets[index] += sum(len(token.text) for token in tokens)
        if self._asked.routing:
            choice["routing"] = routing_of(tokens)
        return choice

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(item.ids) for item in self._asked.prompt)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._generated,
            "total_tokens": prompt + self._generated,
        }


async def read_body(request: Request) -> bytes:
    """Raises Refusal where it is not JSON by name, too long, or slow to come."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another site can send other kinds without being asked first
        raise Refusal(415, [f"the content type is {kind[:100] or 'missing'}; send application/json"])
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BODY_BYTES:
                    raise Refusal(413, [f"the body has more than {MOST_BODY_BYTES:,} bytes"], Connection="close")
    except TimeoutError:
        raise Refusal(408, [f"the body did not come within {BODY_SECONDS:g} s"], Connection="close") from None
    except ClientDisconnect:
        raise Refusal(400, ["the body was cut short"]) from None
    return bytes(body)


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def not_served(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path[:100]}: {error.detail.lower()}"
    return JSONResponse(Refusal(error.status_code, [text]).body(), error.status_code, headers=error.headers)


async def broken(request: Request, error: Exception) -> Response:
    return JSONResponse(Refusal(500, ["the server failed on this request; its log says why"]).body(), 500)
