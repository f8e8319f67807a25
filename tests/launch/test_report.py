"""`globallocal runs | report`: what run folders tell, whole, half written and hostile."""

import fcntl
import json
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from launch.cli import main
from launch.report import overview, words
from launch.report.charts import MOST_POINTS, thin
from launch.report.page import page
from launch.report.read import TAIL_BYTES, read_run
from launch.report.run import Point, axes, settle
from tests.launch.browser import program
from tests.launch.run_folder import write_checkpoint, write_run

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


class Tags(HTMLParser):
    """The start tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_finished_run_that_was_killed_once(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", killed_at=110))
    assert (run.state, run.step, run.steps, run.tokens) == ("done", 300, 300, 614_400)
    assert [point.step for point in run.points] == sorted({*range(10, 301, 10), *range(75, 301, 75)})
    assert [point.step for point in run.undone] == [80, 90, 100, 110]
    assert not run.missing
    said = " ".join(words.summary(run))
    assert "It trained for 2 min 30 s, at 4,144 tokens per second on 2 ranks (CPU)." in said
    assert "It is done: all 300 steps, 614,400 tokens." in said
    assert "It was started again once, last after: local rank 1 ended by signal 9." in said
    assert "Kept: 4 checkpoints (145.2 MB), the newest of step 300." in said
    hours = axes(run)["hours"]
    assert hours == sorted(hours)
    assert hours[-1] == pytest.approx((300 * 0.5) / 3600)  # ten minutes without a process are not counted


def test_points_that_are_logged_again_replace_the_earlier() -> None:
    def point(step: int, **metrics: float) -> Point:
        return Point(step, step, 0.0, metrics)

    kept, undone = settle([point(10, a=1), point(10, b=2), point(20, a=3), point(20, a=4), point(10, a=5)])
    assert [(item.step, item.metrics) for item in kept] == [(10, {"a": 5})]
    assert [(item.step, item.metrics) for item in undone] == [(10, {"a": 1, "b": 2}), (20, {"a": 3}), (20, {"a": 4})]


def test_a_long_curve_keeps_its_highs_and_lows() -> None:
    curve = [(step, 1.0) for step in range(100_000)]
    curve[77_777] = (77_777, 9.0)
    curve[33_333] = (33_333, float("nan"))
    steps, values = thin(curve)
    assert len(steps) <= MOST_POINTS
    assert (77_777, 9.0) in zip(steps, values, strict=True)
    assert steps == sorted(steps)


@pytest.mark.parametrize(("code", "state"), [(75, "preempted"), (76, "hung"), (1, "failed"), (None, "failed")], ids=str)
def test_how_a_run_ended_is_its_state(tmp_path: Path, code: int | None, state: str) -> None:
    folder = write_run(tmp_path / "run", taken=160)
    if code is not None:
        end = {"time": 4e9, "code": code, "step": 150, "cause": "this", "reason": "that", "restart": False}
        (folder / "restarts.jsonl").write_text(json.dumps(end) + "\n")
    run = read_run(folder)
    assert (run.state, run.step) == (state, 160)
    assert ("this" in run.why) == (code is not None)


def test_a_run_without_a_launcher_says_itself_how_it_ended(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", taken=160)
    with open(folder / "metrics.jsonl", "a") as file:
        ended = {"event": "ended", "step": None, "time_unix_seconds": 1.8e9, "status": "preempted"}
        file.write(json.dumps(ended) + "\n")
    assert read_run(folder).state == "preempted"


def test_a_run_that_was_refused_says_what_is_to_be_mended(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", taken=160)
    end = {
        "time": 4e9,
        "code": 2,
        "step": 150,
        "cause": "refused by the ranks",
        "reason": "said above",
        "restart": False,
    }
    (folder / "restarts.jsonl").write_text(json.dumps(end) + "\n")
    (folder / "logs" / "launch.log").write_text("error: too early\nstep 10\nerror: lower the rate\nthe end\n")
    assert (read_run(folder).state, read_run(folder).why) == ("failed", "lower the rate")


def test_a_run_that_its_launcher_starts_again_is_running(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", taken=160)
    end = {"time": time.time(), "code": 1, "step": 150, "cause": "a rank died", "reason": "that", "restart": True}
    (folder / "restarts.jsonl").write_text(json.dumps(end) + "\n")
    run = read_run(folder)
    assert (run.state, run.why) == ("running", "being started again after: a rank died")


def test_a_run_whose_lock_is_held_runs_until_it_is_silent_for_too_long(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", taken=160)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = read_run(folder)
        assert run.state == "running"
        assert words.seconds_left(run) == pytest.approx(140 * 2048 / (run.last(words.SPEED) or 0))
        settings = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(settings.replace("hang_timeout_seconds: 1800", "hang_timeout_seconds: -1"))
        assert read_run(folder).state == "hung"


def damage_torn(folder: Path) -> str:
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 310, "metr')
    return "of metrics.jsonl 1 line cannot be read"


def damage_settings(folder: Path) -> str:
    (folder / "config.yaml").write_text("run: [unclosed")
    return "config.yaml cannot be read"


def damage_no_record(folder: Path) -> str:
    (folder / "metrics.jsonl").unlink()
    return "there are no curves"


def damage_no_checkpoint(folder: Path) -> str:
    shutil.rmtree(folder / "checkpoints")
    return "no checkpoint stands yet"


def damage_checkpoint(folder: Path) -> str:
    (folder / "checkpoints" / "step-00000300" / "state.json").write_text("{")
    return "checkpoints/step-00000300 cannot be read"


def damage_types(folder: Path) -> str:
    odd = [
        [],
        7,
        {"step": "x", "metrics": {}},
        {"step": -3, "metrics": {"loss/train": 1}},
        {"event": 5},
        {"event": "saved"},
    ]
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(item) + "\n" for item in odd)
        file.write('{"step": 320, "tokens": null, "metrics": {"loss/train": "nan", "loss/valid": null, "x": []}}\n')
    (folder / "restarts.jsonl").write_text('{"time": "soon"}\n[1]\n')
    (folder / "health").mkdir()
    (folder / "health" / "roll_backs.json").write_text('[{"step": 1}]')
    for name, state in (("150", {}), ("225", {"evaluation": [1]}), ("300", {"evaluation": {"step": 300, "loss": "x"}})):
        (folder / "checkpoints" / f"step-00000{name}" / "state.json").write_text(json.dumps(state))
    with open(folder / "metrics.jsonl", "a") as file:
        for odd_event in ("started", "saved", "evaluation", "roll_back", "ended", "spike"):
            file.write(json.dumps({"event": odd_event, "max_steps": "x", "samples": 3, "loss": [], "tags": 1}) + "\n")
    return "health/roll_backs.json cannot be read"


@pytest.mark.parametrize(
    "damage",
    [damage_torn, damage_settings, damage_no_record, damage_no_checkpoint, damage_checkpoint, damage_types],
)
def test_a_broken_folder_is_told_of_as_far_as_it_goes(tmp_path: Path, damage: object, capsys) -> None:
    folder = write_run(tmp_path / "run")
    line = damage(folder)  # type: ignore[operator]
    assert main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 0
    told = capsys.readouterr()
    assert line in told.err
    assert line in Tags((tmp_path / "page.html").read_text()).text
    assert main(["runs", str(tmp_path)]) == 0


def test_an_empty_run_folder_has_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    text = page([read_run(tmp_path / "run")])
    assert "no checkpoint stands yet" in text
    assert not words.closing(read_run(tmp_path / "run"))[0].startswith(" ")


def test_several_runs_are_compared(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / "one", name="one")),
        read_run(write_run(tmp_path / "two", name="two", learning_rate=1e-3, taken=160)),
    ]
    differing = {key: values for key, values, differs in words.settings_table(runs) if differs}
    assert differing == {"run.name": ["one", "two"], "optimizer.learning_rate": ["0.003", "0.001"]}
    tags = Tags(page(runs))
    assert "Where the runs differ" in tags.text
    assert ("section", {"id": "nodes"}) in tags.found
    assert ("section", {"id": "more"}) not in tags.found, "a metric that no chart names"
    assert sum("differs" in (attributes.get("class") or "") for _, attributes in tags.found) == 4


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / folder, name="same")) for folder in ("one", "two")]
    text = page(runs)
    assert [f"{tmp_path / folder} <span" in text for folder in ("one", "two")] == [True, True]


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", name=HOSTILE, sample=HOSTILE))
    tags = Tags(page([run, run]))
    scripts = [attributes for tag, attributes in tags.found if tag == "script"]
    assert [attributes.get("type") or bool(attributes.get("nonce")) for attributes in scripts] == [
        *("application/json", "application/json"),
        *(True, True),
    ]
    assert "img" not in {tag for tag, _ in tags.found}
    assert not [name for _, attributes in tags.found for name in attributes if name.startswith("on")]
    fetching = {"link", "iframe", "object", "embed", "base", "form"}
    assert not fetching & {tag for tag, _ in tags.found}
    assert all((attributes.get("href") or "#").startswith("#") for tag, attributes in tags.found if tag == "a")


def test_a_browser_draws_the_page_and_runs_nothing_else(tmp_path: Path) -> None:
    browser = program()
    run = read_run(write_run(tmp_path / "run", name=HOSTILE, sample=HOSTILE, killed_at=110))
    (tmp_path / "page.html").write_text(page([run]))
    done = subprocess.run(
        [
            *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "page.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    tags = Tags(done.stdout)
    charts = [attributes for _, attributes in tags.found if "data-chart" in attributes]
    drawn = [attributes for attributes in charts if "js-plotly-plot" in (attributes.get("class") or "")]
    assert len(charts) > 8
    assert drawn == charts
    assert "<title>owned" not in done.stdout


def test_runs_at_a_glance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "whole", killed_at=110)
    write_run(tmp_path / "lost", taken=160)
    write_checkpoint(tmp_path / "older", 75)
    (tmp_path / "no-run").mkdir()
    assert main(["runs", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(Path(row["run"]).name, row["state"], row["step"], row["restarts"]) for row in rows] == [
        ("lost", "failed", 160, 0),
        ("older", "failed", 75, 0),
        ("whole", "done", 300, 1),
    ]
    assert rows[2]["valid_loss"] == pytest.approx(4.792, abs=1e-3)
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["run", "state", "step", "loss"]
    assert "160/300" in lines[1]
    assert "killed" in "".join(lines)
    console = Console(force_terminal=True, width=100, record=True)
    overview.show(overview.look(tmp_path), tmp_path, console)
    assert "160/300" in console.export_text()


def test_a_glance_at_a_long_record_reads_its_beginning_and_its_end(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=20_000, taken=15_000)
    (folder / "config.yaml").unlink()
    assert (folder / "metrics.jsonl").stat().st_size > 3 * TAIL_BYTES
    glance, whole = read_run(folder, whole=False), read_run(folder)
    assert len(glance.points) < len(whole.points) / 3
    assert (glance.step, glance.steps, glance.last(words.SPEED)) == (15_000, 20_000, whole.last(words.SPEED))


def test_where_there_is_no_run_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words_of_command, line in (
        (["runs", str(tmp_path / "none")], "no such folder; give the folder that holds your runs"),
        (["runs", str(tmp_path)], "holds no run; a training writes one into runs/NAME"),
        (["report", str(tmp_path), "--output", str(tmp_path / "page.html")], "holds no run; globallocal runs FOLDER"),
    ):
        assert main(words_of_command) == 2
        assert line in capsys.readouterr().err


def test_a_training_closes_with_what_comes_next(tmp_path: Path) -> None:
    lines = words.closing(read_run(write_run(tmp_path / "run", killed_at=110)))
    assert lines[0] == "made        done, 300 of 300 steps"
    said = "\n".join(lines)
    assert "training 4.5890, held-out 4.7920 (best 4.7920 at step 300)" in said
    assert "1, last after: local rank 1 ended by signal 9" in said
    assert "report " not in said
    assert f"globallocal export {tmp_path / 'run'} --output" in said


def test_a_sample_of_empty_lines_takes_no_page() -> None:
    assert words.without_gaps("a\n\nb" + "\n" * 300 + "c\n \n\n") == "a\n\nb\n⏎ × 300\nc"
