"""`globallocal serve`, a real process, asked over HTTP: what it gives, what it refuses, how it ends."""

from __future__ import annotations

import http.client
import json
import math
import queue
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from launch.serve.limits import MOST_BODY_BYTES, MOST_SEQUENCES, Limits
from launch.serve.metrics import Metrics
from launch.serve.protocol import Completion
from launch.serve.worker import Job, Worker
from pipeline.export.load import load_model
from pipeline.generation.decoder import Decoder, Piece, Request
from pipeline.generation.sampling import Sampling
from tests.conftest import ROOT, globallocal
from tests.launch.serving import Running, served
from tests.variants import some_of

LIMITS = ["--max-batch", "4", "--max-waiting", "6", "--max-prompt-tokens", "100", "--max-new-tokens", "20000"]


@pytest.fixture(scope="module")
def server(tiny_export: Path) -> Iterator[Running]:
    with served(tiny_export, *LIMITS) as running:
        yield running


def events(answer: requests.Response) -> list[Any]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_models_health_and_metrics(server: Running) -> None:
    (model,) = server.get("/v1/models").json()["data"]
    assert server.get(f"/v1/models/{model['id']}").json() == model
    assert server.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    health = server.get("/health")
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    metrics = server.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    for line in metrics.text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) globallocal_\w+ .+|globallocal_\w+({\w+="\w+"})? [\d.e+-]+', line), line


def test_a_completion_is_the_text_of_the_command_line(server: Running, tiny_export: Path) -> None:
    """Whole and streamed, alone and beside others, by text and by ids."""
    body = {"prompt": "The history", "max_tokens": 12, "seed": 4, "echo": True}
    answer = server.post(body).json()
    said = globallocal("generate", tiny_export, "--prompt", "The history", "--max-new-tokens", 12, "--seed", 4).stdout
    assert answer["choices"][0]["text"] + "\n" == said
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")
    assert answer["usage"]["completion_tokens"] <= 12
    streamed = events(server.post(body | {"stream": True, "stream_options": {"include_usage": True}}))
    assert "".join(event["choices"][0]["text"] for event in streamed[:-1]) + "\n" == said
    assert streamed[-1]["usage"] == answer["usage"]
    assert len(streamed) > 5
    many = server.post(body | {"prompt": ["In 1914", "The history", ""], "n": 2}).json()["choices"]
    assert [choice["index"] for choice in many] == list(range(6))
    assert many[2]["text"] == answer["choices"][0]["text"] != many[3]["text"]
    by_ids = server.post({"prompt": [5, 6, 7], "max_tokens": 3, "seed": 1}).json()
    assert by_ids["usage"]["prompt_tokens"] == 3
    assert server.post({"prompt": [[5, 6, 7]], "max_tokens": 3, "seed": 1}).json()["choices"] == by_ids["choices"]


