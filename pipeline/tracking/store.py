"""Which MLflow store, experiment and page a run has."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from data_prep.errors import UserError

if TYPE_CHECKING:
    from pipeline.settings.sections import TrackingSection

DEFAULT_EXPERIMENT = "globallocal"
UI_PORT = 5000
"""Of `mlflow ui`."""
TRAINING_VIEW = "workflowType=machine_learning"
"""What MLflow's pages take from the URL; without it they open on traces of language models' calls."""


@dataclass(frozen=True)
class Experiment:
    """By name, made where there is none; or by id, which must be there."""

    name: str = ""
    id: str = ""

    def __str__(self) -> str:
        return self.name or f"id {self.id}"


def tracking_uri(uri: str | None) -> str:
    """The store: `uri`, else MLFLOW_TRACKING_URI, else `sqlite:///<cwd>/mlflow.db`; SQLite paths absolute.

    A server's user and password go from the URL, which MLflow prints, into the variables that it reads them from.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    server = urlsplit(uri)
    if server.scheme in ("http", "https") and server.username is not None:
        uri = server._replace(netloc=server.netloc.rpartition("@")[2]).geturl()
        os.environ |= {
            "MLFLOW_TRACKING_USERNAME": unquote(server.username),
            "MLFLOW_TRACKING_PASSWORD": unquote(server.password or ""),
            "MLFLOW_TRACKING_URI": uri,
        }
    path = uri.removeprefix("sqlite:///")
    return uri if path == uri else f"sqlite:///{Path(path).absolute()}"


def experiment_of(config: "TrackingSection") -> Experiment:
    """`tracking.experiment`, else MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID, else `globallocal`.

    Raises:
        UserError: both variables are set, where `tracking.experiment` is not.
    """
    if config.experiment:
        return Experiment(name=config.experiment)
    name, number = os.environ.get("MLFLOW_EXPERIMENT_NAME", ""), os.environ.get("MLFLOW_EXPERIMENT_ID", "")
    if name and number:
        raise UserError(
            f"MLFLOW_EXPERIMENT_NAME = {name!r} and MLFLOW_EXPERIMENT_ID = {number!r} are both set: unset one, or set "
            "tracking.experiment"
        )
    return Experiment(name, number) if name or number else Experiment(DEFAULT_EXPERIMENT)


def tags_of_environment() -> dict[str, str]:
    """MLFLOW_TAGS, a JSON object.

    Raises:
        UserError: it is something else.
    """
    text = os.environ.get("MLFLOW_TAGS", "")
    try:
        tags = json.loads(text) if text else {}
        return {str(name): str(value) for name, value in tags.items()}
    except (ValueError, AttributeError):
        raise UserError('MLFLOW_TAGS is not a JSON object, such as {"team": "language"}: correct or unset it') from None


def run_page(store: str, experiment_id: str, run_id: str) -> str:
    """The page of a run in MLflow's training view: its URL, behind the command that serves it where no server does."""
    path = f"/#/experiments/{quote(experiment_id)}/runs/{quote(run_id)}?{TRAINING_VIEW}"
    if store.startswith(("http://", "https://")):
        return f"{store.rstrip('/')}{path}"
    return f"mlflow ui --backend-store-uri {store}    then open  http://127.0.0.1:{UI_PORT}{path}"


def page_of_run_folder(run_folder: Path) -> str | None:
    """`run_page` of what the run folder says of its delivery; None where MLflow has no run of it."""
    try:
        delivery = json.loads((run_folder / "tracking" / "delivery.json").read_text())
        return run_page(delivery["store"], delivery["experiment_id"], delivery["run_id"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
