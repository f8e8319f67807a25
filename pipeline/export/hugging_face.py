"""A checkpoint becomes a folder that `transformers` loads in a process that has never heard of this project."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_prep.errors import UserError
from data_prep.store import sync_folder
from pipeline.checkpoints.fingerprint import probe_ids
from pipeline.checkpoints.folder import CheckpointState, list_checkpoints, read_state, verify
from pipeline.export.card import CardFacts, model_card
from pipeline.export.load import find_checkpoint, load_model, rebuild
from pipeline.export.onnx_graph import NAME as ONNX_NAME
from pipeline.export.onnx_graph import write_onnx
from pipeline.export.weights import Weights, differing_weights, write_weights
from pipeline.generation.sampling import Sampling

PROBE_TEXT = "GlobalLocal reads a text,\n\n  keeps its spaces, and ½ of the rest: naïve, 東京, 🙂."

# What a stranger does: nothing of ours is imported, and no network is used.
RELOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, probe = sys.argv[1:]
model, loading = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    logits = model.eval()(input_ids=torch.tensor(json.loads(probe))).logits[0, -1]
print(json.dumps({
    "wrong": {kind: sorted(map(str, names)) for kind, names in loading.items() if names},
    "text": tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids),
    "logits": logits.tolist(),
}))
"""


@dataclass(frozen=True)
class Form:
    """What is made of the weights.

    Attributes:
        max_shard_bytes: of one file of weights, where no single tensor is larger.
        average: the mean of the weights of so many of the run's newest checkpoints.
        repository: USER/NAME on the hub, where the folder will go.
        onnx: a graph for onnxruntime beside the weights, in float32; made of the whole model in memory.
    """

    dtype: torch.dtype = torch.float32
    max_shard_bytes: int = 5 * 10**9
    average: int = 1
    repository: str | None = None
    onnx: bool = False


