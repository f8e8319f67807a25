"""What decoding many texts at once brings: on the command line, and to 50 clients of `globallocal serve`.

The model is that of quickstart, with random weights. Contenders take turns, and the fastest turn of each counts, so
that other work on the machine touches all.
"""

import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from model.configuration_globallocal import GlobalLocalConfig
from model.modeling_globallocal import GlobalLocalForCausalLM
from pipeline.export.load import load_model
from pipeline.generation.decoder import Decoder, Request, decode
from pipeline.generation.sampling import Sampling
from tests.conftest import globallocal
from tests.launch.serving import Running, served

CLIENTS, TEXTS, TOKENS, ROUNDS = 50, 16, 32, 2
PROMPT = "The history of"
TARGETS = {"serve.tokens_per_second_of_50_clients_over_one": "≥ 3", "sixteen_texts_at_once_over_one_by_one": "≥ 3"}


def run() -> dict[str, Any]:
    """Ratios of tokens per second, and what 50 clients at once find."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "export"
        globallocal("tokenizer", "--source", "sample", "--vocab-size", 4096, "--output", folder)
        torch.manual_seed(0)
        config = GlobalLocalConfig.from_preset("quickstart", vocab_size=4096, bos_token_id=2, eos_token_id=2)
        model = GlobalLocalForCausalLM(config)
        with torch.no_grad():
            model.lm_head.bias[2] = -30  # no text ends by itself
        model.save_pretrained(folder)
        at_once = batched(folder)
        with served(folder) as server:
            return {"sixteen_texts_at_once_over_one_by_one": at_once, "serve": clients(server)}


def batched(folder: Path) -> float:
    loaded = load_model(folder)
    decoder = Decoder(loaded.model, loaded.tokenizer, torch.device("cpu"))
    ids = loaded.tokenizer(PROMPT, add_special_tokens=False).input_ids
    requests = [Request(ids, Sampling(max_new_tokens=TOKENS, seed=seed)) for seed in range(TEXTS)]
    seconds: dict[int, list[float]] = {1: [], TEXTS: []}
    for _ in range(ROUNDS):
        for size, found in seconds.items():
            begin = time.monotonic()
            assert sum(len(piece.tokens) for _, piece in decode(decoder, requests, size)) == TEXTS * TOKENS
            found.append(time.monotonic() - begin)
    return min(seconds[1]) / min(seconds[TEXTS])


def clients(server: Running) -> dict[str, Any]:
    """Of one client after another, and of all at once, each with one text."""

    def ask(seed: int) -> float:
        begin = time.monotonic()
        answer = server.post({"prompt": PROMPT, "max_tokens": TOKENS, "seed": seed})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == TOKENS
        return time.monotonic() - begin

    ask(0)
    alone, together, waits = [], [], list[float]()
    with ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(ROUNDS):
            alone.append(statistics.mean(ask(seed) for seed in range(5)))
            begin = time.monotonic()
            waits += pool.map(ask, range(CLIENTS))
            together.append((time.monotonic() - begin) / CLIENTS)
    return {
        "tokens_per_second_of_50_clients_over_one": min(alone) / min(together),
        "tokens_per_second_of_50_clients": round(TOKENS / min(together)),
        "median_wait_of_50_clients_over_one": statistics.median(waits) / min(alone),
        "refused_or_failed": 0,  # an answer other than 200 ends this benchmark
    }
