"""The comparison in small: it trains, goes on where it was, and writes its page from what is there."""

import json
from pathlib import Path

import pytest
import torch

from tests.benchmarks.bench_recall import main
from tests.benchmarks.recall.contenders import CONTENDERS, Contender
from tests.benchmarks.recall.plan import Plan
from tests.benchmarks.recall.tasks import TASKS, VOCAB_SIZE
from tests.benchmarks.recall.training import Run, train


@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders_are_of_one_size_and_see_no_later_token(name: str) -> None:
    torch.manual_seed(0)
    model = Contender(CONTENDERS[name].build()).eval()
    assert 0.15e6 < model.num_parameters() < 0.24e6
    ids = torch.randint(VOCAB_SIZE, (1, 40))
    changed = ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % VOCAB_SIZE
    with torch.no_grad():
        logits, after = model(ids)[0], model(changed)[0]
    assert logits.shape == (1, 40, VOCAB_SIZE)
    torch.testing.assert_close(after[:, :20], logits[:, :20], atol=1e-5, rtol=1e-5)


def test_a_run_is_a_function_of_its_settings(tmp_path: Path) -> None:
    first, again = (train(Run("recall", "gpt", 0.003, 5, 1, tmp_path / folder)) for folder in ("a", "b"))
    other = train(Run("recall", "gpt", 0.003, 6, 1, tmp_path))
    assert first["accuracy"] == again["accuracy"] != other["accuracy"]


def test_small_form_and_its_page(tmp_path: Path) -> None:
    small = "--tasks recall --contenders globallocal --learning-rates 0.001 0.003 --seeds 0 1 --steps 2 --processes 1"
    main([*small.split(), "--folder", str(tmp_path / "runs")])
    names = {path.name: path.read_text() for path in (tmp_path / "runs").iterdir()}
    assert len(names) == 2 + 1  # both rates with the first seed, the better one with the other
    main([*small.split(), "--folder", str(tmp_path / "runs")])
    assert names == {path.name: path.read_text() for path in (tmp_path / "runs").iterdir()}
    main([*small.split(), "--folder", str(tmp_path / "runs"), "--page", str(tmp_path)])
    page = (tmp_path / "recall.md").read_text()
    assert "| GlobalLocal | 0." in page
    assert "at 4 pairs" in page  # after two steps nothing is recalled
    assert (tmp_path / "recall.svg").stat().st_size > 1000


def test_the_best_rate_of_every_task_is_the_one_with_most_right_answers(tmp_path: Path) -> None:
    plan = Plan(folder=tmp_path)
    for name, task in TASKS.items():
        for run, share in zip(plan.sweep(name, "gpt"), (0.5, 0.9, 0.9), strict=True):
            curve = [
                [50, {str(size): 0.95 for size in task.trained}],
                [100, {str(size): share for size in task.trained}],
            ]
            asked = {str(size): share for size in task.asked}
            result = {
                "curve": curve,
                "accuracy": asked,
                "steps": 100 * (1 + (share < 0.9)),
                "parameters": 1,
                "seconds": 1,
            }
            run.path.write_text(json.dumps(result | ({"steps": 50} if run.learning_rate == 0.008 else {})))
        best = plan.best(name, "gpt")
        assert best
        assert best.learning_rate == 0.008  # as good as 0.004, in fewer steps
    main(["--folder", str(tmp_path), "--page", str(tmp_path)])
    page = (tmp_path / "recall.md").read_text()
    assert page.count("| GPT | 0.90 |") == len(TASKS)
    assert "Not run yet" not in page
