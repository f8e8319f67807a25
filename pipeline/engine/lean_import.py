"""Imports DeepSpeed without MLflow, which its autotuner brings along: a third of what a rank imports at its start.

DeepSpeed takes MLflow as optional there, and nothing in this project uses the autotuner. Whoever wants MLflow later
imports it as usual. This must be imported before anything else imports DeepSpeed.
"""

import sys

if "mlflow" not in sys.modules and "deepspeed" not in sys.modules:
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # Python's way to say: cannot be imported
    try:
        import deepspeed  # noqa: F401
    finally:
        del sys.modules["mlflow"]
