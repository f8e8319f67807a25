"""The end of a job: its report, MLflow's copy of it, what a person reads."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from launch.jobs import closing
from launch.jobs.closing import close
from pipeline.config import RunConfig, load_config
from pipeline.tracking.opening import settle_run
from tests.launch.run_folder import write_run
from tests.pipeline.tracking_fixtures import only_run, start, store

__all__ = ["store"]


def job(folder: Path, uri: str) -> RunConfig:
    """The settings of a run whose folder holds a record, and whose MLflow run is open."""
    write_run(folder, killed_at=110)
    start(uri, folder, [], step=300)._finish(20)  # as a process that was killed leaves it
    given = [f"run.output_dir={folder}", f"tracking.uri={uri}", "tracking.experiment=tests"]
    return load_config("quickstart", given)


@pytest.mark.parametrize(("code", "status"), [(1, "FAILED"), (75, "KILLED")])
def test_the_report_is_written_and_mlflow_has_it(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, status: str
) -> None:
    settings = job(tmp_path / "run", store)
    close(settings, code)
    report = tmp_path / "run" / "report.html"
    run = only_run(store)
    assert run.info.status == status
    assert Path(MlflowClient(store).download_artifacts(run.info.run_id, "report.html", str(tmp_path))).read_bytes() == (
        report.read_bytes()
    )
    said = capsys.readouterr().out
    assert f"\nreport      {report}\n" in said
    assert f"/runs/{run.info.run_id}?" in said
    close(settings, code)
    assert len(MlflowClient(store).list_artifacts(run.info.run_id)) == len({"environment", "report.html"})


def test_a_store_that_is_away_gets_the_report_at_the_next_chance(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = job(tmp_path / "run", store)
    database = Path(store.removeprefix("sqlite:///"))
    away = database.rename(tmp_path / "away")
    database.mkdir()
    monkeypatch.setattr(closing, "SECONDS", 1.0)
    close(settings, 0)
    database.rmdir()
    away.rename(database)
    assert settle_run(settings.tracking, tmp_path / "run")
    run = only_run(store)
    assert "report.html" in [item.path for item in MlflowClient(store).list_artifacts(run.info.run_id)]


def test_a_job_that_was_refused_ends_with_its_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    close(load_config("quickstart", [f"run.output_dir={folder}", "tracking.enabled=false"]), 2)
    assert capsys.readouterr().out == ""
    assert not (folder / "report.html").exists()


def test_a_full_disk_costs_the_report_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    (folder / ".report.html.partial").mkdir()
    close(load_config("quickstart", [f"run.output_dir={folder}", "tracking.enabled=false"]), 0)
    said = capsys.readouterr().out
    assert "the report is not written" in said
    assert "made  " in said
