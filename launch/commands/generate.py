"""`globallocal generate`: a trained model writes."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from data_prep.errors import UserError
from launch.commands.model import ModelPath
from launch.commands.options import grouped, option
from pipeline.generation.sampling import Sampling

if TYPE_CHECKING:
    from pipeline.generation.decoder import Piece

LARGEST_SEED = 2**31 - 1
SAMPLING = {
    "max_new_tokens": option("Tokens added to each prompt at most.", min=1, max=100_000),
    "temperature": option("Lower is surer; 0 always takes the likeliest token.", min=0.0, max=100.0),
    "top_k": option("Draw from so many likeliest tokens only; 0 for all.", min=0, max=LARGEST_SEED),
    "top_p": option("Draw from the likeliest tokens of this probability only.", min=1e-6, max=1.0),
    "repetition_penalty": option("Above 1, tokens seen before become less likely.", min=0.01, max=100.0),
    "seed": option("Same seed, same text.", min=0, max=LARGEST_SEED),
    "stop": option("End a text in front of this string; may be given several times."),
}


def register(app: typer.Typer) -> None:
    app.command()(generate)


@grouped(sampling=SAMPLING)
def generate(
    path: ModelPath,
    sampling: Sampling,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given several times.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file, one prompt per line; JSON lines come out, in its order.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=65536, help="Texts at once; changes none of them.")] = 16,
) -> None:
    """Continue prompts by sampling, and show the text as it comes.

    Each prompt is continued as if it were alone: neither its neighbours nor the batch change its text.

    Examples:

        globallocal generate runs/quickstart/export --prompt "The history of"

        globallocal generate runs/quickstart --prompts prompts.txt --temperature 0 --stop . > texts.jsonl
    """
    texts = list(prompt or [])
    if bool(texts) == (prompts is not None):
        raise UserError("give the text to continue: either --prompt TEXT, or --prompts FILE with one per line")
    if "" in sampling.stop:
        raise UserError("--stop: an empty string ends every text at once; give one character or more")
    if prompts is not None:
        texts = read_prompts(prompts)

    from pipeline.export.load import best_device, load_model
    from pipeline.generation.decoder import Decoder, Request, decode
    from pipeline.generation.sampling import prompt_ids

    loaded = load_model(path)
    decoder = Decoder(loaded.model, loaded.tokenizer, best_device())
    requests = [Request(prompt_ids(loaded.tokenizer, text), sampling) for text in texts]
    out = typer.get_text_stream("stdout")
    shown: Lines | Texts = Texts(texts, out) if prompts is None else Lines(texts, out)
    try:
        for number, piece in decode(decoder, requests, batch_size):
            shown.take(number, piece)
    except ArithmeticError as error:
        raise UserError(f"{path}: {error}; choose another checkpoint") from None


def read_prompts(file: Path) -> list[str]:
    """One prompt per line, of UTF-8; an empty line is an empty prompt."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start:,}; convert it") from None
    except ValueError as error:  # NUL in the path
        raise UserError(f"{file}: {error}; give a path of a file") from None
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise UserError(f"{file}: is empty; write one prompt per line")
    return [line.removesuffix("\r") for line in lines]


class Texts:
    """Prompts and their texts in order: the first that is not finished is shown as it comes."""

    def __init__(self, prompts: list[str], out: TextIO) -> None:
        self._coming = [deque([prompt]) for prompt in prompts]
        self._ended = [False] * len(prompts)
        self._first, self._out = 0, out
        self._show()

    def take(self, number: int, piece: Piece) -> None:
        self._coming[number].append(piece.text)
        self._ended[number] = piece.finish_reason is not None
        self._show()

    def _show(self) -> None:
        while self._first < len(self._coming):
            self._out.write("".join(self._coming[self._first]))
            self._coming[self._first].clear()
            if not self._ended[self._first]:
                break
            self._out.write("\n")
            self._first += 1
        self._out.flush()


class Lines:
    """A JSON object per prompt, in order, each line written when all before it are."""

    def __init__(self, prompts: list[str], out: TextIO) -> None:
        self._prompts, self._out = prompts, out
        self._pieces: list[list[Piece]] = [[] for _ in prompts]
        self._first = 0

    def take(self, number: int, piece: Piece) -> None:
        self._pieces[number].append(piece)
        while self._first < len(self._pieces) and (pieces := self._pieces[self._first]) and pieces[-1].finish_reason:
            line = {
                "prompt": self._prompts[self._first],
                "text": "".join(part.text for part in pieces),
                "tokens": len(pieces),
                "finish_reason": pieces[-1].finish_reason,
            }
            print(json.dumps(line, ensure_ascii=False), file=self._out, flush=True)
            self._pieces[self._first] = []
            self._first += 1
