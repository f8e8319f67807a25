"""`globallocal evaluate` on an exported model: datasets, windows, JSON, a picture, tasks of the harness."""

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.cli import main
from launch.evaluation.harness import NEEDED
from pipeline.export.load import load_model
from tests.conftest import missing
from tests.pipeline.dataset_fixture import cut, write_dataset

TEXT = "The history of the town began in the year 1204. " + "".join(
    f"In the year {1204 + year * 7} the town had {year * year + 3} houses, and the river took {year} of them. "
    for year in range(40)
)
EOS = 2


@pytest.fixture(scope="module")
def tokens(tiny_export: Path) -> np.ndarray:
    """`TEXT` behind the token that ends a document."""
    ids = load_model(tiny_export).tokenizer(TEXT, add_special_tokens=False).input_ids
    return np.array([EOS, *ids], dtype="<u2")


@pytest.fixture(scope="module")
def datasets(tiny_export: Path, tokens: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of the model's tokenizer: `TEXT`, and a shorter one."""
    folder, tokenizer = tmp_path_factory.mktemp("datasets"), (tiny_export / "tokenizer.model").read_bytes()
    for name, stream in (("towns", tokens), ("short", tokens[300:400])):
        write_dataset(folder / name, {"valid": cut(stream, 1000, 2)}, tokenizer)
    return [folder / "towns", folder / "short"]


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert main(["evaluate", *map(str, arguments), "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


@torch.no_grad()
def plain_loss(model: Any, stream: np.ndarray, length: int, stride: int) -> float:
    """Nats per token, one target at a time, each with what its window holds before it."""
    nats = 0.0
    for target in range(1, len(stream)):
        window = max(0, -(-(target - length) // stride))  # the first that holds it
        start = window * stride
        ids = torch.tensor([stream[start:target].tolist()])
        nats -= model(input_ids=ids, use_cache=False).logits[0, -1].log_softmax(-1)[stream[target]].item()
    return nats / (len(stream) - 1)


def test_several_datasets_are_measured_by_name_with_their_denominators(
    tiny_export: Path, datasets: list[Path], tokens: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [item for folder in datasets for item in ("--dataset", folder)]
    found = evaluated(capsys, tiny_export, *words)
    assert (found["window"], found["sequence_length"], found["stride"]) == ("blocks", 64, 64)
    towns, short = found["datasets"]
    assert (towns["name"], towns["tokens"]) == ("towns", len(tokens) - 1)
    assert (short["name"], short["tokens"]) == ("short", 99)
    assert towns["words_and_bytes_estimated"] is False
    assert short["loss"] == pytest.approx(plain_loss(load_model(tiny_export).model, tokens[300:400], 64, 64), rel=1e-5)
    assert short["bits_per_byte"] == pytest.approx(short["loss"] / math.log(2) * short["tokens"] / short["bytes"])
    assert short["word_perplexity"] == "nan"  # its manifest counts no words
    assert found["mixed"] is None


def test_a_sliding_window_gives_each_token_more_before_it(
    tiny_export: Path, datasets: list[Path], tokens: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dataset", datasets[1], "--window", "sliding", "--sequence-length", 32]
    found = evaluated(capsys, tiny_export, *words, "--stride", 5)
    assert (found["window"], found["sequence_length"], found["stride"]) == ("sliding", 32, 5)
    expected = plain_loss(load_model(tiny_export).model, tokens[300:400], 32, 5)
    assert found["datasets"][0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert evaluated(capsys, tiny_export, *words)["stride"] == 16
    assert main(["evaluate", *map(str, (tiny_export, *words))]) == 0
    assert "a window of 32 tokens that slides by 16" in capsys.readouterr().out


def test_by_position_adds_up_to_the_loss_and_is_drawn(
    tiny_export: Path, datasets: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [tiny_export, "--dataset", datasets[0]]
    plain = evaluated(capsys, *words)["datasets"][0]
    picture, file = tmp_path / "made" / "positions.png", tmp_path / "figures.json"
    arguments = [*words, "--by-position", "--picture", picture, "--json", file]
    assert main(["evaluate", *map(str, arguments)]) == 0
    shown, found = capsys.readouterr().out, json.loads(file.read_text())["datasets"][0]
    assert "position in the window" in shown
    assert "bigram repeated" in shown
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    for groups in (found["by_position"], found["by_history"]):
        assert sum(group["targets"] for group in groups) == found["tokens"]
        nats = sum(group["loss"] * group["targets"] for group in groups)
        assert nats / found["tokens"] == pytest.approx(found["loss"])
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stride", "3"], "--stride: is of a sliding window; add --window sliding"),
        (["--window", "sliding", "--stride", "65"], "--stride 65 is above the window's 64 tokens"),
        (["--window", "sliding", "--by-position"], "--by-position: positions are those in blocks"),
        (["--picture", "a.png"], "--picture: draws what --by-position finds; add that"),
        (["--by-position", "--picture", "a.xyz"], "--picture a.xyz: give a name that ends in .png, .svg, .pdf"),
        (["--record"], "is an export, which does not name its run; give the run or its checkpoint"),
        (["--few-shot", "0"], "are of tasks; add --tasks NAME"),
        (["--tasks", "a"], "--tasks: bring their own text; leave --dataset"),
        (["--dataset", "DATASET"], "--dataset DATASET: the same dataset as DATASET"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    tiny_export: Path, datasets: list[Path], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(datasets[1])
    words = [item.replace("DATASET", place) for item in arguments]
    assert main(["evaluate", str(tiny_export), "--dataset", place, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said.replace("DATASET", place) in line


@pytest.fixture
def installed() -> None:
    for name in NEEDED:
        if find_spec(name) is None:
            missing(f"lm-evaluation-harness ({name})", "`make extras` installs it and runs this test")


ROLLING = """
task: local_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
CHOICE = """
task: local_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """Two tasks on local files: the loss of `TEXT`, and which of two words comes next."""
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    choices = [{"question": f"In {year} the", "choices": ["town", "river"], "answer": year % 2} for year in range(9)]
    (tmp_path / "choice.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in choices))
    for name, task in (("text", ROLLING), ("choice", CHOICE)):
        data = (
            f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/{name}.jsonl}}}}\ntest_split: test"
        )
        (tmp_path / f"{name}.yaml").write_text(f"{data}{task}")
    return tmp_path


@pytest.mark.extras
@pytest.mark.usefixtures("installed")
def test_tasks_go_to_the_harness_which_finds_the_same_loss(
    tiny_export: Path,
    datasets: list[Path],
    task_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The dataset begins with the token that the harness puts in front of the text: all targets are the same."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(task_folder / "cache"))
    words = [tiny_export, "--tasks", "local_text,local_choice", "--task-folder", task_folder]
    found = {score["task"]: score for score in evaluated(capsys, *words)["scores"]}
    ours = evaluated(capsys, tiny_export, "--dataset", datasets[0])["datasets"][0]
    bits = ours["loss"] / math.log(2) * ours["tokens"] / len(TEXT.encode())
    assert found["local_text"]["value"] == pytest.approx(bits, rel=1e-3)
    assert (found["local_choice"]["metric"], found["local_choice"]["examples"]) == ("acc", 9)
    model, tokenizer = (load := load_model(tiny_export)).model, load.tokenizer
    right = 0
    for year in range(9):
        scores = [plain_continuation(model, tokenizer, f"In {year} the", f" {word}") for word in ("town", "river")]
        right += scores.index(max(scores)) == year % 2
    assert found["local_choice"]["value"] == pytest.approx(right / 9)


@torch.no_grad()
def plain_continuation(model: Any, tokenizer: Any, question: str, answer: str) -> float:
    """Log-probability of the answer behind the question."""
    first = tokenizer(question, add_special_tokens=False).input_ids
    ids = tokenizer(question + answer, add_special_tokens=False).input_ids
    scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return sum(scores[place - 1, ids[place]].item() for place in range(len(first), len(ids)))


def test_a_harness_that_is_not_installed_is_one_line(
    tiny_export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.evaluation.harness.NEEDED", ("lm_eval_that_is_not_there",))
    assert main(["evaluate", str(tiny_export), "--tasks", "hellaswag"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("not found; install them: pip install 'globallocal[harness]'")