def export(path: Path, output: Path, form: Form = Form()) -> CheckpointState:
    """Write `output`, compare it with the checkpoint, reload it in a fresh process, and only then publish it.

    This process holds the tensors of one file of weights at a time (for ONNX the model), the fresh one the model.

    Args:
        path: a run folder or a checkpoint.

    Returns:
        The state of the newest checkpoint in it.

    Raises:
        UserError: `output` exists, `path` is no checkpoint, or the reloaded model is not the same.
    """
    if output.exists():
        raise UserError(f"{output}: exists; remove it, or choose another --output")
    if (path / "config.json").is_file():
        raise UserError(f"{path}: is an exported model already; give a run or a checkpoint")
    folders = newest_checkpoints(path, form.average) if form.average > 1 else [find_checkpoint(path)]
    building = output.with_name(f".exporting-{output.name}")
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        states = write(folders, building, form)
        sync_folder(building)
        os.rename(building, output)
        sync_folder(output.parent)
    except OSError as error:
        raise UserError(f"{error.filename or building}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return states[0]


def newest_checkpoints(run: Path, count: int) -> list[Path]:
    """The newest checkpoints of a run that verify, the newest first. Raises UserError where there are fewer."""
    if not (run / "checkpoints").is_dir():
        raise UserError(f"--average {count}: is of a run's newest checkpoints, and {run} is no run folder; give one")
    problems: list[str] = []
    found: list[Path] = []
    for folder in list_checkpoints(run / "checkpoints"):
        faults = verify(folder)
        problems += faults
        found += [] if faults else [folder]
        if len(found) == count:
            return found
    few = f"--average {count}: {run} holds {len(found)} checkpoints that verify; ask for fewer, or keep more"
    raise UserError([*problems, few])


def write(folders: Sequence[Path], output: Path, form: Form) -> list[CheckpointState]:
    """Weights, configuration, modeling files, tokenizer, generation defaults, model card; all of it compared."""
    from transformers.dynamic_module_utils import custom_object_save

    from model.modeling_globallocal import GlobalLocalForCausalLM

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # reading needs no device, and DeepSpeed none to warn about
    from pipeline.checkpoints.reshard import ParameterReader

    states = [read_state(folder) for folder in folders]
    config, tokenizer_folder = rebuild(states[0], folders[0])
    with torch.device("meta"):
        model = GlobalLocalForCausalLM(config)
    weights = Weights.of(model, [ParameterReader(*pair) for pair in zip(folders, states, strict=True)])
    write_weights(weights, output, form.dtype, form.max_shard_bytes)
    ends = config.eos_token_id  # training begins a text behind the token that ends the one before
    config.bos_token_id = ends[0] if isinstance(ends, list) else ends
    config.dtype, config.architectures = str(form.dtype).removeprefix("torch."), [type(model).__name__]
    custom_object_save(model, output, config=config)  # type: ignore[arg-type]  # which takes it, and asks for a dict
    config.save_pretrained(output)
    special = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    Sampling().generation_config(**special).save_pretrained(output)
    copy_tokenizer(tokenizer_folder, output, config.max_position_embeddings)
    facts = CardFacts(states, folders, config, str(config.dtype), form.repository)
    (output / "README.md").write_text(model_card(facts))
    if wrong := differing_weights(weights, output, form.dtype):
        raise UserError(f"{output}: its weights are not the checkpoint's: {', '.join(wrong[:5])}; is the disk sound?")
    recorded = Recorded.of(states[0], form.dtype) if len(states) == 1 else None
    verify_reload(output, config.vocab_size, recorded)
    if form.onnx:
        write_onnx(load_model(output).model, output / ONNX_NAME)
    return states


def copy_tokenizer(tokenizer_folder: Path, output: Path, max_length: int) -> None:
    """As it is, but for two settings that frameworks read: the longest sequence of training, at which they cut texts,
    and the token in front of a text, which in training is the one that ends a text."""
    for item in tokenizer_folder.iterdir():
        if not (output / item.name).exists():
            shutil.copyfile(item, output / item.name)
    file = output / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"model_max_length": max_length}
    settings["bos_token"] = settings["eos_token"]
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Recorded:
    """What the model said of the probe when the checkpoint was saved.

    Attributes:
        values: its first logits behind the last token.
        bound: their largest distance from what is exported. Another device or precision rounds otherwise, and a router
            may then choose another row: so much is left open. The weights are compared bit by bit.
    """

    values: torch.Tensor
    bound: float

    @classmethod
    def of(cls, state: CheckpointState, dtype: torch.dtype) -> "Recorded":
        values = torch.tensor(state.logit_fingerprint.values)
        exact = dtype == torch.float32 and state.precision == "fp32"
        return cls(values, (0.01 if exact else 0.25) * max(1.0, values.abs().max().item()))


def verify_reload(folder: Path, vocab_size: int, recorded: Recorded | None) -> None:
    """Raises UserError where a fresh process cannot load all of it, or loads another model or tokenizer.

    Args:
        recorded: None for a mean of several checkpoints, which nothing was recorded of.
    """
    modules = folder / ".modules"
    probe = json.dumps(probe_ids(vocab_size).tolist())
    run = subprocess.run(
        [sys.executable, "-I", "-c", RELOAD, str(folder.resolve()), PROBE_TEXT, probe],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules.resolve())},
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    shutil.rmtree(modules, ignore_errors=True)
    if run.returncode:
        lines = run.stderr.strip().splitlines()
        raise UserError(f"{folder}: transformers cannot load the export: {lines[-1] if lines else run.returncode}")
    reloaded = json.loads(run.stdout.splitlines()[-1])
    problems = [f"{folder}: {kind}: {', '.join(names[:5])}" for kind, names in reloaded["wrong"].items()]
    if reloaded["text"] != PROBE_TEXT:
        problems.append(f"{folder}: the tokenizer reads {PROBE_TEXT!r} back as {reloaded['text']!r}")
    logits = torch.tensor(reloaded["logits"])
    if not torch.isfinite(logits).all():
        problems.append(f"{folder}: the reloaded model's logits are not finite; choose another checkpoint")
    elif recorded:
        distance = (logits[: len(recorded.values)] - recorded.values).abs().max().item()
        if distance > recorded.bound:
            problems.append(
                f"{folder}: reloaded logits differ from those of training by {distance:.2g}, the bound is "
                f"{recorded.bound:.2g}"
            )
    if problems:
        raise UserError(problems)
