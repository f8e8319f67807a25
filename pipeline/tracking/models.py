"""An export in MLflow: a logged model of its run and step, and at wish a version in the model registry.

`python -m pipeline.tracking.models`, a program of its own: what MLflow asks of the hub and leaves in its process stays
there. It reads a `Publication` as JSON and prints one line: what was made, or why not.
"""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from pipeline.redact import failure_message

SECONDS = 600
"""Within which MLflow takes a model that is registered."""
QUICK_SECONDS = 60
"""Likewise one that stays where it is."""


@dataclass(frozen=True)
class Publication:
    """An exported folder, and where MLflow is to know it.

    Attributes:
        run_id, experiment_id: of the run that trained it.
        metrics: of its checkpoint's evaluation.
        register: name in the registry; the folder is then copied to MLflow, which else holds path and hash alone.
    """

    uri: str
    experiment_id: str
    run_id: str
    folder: str
    name: str
    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    register: str | None = None
    alias: str | None = None


def publish(publication: Publication) -> str:
    """One line: what MLflow knows now.

    Raises:
        UserError: it could not be reached, or refused.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment |= {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_TRACKING_URI": publication.uri}
    environment.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    limit = SECONDS if publication.register else QUICK_SECONDS
    command = [sys.executable, "-m", "pipeline.tracking.models"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asdict(publication)),
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"MLflow at {publication.uri}: no answer within {limit} s; the export itself stands") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = lines or done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"MLflow at {publication.uri}: {said[-1][:300]}; the export itself stands")
    return lines[-1]


def folder_hash(folder: Path) -> str:
    """sha256 over every file's name and sha256: what these exact files are called."""
    digest = hashlib.sha256()
    for path in sorted(item for item in folder.rglob("*") if item.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder)}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _make(publication: Publication) -> str:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModelOutput

    client, folder = MlflowClient(publication.uri), Path(publication.folder)
    tags = {
        "globallocal.step": str(publication.step),
        "globallocal.path": publication.folder,
        "globallocal.sha256": folder_hash(folder),
    }
    if not publication.register:
        tags["mlflow.model.isExternal"] = "true"
    model = client.create_logged_model(
        publication.experiment_id,
        name=publication.name,
        source_run_id=publication.run_id,
        tags=tags,
        params={"step": str(publication.step), "path": publication.folder},
        model_type="globallocal",
    )
    said = f"model {model.model_id} of run {publication.run_id}, step {publication.step:,}"
    if publication.register:
        said += _register(client, publication, model.model_id)
    else:
        client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(publication.run_id, [LoggedModelOutput(model.model_id, publication.step)])
    for name, value in publication.metrics.items():
        client.log_metric(publication.run_id, f"model/{name}", value, step=publication.step, model_id=model.model_id)
    return said


def _register(client: Any, publication: Publication, model_id: str) -> str:
    import mlflow
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = publication.folder
    parts = {
        "model": AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
        "tokenizer": AutoTokenizer.from_pretrained(folder),
    }
    info = mlflow.transformers.log_model(
        parts,
        task="text-generation",
        model_id=model_id,
        registered_model_name=publication.register,
        pip_requirements=["torch", "transformers", "safetensors"],
    )
    version = str(info.registered_model_version)
    if publication.alias:
        client.set_registered_model_alias(publication.register, publication.alias, version)
    at = f", {publication.register}@{publication.alias}" if publication.alias else ""
    return f"; registered as models:/{publication.register}/{version}{at}"


if __name__ == "__main__":
    try:
        print(f"\n{_make(Publication(**json.loads(sys.stdin.read())))}", flush=True)  # behind what libraries print
    except Exception as error:
        print(f"\n{failure_message(error)}", flush=True)
        sys.exit(1)
