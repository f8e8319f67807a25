"""The models that are asked, behind one face: `forward(ids)` gives logits and a loss of the model's own."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from model.configuration_globallocal import GlobalLocalConfig
from model.modeling_globallocal import GlobalLocalForCausalLM
from tests.benchmarks.quality.contenders import GPT, GPT_DEFAULTS
from tests.benchmarks.quality.plan import globallocal as form
from tests.benchmarks.quality.plan import gpt
from tests.benchmarks.recall.relatives import GatedDeltaNet, Mamba2, relative
from tests.benchmarks.recall.tasks import VOCAB_SIZE

WIDTH = 64


class Contender(nn.Module):
    """One model, whatever it is."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B, S] → logits [B, S, V], and what the model adds to the loss."""
        if isinstance(self.model, GlobalLocalForCausalLM):
            output = self.model(ids, use_cache=False)
            return output.logits, output.diversity_loss
        if isinstance(self.model, GPT):
            return self.model.model(input_ids=ids).logits, torch.zeros(())
        return self.model(ids), torch.zeros(())

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def globallocal(**settings: Any) -> GlobalLocalForCausalLM:
    """The GlobalLocal of docs/quality.md, as it is compared with the GPT, at this width, with 256 rows in its pool."""
    own = form(WIDTH, 2, [[1, 2], [4, 8]]) | {"pool_size": 256}
    config = GlobalLocalConfig.from_preset("quickstart", vocab_size=VOCAB_SIZE, **(own | settings))
    return GlobalLocalForCausalLM(config)


def llama() -> GPT:
    """The GPT of docs/quality.md, begun as the others are: matrices with 1/√fan_in, the embedding with 0.5/√width."""
    model = GPT(LlamaConfig(vocab_size=VOCAB_SIZE, **GPT_DEFAULTS, **gpt(WIDTH, 4, WIDTH // 2)), "fan_in")
    nn.init.normal_(model.model.model.embed_tokens.weight, std=0.5 * WIDTH**-0.5)
    return model


@dataclass(frozen=True)
class Entry:
    """How a contender is called and drawn, whether it is ours, and its fresh weights from torch's random state."""

    title: str
    colour: str
    marker: str
    ours: bool
    build: Callable[[], Any]


CONTENDERS = {
    "globallocal": Entry("GlobalLocal", "tab:blue", "o-", True, globallocal),
    "average": Entry("GlobalLocal, averaging", "tab:cyan", "o--", True, partial(globallocal, summary_rule="average")),
    "token": Entry("GlobalLocal, no summary", "tab:gray", "o:", True, partial(globallocal, router_context="token")),
    "gpt": Entry("GPT", "tab:orange", "s-", False, llama),
    "deltanet": Entry("Gated DeltaNet", "tab:green", "^-", False, partial(relative, GatedDeltaNet, VOCAB_SIZE, WIDTH)),
    "mamba2": Entry("Mamba-2", "tab:red", "v-", False, partial(relative, Mamba2, VOCAB_SIZE, WIDTH)),
}
