"""A decoding step as a CUDA graph, captured once and replayed from then on."""

import logging
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .decoding_globallocal import GlobalLocalCache, step

if TYPE_CHECKING:
    from .modeling_globallocal import GlobalLocalForCausalLM

logger = logging.getLogger(__name__)


def captured(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], Any], Tensor]:
    """`run` as a CUDA graph: what replays it, and the tensor that then holds its result."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries choose and allocate what they need
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads, NCCL's or a data loader's, may go on calling CUDA.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            result = run()
    return graph.replay, result


# By kind of device: how a step becomes one that is replayed. Elsewhere it runs as it is.
CAPTURES = {"cuda": captured}


class StepGraphs:
    """A model's steps as CUDA graphs, one for each power of two of rows."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """The weights are about to change, or have moved."""
        self._graphs: dict[int, _StepGraph] = {}
        self._parameters: list[tuple[Any, ...]] = []  # where the weights lie that the graphs read
        self._failed = False

    def __reduce__(self) -> tuple[type["StepGraphs"], tuple[()]]:
        return StepGraphs, ()  # a copy of a model, or a pickled one, captures its own

    def run(self, model: "GlobalLocalForCausalLM", ids: Tensor, cache: GlobalLocalCache) -> Tensor:
        """`step`, by replaying it; as it is where nothing can be captured, or capturing has failed."""
        if self._failed or ids.device.type not in CAPTURES:
            return step(model, ids, cache)
        rows = 1 << (len(ids) - 1).bit_length()
        graph = self._graphs.get(rows)
        if graph is None or graph.holder() is not cache:
            graph = self._graph(model, rows, cache)
        return step(model, ids, cache) if graph is None else graph.run(ids, cache)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _graph(self, model: "GlobalLocalForCausalLM", rows: int, cache: GlobalLocalCache) -> "_StepGraph | None":
        """A graph of the weights where they lie now."""
        parameters = [(t.data_ptr(), t.dtype, t.shape) for t in chain(model.parameters(), model.buffers())]
        if parameters != self._parameters:
            self.clear()
            self._parameters = parameters
        if rows not in self._graphs:
            try:
                self._graphs[rows] = _StepGraph(model, rows, cache)
            except RuntimeError as error:
                self._failed = True
                logger.warning("decoding goes on without a CUDA graph: %s", str(error).partition("\n")[0])
        return self._graphs.get(rows)


class _StepGraph:
    """One captured step. It reads and writes tensors of its own, which are lent to one cache at a time."""

    def __init__(self, model: "GlobalLocalForCausalLM", rows: int, cache: GlobalLocalCache) -> None:
        own = GlobalLocalCache(len(cache.history))
        for target, source in ((own.history, cache.history), (own.summary, cache.summary), (own.recent, cache.recent)):
            target[:] = [s if s is None else s.new_zeros(rows, *s.shape[1:]) for s in source]
        own.offset = None if cache.offset is None else cache.offset.new_zeros(rows, 1)
        own.position = torch.zeros_like(cache.position)  # type: ignore[arg-type]
        own.weights = _map(torch.clone, cache.weights)
        self.own = own
        self.holder: Callable[[], GlobalLocalCache | None] = lambda: None
        self._lent: list[Tensor | None] = []
        self.ids = torch.zeros(rows, dtype=torch.int64, device=own.position.device)
        capture = CAPTURES[own.position.device.type]
        self._replay, self._logits = capture(partial(step, model, self.ids, own), own.position.device)

    def run(self, ids: Tensor, cache: GlobalLocalCache) -> Tensor:
        """ids [B] → logits [B, 1, V], a tensor of its own."""
        self._lend(cache)
        self.ids[: len(ids)].copy_(ids)
        self._replay()
        return self._logits[: len(ids)].clone()

    def _lend(self, cache: GlobalLocalCache) -> None:
        """The cache's tensors become rows of the graph's own; a cache that had these before gets copies."""
        holder = self.holder()
        if holder is not cache:
            if holder is not None:
                self._take_back(holder)
            self.holder, self._lent = weakref.ref(cache), []
            for own, new in zip(_tensors(self.own.weights), _tensors(cache.weights), strict=True):
                own.copy_(new)
        states = _states(cache)
        if self._lent and all(a is b for a, b in zip(states, self._lent, strict=True)):
            return
        rows = next(len(s) for s in cache.history if s is not None)
        lent = [s if s is None or s.dim() == 1 else s[:rows] for s in _states(self.own)]
        for target, source, before in zip(lent, states, self._lent or [None] * len(lent), strict=True):
            if target is not None and source is not None and source is not before:
                target.copy_(source)
        self._lent = lent
        _put(cache, lent)

    def _take_back(self, holder: GlobalLocalCache) -> None:
        lent = {id(tensor) for tensor in self._lent}
        _put(holder, [s if s is None or id(s) not in lent else s.clone() for s in _states(holder)])


def _states(cache: GlobalLocalCache) -> list[Tensor | None]:
    return [cache.position, cache.offset, *cache.history, *cache.summary, *cache.recent]


def _put(cache: GlobalLocalCache, states: list[Tensor | None]) -> None:
    (cache.position, cache.offset, *states), layers = states, len(cache.history)
    cache.history[:], cache.summary[:], cache.recent[:] = (states[i * layers :][:layers] for i in range(3))


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of nested tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif value is not None:
        for part in value:
            yield from _tensors(part)


def _map(function: Any, value: Any) -> Any:
    """The same nested tuples and lists, of what `function` makes of their tensors."""
    if value is None or isinstance(value, Tensor):
        return value if value is None else function(value)
    parts = [_map(function, part) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
