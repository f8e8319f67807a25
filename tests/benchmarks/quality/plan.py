"""Which runs make up the comparison. A later stage takes what an earlier one found best."""

from dataclasses import dataclass, replace
from typing import Any

from tests.benchmarks.quality.contenders import Contender
from tests.benchmarks.quality.training import Run

LEARNING_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
SEEDS = (0, 1)


@dataclass(frozen=True)
class Size:
    """One size of both models, matched in FLOPs a token, and what they are trained on."""

    name: str
    globallocal: dict[str, Any]
    gpt: dict[str, Any]
    sequence_length: int
    batch_size: int
    steps: int

    def run(self, label: str, contender: Contender, learning_rate: float, seed: int = 0) -> Run:
        name = f"{self.name}-{label}-lr{learning_rate:g}-seed{seed}-steps{self.steps}"
        return Run(name, contender, self.sequence_length, self.batch_size, self.steps, learning_rate, seed)

    @property
    def contenders(self) -> dict[str, Contender]:
        """The GPT has two initialisations, and the better one counts."""
        return {
            "globallocal": Contender("globallocal", self.globallocal),
            "gpt": Contender("gpt", self.gpt),
            "gpt-fan-in": Contender("gpt", self.gpt, "fan_in"),
        }


def globallocal(hidden_size: int, num_layers: int, dilations: list[list[int]]) -> dict[str, Any]:
    """The presets' proportions at another width."""
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "pool_size": 1024,
        "pool_dim": hidden_size,
        "router_hidden_size": hidden_size // 2,
        "conv_dilations": dilations,
        "router_context": "summary",
    }


def gpt(hidden_size: int, num_layers: int, head_dim: int) -> dict[str, Any]:
    """SwiGLU of 8/3 · h, rounded to a multiple of 8."""
    heads = hidden_size // head_dim
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "intermediate_size": round(hidden_size / 3) * 8,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }


SIZES = {
    "A": Size("A", globallocal(128, 2, [[1, 2], [4, 8]]), gpt(128, 4, 32), 256, 2, 300),
    "B": Size("B", globallocal(192, 3, [[1, 2], [4, 8]]), gpt(192, 6, 48), 256, 2, 200),
}
SIZES["A4"] = replace(SIZES["A"], name="A4", steps=4 * SIZES["A"].steps)

# What is changed of size A's GlobalLocal, one thing a row.
ABLATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no running summary: the router reads its token alone": ({"router_context": "token"}, ""),
    "seed layout: norm behind, dilations 1, 2, 4": ({"norm_placement": "post", "conv_dilations": [1, 2, 4]}, ""),
    "nothing to mix: a pool of zeros": ({}, "zero"),
    "pool trained": ({}, "trained"),
    "norm behind each sum": ({"norm_placement": "post"}, ""),
    "dilations 1, 2, 4 and 8, 16, 32": ({"conv_dilations": [[1, 2, 4], [8, 16, 32]]}, ""),
    "dilations 1, 2 in both layers": ({"conv_dilations": [1, 2]}, ""),
    "pool of 256 rows": ({"pool_size": 256}, ""),
    "pool of 4,096 rows": ({"pool_size": 4096}, ""),
    "one row a token instead of two": ({"router_top_k": 1}, ""),
}


def sweep(size: Size) -> dict[str, list[Run]]:
    """Every contender at every learning rate."""
    return {
        label: [size.run(label, contender, rate) for rate in LEARNING_RATES]
        for label, contender in size.contenders.items()
    }


def best(runs: list[Run]) -> Run | None:
    """The finished run with the least held-out loss."""
    finished = [(result["valid"]["loss"], run.name, run) for run in runs if (result := run.result())]
    return min(finished)[2] if finished else None


def chosen() -> dict[str, Run]:
    """Size A's best run of GlobalLocal and of the GPT, as far as the sweep has come."""
    runs = sweep(SIZES["A"])
    found = {"globallocal": best(runs["globallocal"]), "gpt": best(runs["gpt"] + runs["gpt-fan-in"])}
    return {name: run for name, run in found.items() if run is not None}


def finals(size: Size) -> dict[str, list[Run]]:
    """Each contender at size A's best learning rate, one run a seed."""
    result = {}
    for name, run in chosen().items():
        label = "gpt-fan-in" if run.contender.variant else name
        first = size.run(label, size.contenders[label], run.learning_rate)
        result[name] = [
            replace(first, seed=seed, name=first.name.replace("-seed0-", f"-seed{seed}-")) for seed in SEEDS
        ]
    return result


def ablations() -> dict[str, Run]:
    """Size A's GlobalLocal at its best learning rate, with one thing changed."""
    if "globallocal" not in chosen():
        return {}
    size, rate = SIZES["A"], chosen()["globallocal"].learning_rate
    return {
        title: size.run(f"ablation{number}", Contender("globallocal", size.globallocal | settings, variant), rate)
        for number, (title, (settings, variant)) in enumerate(ABLATIONS.items())
    }
