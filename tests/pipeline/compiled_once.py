"""`python -m tests.pipeline.compiled_once FOLDER`: a plan of `ranks` in which to compile a block again is an error."""

import sys
from pathlib import Path

import torch

from tests.pipeline import ranks

if __name__ == "__main__":
    torch._dynamo.config.error_on_recompile = True
    ranks.main(Path(sys.argv[1]))
