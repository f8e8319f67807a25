"""What `data.dataset` may name, and training on each kind of it, on two real ranks."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.manifest import open_dataset
from launch.preflight import doctor
from launch.preflight.estimate import Machine, estimate
from pipeline.config import load_config, validate
from pipeline.data.corpus import open_corpus
from pipeline.data.mixture import MixtureSource
from pipeline.settings.sections import DataSection
from tests.conftest import globallocal
from tests.pipeline.comparing import assert_same_state, losses_of
from tests.pipeline.dataset_fixture import cut, write_dataset, write_stream
from tests.pipeline.ranks import Run, run_ranks
from tests.pipeline.servers_fixture import s3_dataset

LAST = "checkpoints/step-00000006"

pytestmark = pytest.mark.timeout(1800)  # the first test that needs the ranks waits for all of their runs


def mixture(*parts: tuple[object, float]) -> DataSection:
    return DataSection.model_validate({"dataset": [{"dataset": str(path), "weight": weight} for path, weight in parts]})


def override(*parts: tuple[object, float]) -> str:
    return f"data.dataset={json.dumps([{'dataset': str(path), 'weight': weight} for path, weight in parts])}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two datasets of 100 and 30 samples at sequence length 10."""
    paths = [tmp_path_factory.mktemp("a") / "wiki", tmp_path_factory.mktemp("b") / "wiki"]
    write_stream(paths[0], np.arange(1001, dtype=np.uint16), 64, 3)
    write_stream(paths[1], np.arange(40_000, 40_301, dtype=np.uint16), 50, 2)
    return paths


def test_a_mixture_is_named_by_its_datasets_and_their_shares(folders: list[Path]) -> None:
    one, two = folders
    corpus = open_corpus(mixture((one, 0.7), (two, 0.3)))
    assert [part.share for part in corpus.parts] == [Fraction(7, 10), Fraction(3, 10)]
    assert [part.name for part in corpus.parts] == ["wiki-1", "wiki-2"]
    assert corpus.dataset_id == open_corpus(mixture((one, 7), (two, 3))).dataset_id
    others = [mixture((one, 0.6), (two, 0.4)), mixture((one, 0.3), (two, 0.7)), mixture((two, 0.7), (one, 0.3))]
    names = {corpus.dataset_id, *(open_corpus(other).dataset_id for other in others)}
    assert len(names) == 4
    source = corpus.source("train", 10, seed=3)
    assert isinstance(source, MixtureSource)
    assert (source.samples(np.arange(100))[:, 0] >= 40_000).sum() == 30


def test_a_mixture_of_one_is_that_dataset(folders: list[Path]) -> None:
    corpus = open_corpus(mixture((folders[0], 5)))
    assert corpus.dataset_id == open_corpus(DataSection(dataset=str(folders[0]))).dataset_id
    assert corpus.dataset_id == corpus.parts[0].dataset.dataset_id


def test_datasets_of_two_tokenizers_are_refused_and_both_named(folders: list[Path], tmp_path: Path) -> None:
    tokens = np.arange(500, dtype=np.uint16)
    other = write_dataset(tmp_path, {"train": cut(tokens, 50, 2)}, tokenizer_model=b"other")
    with pytest.raises(UserError) as error:
        open_corpus(mixture((folders[0], 1), (tmp_path, 1)))
    ids = [open_corpus(DataSection(dataset=str(path))).tokenizer.sha256[:16] for path in (tmp_path, folders[0])]
    assert error.value.problems == [
        f"data.dataset: {other.folder}: its tokenizer is {ids[0]}…, that of {folders[0]} is {ids[1]}…; "
        "prepare both with one tokenizer"
    ]


def test_a_dataset_given_twice_is_refused(folders: list[Path]) -> None:
    with pytest.raises(UserError) as error:
        open_corpus(mixture((folders[0], 1), (folders[1], 1), (f"{folders[0]}/", 2)))
    assert error.value.problems == [
        f"data.dataset: {folders[0]}/: the same dataset as {folders[0]}; name it once, with the sum of the weights"
    ]


def test_all_datasets_that_cannot_be_opened_are_named(tmp_path: Path, folders: list[Path]) -> None:
    with pytest.raises(UserError) as error:
        open_corpus(mixture((tmp_path / "one", 1), (folders[0], 1), (tmp_path / "two", 1)))
    assert [problem.partition(":")[0] for problem in error.value.problems] == [f"{tmp_path}/one", f"{tmp_path}/two"]


