"""Texts decoded together are those that transformers' `generate` gives to each prompt alone."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.export.load import Loaded, load_model
from pipeline.generation import decoder as decoding
from pipeline.generation.decoder import Decoder, Piece, Request, decode
from pipeline.generation.sampling import Sampling, prompt_ids
from pipeline.generation.text import StopStrings, TextStream
from tests.conftest import globallocal

PROMPTS = ["The history of", "", "In 1914,\n", "a", "東京 and then a prompt of some more tokens than the others have"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded(tiny_export: Path) -> Loaded:
    return load_model(tiny_export)


def together(loaded: Loaded, requests: list[Request], batch_size: int) -> list[list[Piece]]:
    pieces: list[list[Piece]] = [[] for _ in requests]
    for number, piece in decode(Decoder(loaded.model, loaded.tokenizer, CPU), requests, batch_size):
        pieces[number].append(piece)
    return pieces


def ids_of(pieces: list[Piece]) -> list[int]:
    return [token.id for piece in pieces for token in piece.tokens]


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def alone(loaded: Loaded, request: Request) -> list[int]:
    """What transformers gives, without the token that ends the text."""
    sampling = request.sampling
    how: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    ids = torch.tensor([request.ids])
    torch.manual_seed(sampling.seed)
    output = loaded.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        **how,
    )
    end = loaded.model.config.eos_token_id
    return list(itertools.takewhile(lambda token: token != end, output[0, ids.shape[1] :].tolist()))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=40),
        Sampling(max_new_tokens=40, temperature=0.0),
        Sampling(max_new_tokens=40, temperature=0.0, repetition_penalty=1.3),
        Sampling(max_new_tokens=40, temperature=1.5, top_k=0, top_p=0.9, repetition_penalty=1.1, seed=7),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_each_text_is_that_of_its_prompt_alone(loaded: Loaded, sampling: Sampling, batch_size: int) -> None:
    """Rows join and leave at different steps: lengths differ, and prompts wait for room."""
    requests = [
        Request(
            prompt_ids(loaded.tokenizer, prompt),
            dataclasses.replace(sampling, seed=sampling.seed + i, max_new_tokens=sampling.max_new_tokens - 3 * i),
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    found = together(loaded, requests, batch_size)
    assert [ids_of(pieces) for pieces in found] == [alone(loaded, request) for request in requests]


def test_settings_of_rows_may_differ(loaded: Loaded) -> None:
    ids = prompt_ids(loaded.tokenizer, "The")
    requests = [
        Request(ids, Sampling(max_new_tokens=20, temperature=t, top_k=k, seed=s))
        for t, k, s in ((0.0, 50, 0), (0.7, 5, 1), (1.3, 0, 2), (0.7, 5, 1))
    ]
    found = [ids_of(pieces) for pieces in together(loaded, requests, 4)]
    assert found == [alone(loaded, request) for request in requests]
    assert found[1] == found[3] != found[2]


def test_a_row_taken_out_leaves_the_others_as_they_were(loaded: Loaded) -> None:
    requests = [Request(prompt_ids(loaded.tokenizer, prompt), Sampling(max_new_tokens=12)) for prompt in PROMPTS]
    decoder = Decoder(loaded.model, loaded.tokenizer, CPU)
    rows = [decoder.join(request) for request in requests[:3]]
    for _ in range(4):
        decoder.step()
    late = decoder.join(requests[3])
    decoder.leave([rows[1]])
    gone_at_once = decoder.join(requests[4])
    decoder.leave([gone_at_once])
    while decoder.rows:
        decoder.step()
    ended = {id(row): row.generated for row in (rows[0], rows[2], late)}
    for row, request in ((rows[0], requests[0]), (rows[2], requests[2]), (late, requests[3])):
        assert ended[id(row)][:12] == alone(loaded, request)[:12]
    assert len(rows[1].generated) == 4
    assert gone_at_once.generated == []


def test_a_long_prompt_is_read_in_pieces(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(prompt_ids(loaded.tokenizer, "the king of the north " * 20), Sampling(max_new_tokens=20))
    expected = alone(loaded, request)
    for size in (1, 7, 64):
        monkeypatch.setattr(decoding, "PREFILL_TOKENS", size)
        assert ids_of(together(loaded, [request], 1)[0]) == expected


def test_probabilities_and_routing_are_those_of_the_whole_sequence(loaded: Loaded) -> None:
    """And a neighbour that asks for them changes no text."""
    ids = prompt_ids(loaded.tokenizer, "The history")
    plain = Request(ids, Sampling(max_new_tokens=9, seed=3))
    asking = dataclasses.replace(plain, alternatives=3, routing=True)
    quiet, told = together(loaded, [plain, asking], 2)
    assert ids_of(quiet) == ids_of(told)
    tokens = [token for piece in told for token in piece.tokens]
    assert all(token.routing is None and token.log_probability is None for piece in quiet for token in piece.tokens)
    with torch.no_grad():
        whole = loaded.model(torch.tensor([[*ids, *ids_of(told)]]), output_routing=True)
    log_probabilities = whole.logits.log_softmax(dim=-1)[0]
    for i, token in enumerate(tokens, len(ids) - 1):
        assert token.log_probability == pytest.approx(log_probabilities[i, token.id].item(), abs=1e-4)
        best = log_probabilities[i].topk(3)
        assert [value for _, value in token.alternatives] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [name for name, _ in token.alternatives] == [
            Decoder(loaded.model, loaded.tokenizer, CPU).name(other) for other in best.indices.tolist()
        ]
        assert token.routing is not None
        assert token.routing.gates == pytest.approx(whole.routing.gates[0, i].tolist(), abs=1e-4)
        rows = [[[row for row, _ in router] for router in block] for block in token.routing.rows]
        assert rows == whole.routing.rows[0, i].tolist()
        assert math.fsum(share for _, share in token.routing.rows[0][0]) == pytest.approx(1, abs=1e-5)


def test_a_stop_string_ends_the_text_in_front_of_it(loaded: Loaded) -> None:
    """Also where it begins inside a token, or lies over several."""
    request = Request(prompt_ids(loaded.tokenizer, "The"), Sampling(max_new_tokens=60))
    whole = text_of(together(loaded, [request], 1)[0])
    for length in (1, 3, 8):
        stop = whole[20 : 20 + length]
        sampling = dataclasses.replace(request.sampling, stop=["no such text", stop])
        pieces = together(loaded, [dataclasses.replace(request, sampling=sampling)], 1)[0]
        assert text_of(pieces) == whole[: whole.find(stop)]
        assert "".join(token.text for piece in pieces for token in piece.tokens) == text_of(pieces)
        assert pieces[-1].finish_reason == "stop"


def test_text_is_held_back_only_as_long_as_it_may_be_a_stop_string() -> None:
    stop = StopStrings(["\n\nQ", "END"])
    shown = [stop.push(text) for text in ("one", "\n", "\n", "A E", "N", "O", "\n\nQuestion")]
    assert shown == [
        *(("one", False), ("", False), ("", False), ("\n\nA ", False), ("", False), ("ENO", False), ("", True)),
    ]
    held = StopStrings(["abc"])
    assert (held.push("xab")[0], held.end()) == ("x", "ab")


def test_tokens_become_the_text_that_the_tokenizer_reads_back(loaded: Loaded) -> None:
    text = "naïve 東京 🙂  two  spaces\n\n½ ends"
    stream = TextStream(loaded.tokenizer)
    parts = [stream.push(token) for token in prompt_ids(loaded.tokenizer, text)]
    assert "".join(parts) + stream.end() == text
    assert "" in parts
    assert not any("\ufffd" in part for part in parts)
    cut = TextStream(loaded.tokenizer)
    for token in prompt_ids(loaded.tokenizer, "東")[:-1]:
        cut.push(token)
    assert cut.end() == "\ufffd"


@contextmanager
def head_bias(loaded: Loaded, token: int, value: float) -> Iterator[None]:
    bias = loaded.model.lm_head.bias
    before = bias[token].item()
    with torch.no_grad():
        bias[token] = value
        yield
        bias[token] = before


def test_the_end_of_a_document_ends_a_text(loaded: Loaded) -> None:
    requests = [Request(prompt_ids(loaded.tokenizer, "The"), Sampling(max_new_tokens=40, seed=i)) for i in range(4)]
    with head_bias(loaded, loaded.model.config.eos_token_id, 3.0):
        found = together(loaded, requests, 4)
        assert [ids_of(pieces) for pieces in found] == [alone(loaded, request) for request in requests]
    assert {pieces[-1].finish_reason for pieces in found} == {"stop"}
    assert not any("</s>" in text_of(pieces) for pieces in found)


def test_scores_that_are_no_numbers_are_said(loaded: Loaded) -> None:
    decoder = Decoder(loaded.model, loaded.tokenizer, CPU)
    with head_bias(loaded, 0, math.nan):
        decoder.join(Request([5]))
        with pytest.raises(ArithmeticError, match="not finite"):
            decoder.step()
    decoder.clear()
    decoder.join(Request([5]))
    assert len(decoder.step()) == 1


@pytest.mark.parametrize("ids", [[], [512], [-1]], ids=str)
def test_ids_outside_the_vocabulary_are_refused(loaded: Loaded, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="each from 0 to 511"):
        Decoder(loaded.model, loaded.tokenizer, CPU).join(Request(ids))


def test_prompts_of_a_file_come_back_as_json_lines(tiny_export: Path, tmp_path: Path) -> None:
    """In its order and by number, whatever the batch; each text is the one of `--prompt`."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2] + PROMPTS[3:]) + "\n")
    words = ["generate", tiny_export, "--max-new-tokens", 8, "--seed", 5]
    outputs = [
        globallocal(*words, "--prompts", tmp_path / "prompts.txt", "--batch-size", size).stdout for size in (1, 3)
    ]
    assert outputs[0] == outputs[1]
    lines = [json.loads(line) for line in outputs[0].splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS[:2] + PROMPTS[3:]
    assert all(line["tokens"] <= 8 and line["finish_reason"] in ("stop", "length") for line in lines)
    given = [word for line in lines for word in ("--prompt", line["prompt"])]
    said = globallocal(*words, *given).stdout
    assert said == "".join(f"{line['prompt']}{line['text']}\n" for line in lines)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "either --prompt TEXT, or --prompts FILE"),
        (["--prompt", "a", "--prompts", "b"], "either --prompt TEXT, or --prompts FILE"),
        (["--prompt", "a", "--stop", ""], "--stop: an empty string"),
        (["--prompt", "a", "--temperature", "nan"], "'--temperature'"),
        (["--prompts", "absent.txt"], "absent.txt: No such file"),
        (["--prompts", "/dev/null"], "/dev/null: is empty"),
    ],
    ids=str,
)
def test_wrong_options_are_plain_lines(tiny_export: Path, words: list[str], said: str) -> None:
    assert said in globallocal("generate", tiny_export, *words, expect=2).stderr
