"""`globallocal export --onnx`: one graph for a prompt and for each further token, equal in onnxruntime."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.cli import main
from pipeline.export.load import load_model
from pipeline.export.onnx_graph import BOUND, NEEDED, distance_from, write_onnx
from tests.conftest import missing
from tests.model.helpers import APART, make_model, tiny_config
from tests.pipeline.one_file_run import OneFileRun

EVERYTHING_ELSE: dict[str, Any] = {
    "router_context": "summary",
    "summary_rule": "delta",
    "summary_key_size": 5,
    "summary_key_heads": 2,
    "router_scores": "product_key",
    "pool_size": 20,
    "router_hidden_size": 10,
    "pool_dim": 16,
    "norm_placement": "post",
    **APART,
}


@pytest.fixture(scope="module")
def installed() -> None:
    if any(find_spec(name) is None for name in NEEDED):
        missing(", ".join(NEEDED), "run `make extras`")


@pytest.mark.extras
@pytest.mark.usefixtures("installed")
def test_an_export_runs_in_onnxruntime_as_the_page_says(small_dataset: Path, tmp_path: Path) -> None:
    """The page's own code, at each step beside the model that reads the text anew."""
    import onnxruntime

    OneFileRun(tmp_path / "run", small_dataset, router_context="summary", num_hidden_layers=2).save(3)
    output = tmp_path / "exported"
    assert main(["export", str(tmp_path / "run"), "--output", str(output), "--dtype", "bfloat16", "--onnx"]) == 0
    page = (Path("docs") / "export.md").read_text()
    code = page.partition("## ONNX")[2].partition("```python\n")[2].partition("```")[0]
    assert "onnxruntime" in code
    said: dict[str, Any] = {}
    exec(code.replace('"exported', f'"{output}').replace("print(", "text = ("), said)
    model = load_model(output).model
    ids = torch.tensor(said["tokenizer"]("The history of", add_special_tokens=False).input_ids)[None]
    greedy = model.generate(ids, max_new_tokens=20, do_sample=False, repetition_penalty=1.0, eos_token_id=None)
    assert said["text"] == said["tokenizer"].decode(greedy[0])
    batch = onnxruntime.InferenceSession(output / "model.onnx").get_inputs()[0]
    assert batch.shape == ["batch", "tokens"]
    assert b"/wt-" not in (output / "model.onnx").read_bytes()


@pytest.mark.extras
@pytest.mark.usefixtures("installed")
def test_the_other_layouts_too_and_another_model_is_told_apart(tmp_path: Path) -> None:
    model = make_model(tiny_config(**EVERYTHING_ELSE), dtype=torch.float32)
    write_onnx(model, tmp_path / "model.onnx")
    assert distance_from(model, tmp_path / "model.onnx") < 1e-4
    with torch.no_grad():
        model.model.layers[-1].attention.summary.taps.mul_(1.5)
    assert distance_from(model, tmp_path / "model.onnx") > BOUND


def test_what_onnx_needs_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.export.onnx_graph.NEEDED", ("onnx_that_is_not_there",))
    assert main(["export", str(tmp_path), "--output", str(tmp_path / "x"), "--onnx"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("onnx_that_is_not_there not found; install them: pip install 'globallocal[onnx]'")