@pytest.mark.parametrize(
    ("dataset", "problems"),
    [
        ([], ["data.dataset = []: must name a folder, a URL, or at least one {dataset, weight}"]),
        ([{"dataset": "a"}], ["data.dataset.0.weight is required"]),
        (
            [{"dataset": "a", "weight": 0}, {"dataset": "b", "wieght": 1}],
            [
                "data.dataset.0.weight = 0: input should be greater than 0",
                "data.dataset.1.weight is required",
                "unknown key data.dataset.1.wieght; nearest: data.dataset.0.weight, data.dataset, "
                "data.dataset.0.dataset",
            ],
        ),
    ],
)
def test_a_mixture_that_is_written_wrong_is_told_by_the_line(dataset: Any, problems: list[str]) -> None:
    values = {"run": {"name": "x"}, "data": {"dataset": dataset}, "training": {"max_steps": 1}}
    with pytest.raises(UserError) as error:
        validate(values, "run.yaml")
    assert error.value.problems == [f"run.yaml: {problem}" for problem in problems]


# ---- two ranks train


@pytest.fixture(scope="module")
def second_dataset(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path) -> Path:
    """Other text under the tokenizer of `small_dataset`."""
    folder = tmp_path_factory.mktemp("second")
    draw = random.Random(0)
    words = ["the", "of", "a", "river", "stone", "light", "under", "over", "walks", "sees"]
    texts = [" ".join(draw.choices(words, k=120)) for _ in range(120)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["--source", "files", "--path", folder / "texts.jsonl", "--valid-share", 0.2]
    tokenizer = small_dataset / "tokenizer"
    globallocal("prepare", *arguments, "--tokenizer", tokenizer, "--output", folder / "words")
    return folder / "words"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path) -> Iterator[str]:
    """`small_dataset` on a real S3 server, and beside it `broken`, with one bit of its shard flipped."""
    with s3_dataset(tmp_path_factory.mktemp("s3"), small_dataset, "corpus/small") as system:
        system.copy("corpus/small", "corpus/broken", recursive=True)
        shard = bytearray(system.cat_file("corpus/broken/train-000000.tar"))
        shard[len(shard) // 2] ^= 1
        system.pipe_file("corpus/broken/train-000000.tar", bytes(shard))
        yield "s3://corpus/small"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus-runs")


@pytest.fixture(scope="module")
def runs(trained: Path, small_dataset: Path, second_dataset: Path, url: str) -> dict[str, dict[str, Any]]:
    mixed, cache = override((url, 0.75), (second_dataset, 0.25)), f"data.cache_dir={trained}/cache"
    windowed = [f"data.dataset={url}", "data.window_tokens=65536", cache]
    plan = [
        Run("mixture", [mixed, cache]),
        Run("mixture-resumed", [mixed, cache], copy_checkpoint="mixture/step-00000003"),
        Run(
            "mixture-reweighted",
            [override((url, 0.5), (second_dataset, 0.5)), cache],
            copy_checkpoint="mixture/step-00000003",
        ),
        Run("windowed", windowed),
        Run("windowed-resumed", [*windowed, "data.cache_bytes=100e6"], copy_checkpoint="windowed/step-00000003"),
        Run("rewindowed", [*windowed, "data.window_tokens=4096"], copy_checkpoint="windowed/step-00000003"),
        Run("local"),
        Run("moved", [f"data.dataset={url}", cache], copy_checkpoint="local/step-00000003"),
        Run("other-tokenizer", [f"data.dataset={trained}/by-hand"], copy_checkpoint="local/step-00000003"),
        Run("broken", ["data.dataset=s3://corpus/broken", f"data.cache_dir={trained}/empty-cache"]),
        Run("small-cache", [f"data.dataset={url}", f"data.cache_dir={trained}/empty-cache", "data.cache_bytes=1000"]),
    ]
    shards = cut(np.arange(500, dtype=np.uint16), 50, 2)
    write_dataset(trained / "by-hand", {"train": shards, "valid": shards}, tokenizer_model=b"other")
    untracked = ["tracking.enabled=false"]
    plan = [run if run.name == "mixture" else replace(run, overrides=[*run.overrides, *untracked]) for run in plan]
    return {result["name"]: result for result in run_ranks(plan, trained, small_dataset)}


@pytest.mark.parametrize(
    ("unbroken", "resumed"), [("mixture", "mixture-resumed"), ("windowed", "windowed-resumed"), ("local", "moved")]
)
def test_a_resumed_run_is_bitwise_the_unbroken_one(
    runs: dict[str, Any], trained: Path, unbroken: str, resumed: str
) -> None:
    assert runs[unbroken]["code"] == 0, runs[unbroken]
    assert runs[resumed]["code"] == 0, runs[resumed]
    losses = losses_of(trained, unbroken)
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    assert losses_of(trained, resumed) == {step: losses[step] for step in (4, 5, 6)}
    assert_same_state(trained / unbroken / LAST, trained / resumed / LAST)


def test_the_order_is_the_mixture_and_the_window(runs: dict[str, Any], trained: Path) -> None:
    first = [losses_of(trained, name)[1] for name in ("mixture", "windowed", "local")]
    assert len(set(first)) == 3


def test_other_weights_or_windows_are_refused_at_a_resume(runs: dict[str, Any]) -> None:
    assert runs["mixture-reweighted"]["code"] == runs["rewindowed"]["code"] == 2
    (line,) = runs["mixture-reweighted"]["problems"]
    assert "was written with dataset " in line
    assert line.endswith("; give data.dataset the same dataset, or mixture")
    (line,) = runs["rewindowed"]["problems"]
    assert "data.window_tokens 65536 → 4096: a resumed run may not change it" in line


def test_a_dataset_of_another_tokenizer_is_refused_at_a_resume_and_both_are_named(
    runs: dict[str, Any], trained: Path, small_dataset: Path
) -> None:
    assert runs["other-tokenizer"]["code"] == 2
    ids = [open_dataset(folder).manifest.tokenizer.sha256 for folder in (small_dataset, trained / "by-hand")]
    assert any(
        f"was written with tokenizer {ids[0]}, this run has {ids[1]}; give data.dataset one of that tokenizer" in line
        for line in runs["other-tokenizer"]["problems"]
    )
    told = globallocal("evaluate", trained / "local", "--dataset", trained / "by-hand", expect=2).stderr
    assert f"its tokenizer is {ids[1][:16]}…, the model's is {ids[0][:16]}…; evaluate on a dataset of the" in told


def test_a_damaged_remote_shard_is_one_line_with_its_url(runs: dict[str, Any], trained: Path) -> None:
    assert runs["broken"]["code"] == 2
    (line,) = runs["broken"]["problems"]
    assert line.startswith("s3://corpus/broken/train-000000.tar: blake3 ")
    assert not list(trained.glob("broken/checkpoints/step-*"))


def test_a_cache_that_cannot_hold_what_is_read_is_refused_before_step_0(runs: dict[str, Any]) -> None:
    (line,) = runs["small-cache"]["problems"]
    assert "needs a cache of" in line
    assert "the budget of" in line
    assert "set data.window_tokens" in line


def test_each_dataset_has_its_own_held_out_loss_beside_that_of_the_mixture(
    runs: dict[str, Any], trained: Path, second_dataset: Path
) -> None:
    values = {
        name: losses_of(trained, "mixture", name)[6]
        for name in ("loss/valid", "loss/valid/small", f"loss/valid/{second_dataset.name}", "bits_per_byte/small")
    }
    assert values["loss/valid"] == pytest.approx(0.75 * values["loss/valid/small"] + 0.25 * values["loss/valid/words"])
    assert values["loss/valid/small"] != values["loss/valid/words"]


def test_state_and_mlflow_know_datasets_and_weights(
    runs: dict[str, Any], trained: Path, second_dataset: Path, url: str
) -> None:
    state = json.loads((trained / "mixture" / LAST / "state.json").read_text())
    data = DataSection.model_validate({**state["config"]["data"], "cache_dir": str(trained / "cache")})
    corpus = open_corpus(data)
    assert state["dataset_id"] == corpus.dataset_id
    assert [entry["weight"] for entry in state["config"]["data"]["dataset"]] == [0.75, 0.25]
    client = mlflow.MlflowClient(f"sqlite:///{trained}/mlflow.db")
    experiment = client.get_experiment_by_name("globallocal")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], filter_string="attributes.run_name = 'mixture'")
    assert run.data.tags["dataset_id"] == corpus.dataset_id
    found = {item.dataset.digest: {tag.key: tag.value for tag in item.tags} for item in run.inputs.dataset_inputs}
    assert {digest: tags["weight"] for digest, tags in found.items()} == {
        part.dataset.dataset_id[:36]: weight for part, weight in zip(corpus.parts, ("0.75", "0.25"), strict=True)
    }


def test_evaluate_doctor_and_estimate_take_mixtures_and_urls(runs: dict[str, Any], trained: Path, url: str) -> None:
    told = json.loads(globallocal("evaluate", trained / "mixture", "--max-samples", 5, "--json", "-").stdout)
    assert url in [item["location"] for item in told["datasets"]]
    for name, found in (("", told["mixed"]), *((f"/{item['name']}", item) for item in told["datasets"])):
        assert found["loss"] == pytest.approx(losses_of(trained, "mixture", f"loss/valid{name}")[6], abs=1e-4)
    assert [item["share"] for item in told["datasets"]] == [0.75, 0.25]
    config = load_config(trained / "mixture" / "config.yaml")
    found = {finding.check: finding for finding in doctor.data(config, open_corpus(config.data))}
    assert {finding.level for finding in found.values()} <= {"ok", "warning"}
    assert {"dataset", "cache", "vocabulary"} <= set(found)
    estimated = estimate(config, Machine())
    assert estimated.epochs
    assert not [note for note in estimated.notes if "dataset" in note]
