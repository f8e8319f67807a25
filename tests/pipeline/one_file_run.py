"""A run folder with checkpoints in one file each, as `checkpoints reshard` makes them, without training."""

from pathlib import Path
from typing import Any

import torch

from model.modeling_globallocal import GlobalLocalForCausalLM
from pipeline.checkpoints import zero_layout
from pipeline.checkpoints.consolidate import MODEL_FILE
from pipeline.checkpoints.fingerprint import VALUES, Fingerprint, probe_ids
from pipeline.checkpoints.folder import CheckpointState
from pipeline.checkpoints.write import commit, write_files
from pipeline.config import RunConfig, validate
from pipeline.data.corpus import open_corpus
from pipeline.engine.internals import Piece
from pipeline.evaluation.figures import Evaluation, Figures, HeldOut
from pipeline.export.load import build_model_config, keep_model
from pipeline.files import step_name


class OneFileRun:
    """A model with random weights; `save` writes a checkpoint of them as they are."""

    def __init__(self, folder: Path, dataset: Path, **model: Any) -> None:
        self.folder = folder
        self.config: RunConfig = validate(
            {
                "run": {"name": "tiny-run", "output_dir": str(folder)},
                "model": {"hidden_size": 32, "pool_size": 64, "pool_dim": 32, "router_hidden_size": 32} | model,
                "data": {"dataset": str(dataset), "sequence_length": 64},
                "training": {"max_steps": 100, "global_batch_size": 8, "micro_batch_size": 2},
                "tracking": {"enabled": False},
            },
            "test",
        )
        self.corpus = open_corpus(self.config.data)
        config = build_model_config(self.config, self.corpus)
        keep_model(config, self.corpus.tokenizer_folder, folder)
        torch.manual_seed(0)
        self.model = GlobalLocalForCausalLM(config).eval()

    def save(self, step: int, loss: float | None = None) -> Path:
        model, name = self.model, step_name(step)
        parameters = dict(model.named_parameters())
        pieces = [Piece(name, 0, index, 0, tensor.numel()) for index, (name, tensor) in enumerate(parameters.items())]
        content = {
            "module": dict(model.state_dict()),
            "buffer_names": [name for name, _ in model.named_buffers()],
            "optimizer": {"state": {index: {"step": torch.tensor(float(step))} for index in range(len(pieces))}},
            **dict.fromkeys(("global_steps", "global_samples", "skipped_steps"), 0),
        }
        root = self.folder / "checkpoints"
        root.mkdir(parents=True, exist_ok=True)
        files = {MODEL_FILE: content, zero_layout.file_name(0): zero_layout.to_plain(pieces)}
        written, problems = write_files(root / f".saving-{name}", files)
        problems = problems or commit(root / f".saving-{name}", root / name, self.state(step, loss), written)
        assert not problems
        return root / name

    def state(self, step: int, loss: float | None) -> CheckpointState:
        with torch.no_grad():
            logits = self.model(input_ids=probe_ids(self.model.config.vocab_size)).logits[0, -1, :VALUES]
        figures = None if loss is None else Figures(loss, 2.0**loss, 3.0**loss, loss / 2, 1000.0)
        return CheckpointState(
            step=step,
            consumed_samples=8 * step,
            consumed_tokens=8 * 64 * step,
            dataset_id=self.corpus.dataset_id,
            tokenizer_sha256=self.corpus.tokenizer.sha256,
            world_size=0,
            zero_stage=0,
            precision="fp32",
            config=self.config.model_dump(mode="json"),
            mlflow_run_id=None,
            next_batch_hash="",
            logit_fingerprint=Fingerprint(sha256="", values=logits.tolist()),
            seconds={},
            evaluation=None if figures is None else Evaluation(step, HeldOut(figures)),
            versions={},
        )
