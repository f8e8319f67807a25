"""Imports DeepSpeed without what no run of this project uses: over a third of what a rank imports at its start.

- MLflow, which its autotuner brings along, and takes as optional. Whoever wants MLflow later imports it as usual.
- The compiling of a function of its Muon, which `deepspeed.initialize` imports to ask whether the optimizer is one.
  (transformers imports torch's compiler all the same.)

This must be imported before anything else imports DeepSpeed.
"""

import importlib
import os
import sys

if "mlflow" not in sys.modules and "deepspeed" not in sys.modules:
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # Python's way to say: cannot be imported
    try:
        import deepspeed  # noqa: F401
    finally:
        del sys.modules["mlflow"]

before = os.environ.get("TORCHDYNAMO_DISABLE")
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # `torch.compile` returns functions as they are
try:
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
finally:
    del os.environ["TORCHDYNAMO_DISABLE"]
    if before is not None:
        os.environ["TORCHDYNAMO_DISABLE"] = before
