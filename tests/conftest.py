"""Shared by all rooms: real text, a small dataset made of it, and what a missing part means."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from pipeline.files import locked

hypothesis.settings.register_profile("any machine", deadline=None)  # an example may take long on a busy one
hypothesis.settings.load_profile("any machine")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a worker for each core is enough threads
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # else torch compiles six programs to try the processor

ROOT = Path(__file__).parents[1]
REAL_TEXT = ROOT.parent / "shared" / "data"

TOGETHER = dict.fromkeys(
    ["test_checkpoint.py", "test_export.py", "test_stop.py", "test_training.py"], "trained"
) | dict.fromkeys(["test_ray.py", "test_interrupt.py"], "ray")
"""Modules that one worker runs: they share a fixture of minutes, or start Ray, which joins a cluster that it finds."""

LONG = ("tests/pipeline/", "tests/deploy/", "tests/model/test_kernels_interpreted.py")
"""What trains on real ranks, builds wheels, or interprets kernels."""


def scope(item_id: str) -> str:
    """What a worker takes as one: a module, or those of `TOGETHER`."""
    path = item_id.partition("::")[0]
    return TOGETHER.get(Path(path).name, path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker begins it when the others are about to end."""
    items.sort(key=lambda item: (scope(item.nodeid) != "trained", not item.nodeid.startswith(LONG)))


def pytest_collection_finish() -> None:
    """What is imported stays: it need not be looked through at every collection of garbage."""
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A module stays on one worker, whose fixtures another would make again; so do those of `TOGETHER`."""
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    return ByModule(config, log)


def missing(what: str, remedy: str) -> None:
    """Skip by name; under CI=true what CI can install must be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing; {remedy}")
    pytest.skip(f"{what} is missing; {remedy}")


@pytest.fixture(scope="session")
def real_text() -> Path:
    """Folder with `wikitext/`, `enwiki2019/` and `novels/`."""
    if not REAL_TEXT.is_dir():
        pytest.skip(f"real text is missing; put it at {REAL_TEXT}")
    return REAL_TEXT


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `sample` source (106 articles) under a vocabulary of 512; the worker that needs it first makes it for all."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    tokenizer, data = folder / "small-tokenizer", folder / "small-data"
    with locked(folder / "small-data.lock"):
        if not data.exists():
            globallocal("tokenizer", "--source", "sample", "--vocab-size", 512, "--output", tokenizer)
            globallocal("prepare", "--source", "sample", "--tokenizer", tokenizer, "--output", data)
    return data


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder of a small model that was never trained: vocabulary 512, and weights of some size."""
    import torch

    from model.configuration_globallocal import GlobalLocalConfig
    from model.modeling_globallocal import GlobalLocalForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "export"
    globallocal("tokenizer", "--source", "sample", "--vocab-size", 512, "--output", folder)
    torch.manual_seed(0)
    config = GlobalLocalConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=2,
        pool_size=64,
        pool_dim=32,
        router_hidden_size=32,
        conv_dilations=[[1, 2], [4]],
        router_context="summary",
        max_position_embeddings=64,
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
    )
    model = GlobalLocalForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model.lm_head.bias[2] = -30  # no text ends by itself
    model.save_pretrained(folder)
    return folder


TORCH = ("checkpoints", "evaluate", "export", "generate", "serve")
"""Commands that import torch, and so are forked from a process that has."""


def globallocal(*arguments: object, expect: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does; `expect` is the exit code."""
    words, whole = ["-m", "launch", *map(str, arguments)], {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if arguments[0] in TORCH and not environment:  # libraries read it when they are imported
        from tests import forks

        run = forks.run(words, whole)
    else:
        run = subprocess.run([sys.executable, *words], cwd=ROOT, env=whole, capture_output=True, text=True)
    assert run.returncode == expect, f"exit code {run.returncode}\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}"
    return run