def test_probabilities_and_routing_of_each_token(server: Running) -> None:
    body = {"prompt": "The", "max_tokens": 9, "seed": 2, "logprobs": 3, "routing": True, "stop": None}
    (choice,) = server.post(body).json()["choices"]
    logprobs, routing = choice["logprobs"], choice["routing"]
    assert "".join(item["text"] for item in routing) == choice["text"]
    assert {len(logprobs[name]) for name in logprobs} == {len(routing)}
    assert all(len(best) <= 3 and max(best.values()) <= 0 for best in logprobs["top_logprobs"])
    assert [len(item["gates"]) for item in routing] == [2] * len(routing)
    assert all(0 <= gate <= 1 for item in routing for gate in item["gates"])
    assert all(0 <= row < 64 for item in routing for block in item["rows"] for router in block for row, _ in router)
    streamed = [event["choices"][0] for event in events(server.post(body | {"stream": True}))]
    assert [item for event in streamed for item in event["routing"]] == routing
    assert [at for event in streamed for at in event["logprobs"]["text_offset"]] == logprobs["text_offset"]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_text_is_scored_as_evaluation_tools_ask(server: Running, tiny_export: Path, max_tokens: int) -> None:
    """lm-evaluation-harness sends ids and reads the probabilities of the prompt's own tokens; here beside the model."""
    loaded = load_model(tiny_export)
    ids = loaded.tokenizer("In 1914 the rivers — naïve", add_special_tokens=False).input_ids
    body = {
        "prompt": [ids, ids[:3]],
        "max_tokens": max_tokens,
        "temperature": 0,
        "echo": True,
        "logprobs": 2,
        "seed": 1,
    }
    whole = server.post(body).json()
    choice, short = whole["choices"]
    said = choice["logprobs"]
    assert len(said["tokens"]) == len(ids) + max_tokens
    assert said["token_logprobs"][0] is said["top_logprobs"][0] is None
    assert short["logprobs"]["token_logprobs"][1:3] == pytest.approx(said["token_logprobs"][1:3], abs=1e-4)
    with torch.no_grad():
        scores = loaded.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [scores[place, token].item() for place, token in enumerate(ids[1:])]
    assert said["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-4)
    assert max(said["top_logprobs"][1].values()) == pytest.approx(scores[0].max().item(), abs=1e-4)
    assert choice["text"].startswith("In 1914 the rivers — naïve")
    assert said["text_offset"][: len(ids)] == sorted(said["text_offset"][: len(ids)])
    assert whole["usage"]["completion_tokens"] == 2 * max_tokens
    streamed = [event["choices"][0] for event in events(server.post(body | {"stream": True}))]
    first = [event for event in streamed if event["index"] == 0]
    assert [token for event in first for token in event["logprobs"]["tokens"]] == said["tokens"]
    assert "".join(event["text"] for event in first) == choice["text"]


WRONG: list[tuple[Any, list[str]]] = [
    ({}, ["prompt: is required"]),
    ([], ["the body must be a JSON object"]),
    (7, ["the body must be a JSON object"]),
    ({"prompt": "a", "temprature": 1}, ["temprature: unknown field; known: prompt, model"]),
    ({"prompt": "a", "max_tokens": -1}, ["max_tokens: is -1;"]),
    ({"prompt": "a", "max_tokens": 0}, ["max_tokens: is 0;"]),
    ({"prompt": "a", "max_tokens": 10**30}, ["max_tokens: "]),
    ({"prompt": "a", "max_tokens": 20001}, ["max_tokens: is 20,001; the limit of this server is 20,000"]),
    ({"prompt": "a", "max_tokens": "8"}, ["max_tokens: is '8';"]),
    ({"prompt": "a", "temperature": -0.5, "top_p": 0, "n": 0}, ["temperature: is -0.5;", "top_p: is 0;", "n: is 0;"]),
    ({"prompt": "a", "n": MOST_SEQUENCES + 1}, ["n: is 129;"]),
    ({"prompt": ["a"] * 100, "n": 2}, ["prompt, n: 100 × 2 texts; the limit is 10"]),
    ({"prompt": ["a"] * 1000}, ["prompt: holds 1,000 prompts; the limit is 128"]),
    ({"prompt": "word " * 500}, ["prompt: has ", "the limit of this server is 100"]),
    ({"prompt": 5}, ["prompt: must be a text"]),
    ({"prompt": []}, ["prompt: must be a text"]),
    ({"prompt": [[]]}, ["prompt: must be a text"]),
    ({"prompt": [1, "a"]}, ["prompt: must be a text"]),
    ({"prompt": [[[1]]]}, ["prompt: must be a text"]),
    ({"prompt": [True]}, ["prompt: must be a text"]),
    ({"prompt": [512]}, ["prompt: holds token 512; the model knows 0 to 511"]),
    ({"prompt": [-1]}, ["prompt: holds token -1"]),
    ({"prompt": [10**40]}, ["prompt: holds token 1000"]),
    ({"prompt": "a", "stop": ""}, ["stop: must be"]),
    ({"prompt": "a", "stop": [1]}, ["stop: must be"]),
    ({"prompt": "a", "stop": ["x"] * 17}, ["stop: must be"]),
    ({"prompt": "a", "stop": "x" * 257}, ["stop: must be"]),
    ({"prompt": "a", "logprobs": 21}, ["logprobs: is 21;"]),
    ({"prompt": "a", "max_tokens": 0}, ["max_tokens: is 0; without echo that is no answer"]),
    ({"prompt": "a", "best_of": 3}, ["best_of: is 3;"]),
    ({"prompt": "a", "presence_penalty": 0.5, "logit_bias": {"5": 1}}, ["presence_penalty: ", "logit_bias: "]),
    ({"prompt": "a", "stream_options": {"x": 1}}, ["stream_options.x: unknown field"]),
    ({"prompt": "a", "seed": 2**70}, ["seed: "]),
    ({"prompt": "a", "x" * 100_000: 1}, ["unknown field"]),
]


@pytest.mark.parametrize(("body", "said"), WRONG, ids=[str(body)[:60] for body, _ in WRONG])
def test_what_is_wrong_is_said_at_once_in_openais_form(server: Running, body: Any, said: list[str]) -> None:
    answer = server.post(body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert [line for line in said if line not in error["message"]] == []
    assert len(error["message"]) < 2000


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"[" * 500_000, "application/json", 400),
        (b'{"prompt": NaN}', "application/json", 400),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", 400),
        (b'{"prompt": "\\ud800"}', "application/json", 400),
        (b'\xff\xfe{"prompt": "a"}', "application/json", 400),
        (b'{"prompt": "a"}', "text/plain", 415),
        (b'{"prompt": "a"}', "", 415),
        (b"x" * (MOST_BODY_BYTES + 1), "application/json", 413),
        (b'{"prompt": "a\\u0000b\\u0000", "max_tokens": 1}', "application/json", 200),
        (b'{"prompt": "a", "max_tokens": 1, "user": null, "model": null}', "application/json; charset=utf-8", 200),
    ],
    ids=lambda value: str(value)[:40],
)
def test_hostile_bodies(server: Running, body: bytes, kind: str, status: int) -> None:
    answer = server.post(data=body, headers={"Content-Type": kind})
    assert answer.status_code == status, answer.text
    assert ("error" in answer.json()) == (status != 200)


