"""The model as one ONNX graph: tokens and the state before them in, logits and the state behind them out.

A prompt is a call with zeros for its state, a cached step a call with one token more; a long prompt may come in pieces.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from model.decoding_globallocal import GlobalLocalCache
from pipeline.checkpoints.fingerprint import probe_ids

if TYPE_CHECKING:
    from model.modeling_globallocal import GlobalLocalForCausalLM

NAME = "model.onnx"
NEEDED = ("onnx", "onnxscript", "onnxruntime")
BOUND = 0.01
"""Of the distance of logits, as a share of the largest; sums rounded otherwise may choose another pool row."""


class Continuation(nn.Module):
    """One call of the model on a sequence that goes on.

    Attributes:
        parts: kind and layer of each tensor of the state.
        begin: that state in front of a sequence: zeros, for one row.
    """

    def __init__(self, model: "GlobalLocalForCausalLM") -> None:
        super().__init__()
        self.model = model.eval()
        with torch.no_grad():
            cache = model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=True).cache
        self._folds = cache.folds  # constants of the graph, not computed by each call
        kinds = {kind: getattr(cache, kind) for kind in ("history", "summary", "recent")}
        kinds["offset"] = [cache.offset]
        held = {(kind, layer): x for kind, states in kinds.items() for layer, x in enumerate(states) if x is not None}
        self.parts = list(held)
        self.begin = [torch.zeros_like(tensor) for tensor in held.values()]

    def forward(self, input_ids: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """input_ids int64 [B, S], the tensors of `parts` for B rows → logits [B, S, V], and those tensors behind."""
        cache = GlobalLocalCache(len(self.model.model.layers))
        cache.folds = self._folds
        for (kind, layer), tensor in zip(self.parts, state, strict=True):
            if kind == "offset":
                cache.offset = tensor
            else:
                getattr(cache, kind)[layer] = tensor
        hidden = self.model.model(input_ids, cache=cache, use_cache=True).last_hidden_state
        behind = (cache.offset if kind == "offset" else getattr(cache, kind)[layer] for kind, layer in self.parts)
        return self.model.lm_head(hidden), *behind


def check_installed() -> None:
    """Raises UserError where a package is missing: before an export is written."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(f"--onnx: {', '.join(missing)} not found; install them: pip install 'globallocal[onnx]'")


def write_onnx(model: "GlobalLocalForCausalLM", path: Path) -> None:
    """Weights beyond 1.5 GB lie in a file of their own beside `path`.

    Raises:
        UserError: what onnxruntime computes with the file is not what the model computes.
    """
    step = Continuation(model)
    names = [f"{kind}_{layer}" for kind, layer in step.parts]
    shapes = ({0: "batch", 1: "tokens"}, [{0: "batch"}] * len(names))
    sample = (torch.arange(14).reshape(2, 7) % model.config.vocab_size, [torch.cat([x, x]) for x in step.begin])
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            step,
            sample,
            dynamic_shapes=shapes,
            input_names=["input_ids", *names],
            output_names=["logits", *(f"next_{name}" for name in names)],
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # where in whose files it came from: as large as a small model
        program.save(path)
    distance = distance_from(model, path)
    if not distance <= BOUND:
        raise UserError(
            f"{path}: logits of onnxruntime differ from the model's by {distance:.2g} of the largest, the bound is "
            f"{BOUND:g}; leave out --onnx"
        )


@torch.no_grad()
def distance_from(model: "GlobalLocalForCausalLM", path: Path) -> float:
    """The largest distance of logits over the largest logit: two rows, half as a prompt, the rest token by token."""
    import onnxruntime

    ids = probe_ids(model.config.vocab_size)
    ids = torch.cat([ids, ids.flip(1)])
    expected = model(input_ids=ids).logits
    session = onnxruntime.InferenceSession(path)
    first, *parts = session.get_inputs()
    kinds = {"tensor(float)": torch.float32, "tensor(int64)": torch.int64}
    state = {part.name: torch.zeros(len(ids), *part.shape[1:], dtype=kinds[part.type]).numpy() for part in parts}
    half = ids.shape[1] // 2
    found = []
    for piece in (ids[:, :half], *ids[:, half:].split(1, dim=1)):
        logits, *tensors = session.run(None, {first.name: piece.numpy(), **state})
        state = dict(zip(state, tensors, strict=True))
        found.append(torch.from_numpy(logits))
    return float((torch.cat(found, dim=1) - expected).abs().max() / expected.abs().max())


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the translator says of itself: packages that it would know too, forms of its own that are to go."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
