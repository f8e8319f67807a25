"""A checkpoint becomes a folder that `transformers` loads in a process that has never heard of this project."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from data_prep.errors import UserError
from data_prep.store import sync_folder
from pipeline.export.load import Loaded, load_model

PROBE_TEXT = "GlobalLocal reads a text,\n\n  keeps its spaces, and ½ of the rest: naïve, 東京, 🙂."

# What a stranger does: nothing of ours is imported, and no network is used.
RELOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer(text, add_special_tokens=False).input_ids
with torch.no_grad():
    logits = model(input_ids=torch.tensor([ids])).logits.float()
torch.save({"ids": ids, "text": tokenizer.decode(ids), "logits": logits}, folder + "/.reload.pt")
"""


def export(path: Path, output: Path, dtype: torch.dtype = torch.float32) -> Loaded:
    """Write `output`, reload it in a fresh process, compare logits and a tokenizer round trip, then publish.

    Args:
        path: a run folder or a checkpoint.
        dtype: of the weights written.

    Raises:
        UserError: `output` exists, `path` is no checkpoint, or the reloaded model is not the same.
    """
    if output.exists():
        raise UserError(f"{output}: exists; remove it, or choose another --output")
    loaded = load_model(path)
    if loaded.state is None:
        raise UserError(f"{path}: is an exported model already")
    building = output.with_name(f".exporting-{output.name}")
    shutil.rmtree(building, ignore_errors=True)
    try:
        write(loaded, building, dtype)
        verify_reload(loaded, building, dtype)
        sync_folder(building)
        os.rename(building, output)
        sync_folder(output.parent)
    except OSError as error:
        raise UserError(f"{error.filename or building}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return loaded


def write(loaded: Loaded, folder: Path, dtype: torch.dtype) -> None:
    """Weights, configuration, modeling files, tokenizer, generation defaults, model card."""
    model = loaded.model.to(dtype)
    model.register_for_auto_class("AutoModelForCausalLM")
    model.config.register_for_auto_class()
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    for item in loaded.tokenizer_folder.iterdir():
        shutil.copy2(item, folder / item.name)
    (folder / "README.md").write_text(model_card(loaded))


def verify_reload(loaded: Loaded, folder: Path, dtype: torch.dtype) -> None:
    """Raises UserError where a fresh process loads other logits or another tokenizer than the ones at hand."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder.resolve() / ".modules"),
    }
    run = subprocess.run(
        [sys.executable, "-I", "-c", RELOAD, str(folder.resolve()), PROBE_TEXT],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
    )
    shutil.rmtree(folder / ".modules", ignore_errors=True)
    if run.returncode:
        lines = run.stderr.strip().splitlines()
        raise UserError(f"{folder}: transformers cannot load the export: {lines[-1] if lines else run.returncode}")
    reloaded = torch.load(folder / ".reload.pt", weights_only=True)
    (folder / ".reload.pt").unlink()
    with torch.no_grad():
        logits = loaded.model.float()(input_ids=torch.tensor([reloaded["ids"]])).logits
    distance = (logits - reloaded["logits"]).abs().max().item()
    bound = 1e-4 if dtype == torch.float32 else 5e-2
    problems = []
    if not distance <= bound:
        problems.append(f"{folder}: reloaded logits differ by {distance:.2g}, the bound is {bound:g}")
    if reloaded["text"] != PROBE_TEXT:
        problems.append(f"{folder}: the tokenizer reads {PROBE_TEXT!r} back as {reloaded['text']!r}")
    if problems:
        raise UserError(problems)


def model_card(loaded: Loaded) -> str:
    """The figures that were measured, and how to load the model."""
    state = loaded.state
    assert state is not None
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    rows = {
        "parameters": f"{parameters:,}",
        "optimizer steps": f"{state.step:,}",
        "training tokens": f"{state.consumed_tokens:,}",
        "precision": state.precision,
        "dataset_id": f"`{state.dataset_id}`",
        "tokenizer sha256": f"`{state.tokenizer_sha256}`",
        "MLflow run": f"`{state.mlflow_run_id}`",
    }
    if state.evaluation:
        measured = state.evaluation.flat()
        rows |= {f"held-out {name.replace('_', ' ')}": f"{value:,.4g}" for name, value in measured.items()}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    settings = json.dumps(state.config["model"])
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {state.config["run"]["name"]}

A GlobalLocal causal language model: dilated causal convolutions, gated with a router over a static tensor pool.
Model settings: `{settings}`.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
ids = tokenizer("The history of", add_special_tokens=False, return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=48)[0]))
```
"""
