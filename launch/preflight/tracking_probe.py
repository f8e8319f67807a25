"""Write to an MLflow store what a run would write, and take it away again.

`python -m launch.preflight.tracking_probe URI EXPERIMENT ID`, one of the latter two empty: a program of its own, so
that a store that never answers costs a bounded time.
"""

import sys


def main(uri: str, experiment_name: str, experiment_id: str) -> int:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    if experiment_id:
        client.get_experiment(experiment_id)
    else:
        experiment = client.get_experiment_by_name(experiment_name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(experiment_name)
    run = client.create_run(experiment_id, run_name="doctor", tags={"globallocal.doctor": "1"})
    client.log_metric(run.info.run_id, "doctor", 1.0)
    client.set_terminated(run.info.run_id)
    client.delete_run(run.info.run_id)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except Exception as error:
        text = str(error).strip().splitlines()
        print(f"{type(error).__name__}: {text[0] if text else ''}", file=sys.stderr)
        sys.exit(1)