def test_unknown_addresses_methods_and_models(server: Running) -> None:
    assert server.get("/nothing").json()["error"]["message"] == "GET /nothing: not found"
    assert server.get("/v1/completions").status_code == 405
    answer = server.post({"prompt": "a", "model": "gpt-9"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"))
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b'{"prompt"')
    connection.close()  # in the middle
    assert server.get("/health").json()["status"] == "ok"


def test_fifty_clients_at_once(server: Running) -> None:
    """Those who find a place get the text that they would get alone; the others are told when to come back."""
    body = {"prompt": "The history", "max_tokens": 8, "seed": 1}
    alone = server.post(body).json()["choices"]

    def client(number: int) -> int:
        refused = 0
        while True:
            answer = server.post(body | {"stream": number % 2 == 0})
            if answer.status_code == 200:
                break
            assert answer.status_code == 429
            assert 1 <= int(answer.headers["Retry-After"]) <= 60
            assert answer.json()["error"]["type"] == "rate_limit_error"
            refused += 1
            time.sleep(0.1)
        if number % 2:
            assert answer.json()["choices"] == alone
        else:
            assert "".join(event["choices"][0]["text"] for event in events(answer)) == alone[0]["text"]
        return refused

    with ThreadPoolExecutor(50) as clients:
        refused = sum(clients.map(client, range(50)))
    assert refused > 0
    assert server.value('requests_total{code="429"}') >= refused
    server.wait_for("decoding", 0)


def long_text(server: Running) -> requests.Response:
    """A stream that goes on for a long while."""
    body = {"prompt": "The", "max_tokens": 20000, "stream": True, "temperature": 0, "n": 4, "seed": 0}
    return requests.post(f"{server.address}/v1/completions", json=body, stream=True, timeout=60)


def test_a_client_that_leaves_frees_its_places(server: Running) -> None:
    cancelled = server.value("cancelled_total")
    stream = long_text(server)
    lines = stream.iter_lines()  # where it is dropped, the connection ends
    assert next(lines).startswith(b"data: ")
    server.wait_for("decoding", 4)
    waiting = threading.Thread(target=lambda: server.post({"prompt": "a", "max_tokens": 2}), daemon=True)
    waiting.start()
    server.wait_for("waiting", 1)
    with pytest.raises(requests.exceptions.ReadTimeout):
        requests.post(f"{server.address}/v1/completions", json={"prompt": "b"}, timeout=0.5)  # leaves while it waits
    server.wait_for("waiting", 1)
    stream.close()
    waiting.join(60)
    assert not waiting.is_alive()
    server.wait_for("decoding", 0)
    assert server.value("cancelled_total") == cancelled + 2


def test_a_step_that_fails_fails_its_texts_and_no_others(tiny_export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_model(tiny_export)
    metrics = Metrics()
    worker = Worker(Decoder(loaded.model, loaded.tokenizer, torch.device("cpu")), Limits(), metrics)
    told: queue.Queue[Piece | None] = queue.Queue()
    jobs = [Job(Request([5], Sampling(max_new_tokens=2)), told.put) for _ in range(2)]
    bias = loaded.model.lm_head.bias
    before = bias[0].item()
    with torch.no_grad():
        bias[0] = math.nan
    worker.start()
    worker.submit(jobs[:1])
    assert told.get(timeout=60) is None
    with torch.no_grad():
        bias[0] = before
    worker.submit(jobs[1:])
    pieces = [told.get(timeout=60) for _ in range(2)]
    assert [piece and piece.finish_reason for piece in pieces] == [None, "length"]
    worker.close()
    assert "globallocal_failures_total 1\n" in metrics.text()
    assert "not finite" in capsys.readouterr().err


@pytest.mark.parametrize("signal_number", some_of([signal.SIGTERM], [signal.SIGINT]))  # one handler takes both
def test_a_server_that_is_asked_to_end_finishes_its_texts(tiny_export: Path, signal_number: int) -> None:
    with served(tiny_export) as running:
        stream = requests.post(
            f"{running.address}/v1/completions",
            json={"prompt": "The", "max_tokens": 300, "stream": True, "seed": 5},
            stream=True,
            timeout=60,
        )
        lines = stream.iter_lines()
        assert next(lines).startswith(b"data: ")
        running.process.send_signal(signal_number)
        assert [line for line in lines if line][-1] == b"data: [DONE]"
        stdout, stderr = running.process.communicate(timeout=60)
        assert (running.process.returncode, stderr) == (0, "")
        assert "ended" in stdout
        with pytest.raises(requests.exceptions.ConnectionError):
            running.get("/health")


def test_an_address_that_cannot_be_had_is_one_line(server: Running, tiny_export: Path) -> None:
    port = server.address.rpartition(":")[2]
    said = globallocal("serve", tiny_export, "--port", port, expect=2).stderr
    assert said == f"error: --host 127.0.0.1 --port {port}: Address already in use; give another one\n"


def test_every_field_is_described(server: Running) -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    assert [name for name in Completion.model_fields if f"`{name}`" not in text] == []
