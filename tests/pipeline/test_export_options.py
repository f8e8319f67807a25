"""What an export can be: sharded, averaged, of another precision, on the hub; and the card that comes with it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open
from transformers import GenerationConfig

from data_prep.errors import UserError
from launch.commands.model import shard_bytes
from pipeline.checkpoints.folder import read_state
from pipeline.checkpoints.reshard import ParameterReader
from pipeline.export.card import CardFacts, figure, model_card, number
from pipeline.export.hub import check_repository, push
from pipeline.export.hugging_face import Form, export
from pipeline.export.load import load_model
from pipeline.export.weights import Weights, differing_weights, write_weights
from pipeline.generation.sampling import Sampling
from tests.conftest import globallocal
from tests.data_prep.hub_server import HubServer
from tests.pipeline.one_file_run import OneFileRun

TOKEN = "hf_aVerySecretOneThatNobodySees"
MEGABYTE = 10**6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path) -> OneFileRun:
    """Two checkpoints whose weights differ."""
    made = OneFileRun(tmp_path_factory.mktemp("one") / "run", small_dataset)
    made.save(3, loss=6.25)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    made.save(6, loss=6.0)
    return made


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def test_weights_pass_through_memory_one_file_at_a_time(
    tmp_path: Path, small_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = OneFileRun(tmp_path / "run", small_dataset, hidden_size=256, num_hidden_layers=8, intermediate_size=2048)
    folder = large.save(1)
    before = {name: tensor.clone() for name, tensor in large.model.state_dict().items()}
    with torch.no_grad():
        for parameter in large.model.parameters():
            parameter += 1.0
    folders = [large.save(2), folder]
    weights = Weights.of(large.model, [ParameterReader(item, read_state(item)) for item in folders])
    total = sum(4 * shape.numel() for shape in weights.shapes.values())
    held, begun, read = [0], anonymous_bytes(), Weights.read

    def watched(self: Weights, name: str, dtype: torch.dtype) -> torch.Tensor:
        tensor = read(self, name, dtype)
        held.append(anonymous_bytes() - begun)
        return tensor

    monkeypatch.setattr(Weights, "read", watched)
    (tmp_path / "out").mkdir()
    write_weights(weights, tmp_path / "out", torch.float32, 4 * MEGABYTE)
    assert differing_weights(weights, tmp_path / "out", torch.float32) == []
    assert total > 50 * MEGABYTE
    assert max(held) < 16 * MEGABYTE, [f"{item / MEGABYTE:.1f}" for item in held]

    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 8
    for file in files:
        with safe_open(file, "pt") as written:
            names = list(written.keys())
            assert len(names) == 1 or file.stat().st_size < 4.1 * MEGABYTE
            for name in names:
                mean = (before[name] + large.model.state_dict()[name]) / 2
                torch.testing.assert_close(written.get_tensor(name), mean)
    damaged = bytearray(files[0].read_bytes())
    damaged[-1] ^= 1
    files[0].write_bytes(damaged)
    assert len(differing_weights(weights, tmp_path / "out", torch.float32)) == 1


def test_a_mean_in_bfloat16_goes_to_the_hub_and_a_stranger_runs_the_code_of_its_card(
    run: OneFileRun, tmp_path: Path
) -> None:
    output = tmp_path / "export"
    options = ["--average", 2, "--dtype", "bfloat16", "--max-shard-size", "1MB", "--push-to-hub", "me/tiny"]
    with HubServer("me/tiny", "0" * 40, {}, kind="models") as hub:
        secrets = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        done = globallocal("export", run.folder, "--output", output, *options, **secrets)
        assert f"hub: {hub.url}/me/tiny" in done.stdout
        assert hub.created == [{"name": "tiny", "organization": "me", "visibility": "private"}]
        assert hub.files == {item.name: item.read_bytes() for item in output.iterdir()}
        card = (output / "README.md").read_text()
        assert TOKEN not in done.stdout + done.stderr + card
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        code += "import sys; print(str(model.dtype), file=sys.stderr)"
        stranger = subprocess.run(
            [sys.executable, "-I", "-c", code],
            cwd=tmp_path,
            env={**os.environ, **secrets, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    assert stranger.returncode == 0, stranger.stderr
    assert stranger.stdout.startswith("The history of")
    *noise, dtype = stranger.stderr.splitlines()
    assert dtype == "torch.bfloat16"
    assert not [line for line in noise if "warn" in line.lower() or "trust" in line.lower()]
    assert "These weights were not evaluated." in card
    assert "mean of the weights after steps 6, 3" in card
    mean = load_model(output).model.state_dict()
    for name, last in run.model.state_dict().items():
        assert (mean[name] - last).abs().max() < 0.1, name

    said = GenerationConfig.from_pretrained(output)
    ours = Sampling()
    for name in ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty"):
        assert getattr(said, name) == getattr(ours, name), name
    assert said.bos_token_id == said.eos_token_id == 2  # the token in front of a text
    tokenizer = json.loads((output / "tokenizer_config.json").read_text())
    assert (tokenizer["model_max_length"], tokenizer["bos_token"], tokenizer["eos_token"]) == (64, "</s>", "</s>")


def test_a_card_says_what_a_stranger_wants_to_know(run: OneFileRun) -> None:
    folder = run.folder / "checkpoints" / "step-00000006"
    card = model_card(CardFacts([read_state(folder)], [folder], run.model.config, "float32", None))
    results = ModelCardData(**ModelCard(card).data.to_dict()).eval_results
    assert {result.metric_type: result.metric_value for result in results} == {
        "loss": 6.0,
        "perplexity": 64.0,
        "word_perplexity": 729.0,
        "bits_per_byte": 3.0,
    }
    assert {result.dataset_split for result in results} == {"valid"}
    train = run.corpus.parts[0].dataset.manifest.splits["train"]
    for said in (
        f"| CC BY-SA 3.0 and GFDL (English Wikipedia) | 94 | 2.84 million (2,843,290) | {number(train.tokens)} |",
        f"| **sum** | **{run.model.num_parameters():,}** |",
        "| token perplexity | 64 | token (1,000 measured) |",
        "| bits per byte | 3 | UTF-8 byte (85,210 in the split) |",
        "learning_rate: 0.0005",
        "has\nnot been taught to follow instructions",
        f"| dataset_id | `{run.corpus.dataset_id}` |",
        "| checkpoint | step 6 |",
    ):
        assert said in card, said
    assert "undefined" not in card.lower()


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0"),
        (94, "94"),
        (123_456, "123,456"),
        (2_581_070, "2.58 million (2,581,070)"),
        (10**9 - 1, "1 billion (999,999,999)"),
    ],
)
def test_numbers_are_written_as_people_do(count: int, said: str) -> None:
    assert number(count) == said


def test_figures_have_four_digits() -> None:
    assert [figure(value) for value in (0.25, 6.12345, 212.249, 43_210.9)] == ["0.25", "6.123", "212.2", "43,211"]


def test_the_hub_refuses_in_one_line_without_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with HubServer("me/tiny", "0" * 40, {}, kind="models") as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        hub.faults.forbidden = True
        with pytest.raises(UserError, match="may not write here") as refused:
            push(tmp_path, "me/tiny")
    assert TOKEN not in str(refused.value)
    assert len(refused.value.problems) == 1


def test_what_cannot_work_is_said_before_anything_is_written(
    run: OneFileRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(UserError) as refused:
        check_repository("not a name")
    assert [problem.split(";")[0] for problem in refused.value.problems] == [
        "--push-to-hub not a name: is no name of a repository",
        "--push-to-hub: nobody is logged in to the hub",
    ]
    with pytest.raises(UserError, match="--max-shard-size 5: write a number and a unit"):
        shard_bytes("5")
    assert shard_bytes("5GB") == 5 * 10**9
    with pytest.raises(UserError, match=r"--average 3: .* holds 2 checkpoints that verify"):
        export(run.folder, tmp_path / "x", Form(average=3))
    assert not (tmp_path / "x").exists()
