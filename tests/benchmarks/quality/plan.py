"""Which runs make up the comparison. A later stage takes what an earlier one found best."""

from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from tests.benchmarks.quality.contenders import Contender
from tests.benchmarks.quality.training import Run

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Size:
    """One size of both models, matched in FLOPs per token, and what they are trained on."""

    name: str
    globallocal: dict[str, Any]
    gpt: dict[str, Any]
    sequence_length: int
    batch_size: int
    steps: int
    learning_rates: tuple[float, ...] = ()  # of its own sweep; without one, a shorter training's best and half of it
    bases: tuple[int | None, ...] = (None,)  # of `optimizer.base_hidden_size`, at each of these rates
    on_gpu: bool = False

    def run(
        self, label: str, contender: Contender, learning_rate: float, seed: int = 0, base: int | None = None
    ) -> Run:
        """`base`: of `optimizer.base_hidden_size`."""
        based = f"-base{base}" if base else ""
        name = f"{self.name}-{label}{based}-lr{learning_rate:g}-seed{seed}-steps{self.steps}"
        return Run(name, contender, self.sequence_length, self.batch_size, self.steps, learning_rate, seed, base)

    def like(self, run: Run, learning_rate: float, seed: int = 0) -> Run:
        """What another size's run trains, and how, for as long as this size trains."""
        label = label_of(run).partition("-base")[0]
        return self.run(label, run.contender, learning_rate, seed, run.base_hidden_size)

    @property
    def contenders(self) -> dict[str, Contender]:
        """The GPT has two initialisations, and the better one counts; on a GPU, the one of deviation 0.02 alone."""
        contenders = {
            "globallocal": Contender("globallocal", self.globallocal),
            "gpt": Contender("gpt", self.gpt),
            "gpt-embedding": Contender("gpt", self.gpt, "embedding"),
        }
        return {label: c for label, c in contenders.items() if not (self.on_gpu and c.variant)}


def globallocal(hidden_size: int, num_layers: int, dilations: list[list[int]]) -> dict[str, Any]:
    """The preset `quickstart` at another width and depth, with what docs/quality.md has measured to be better here."""
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "pool_size": 1024,
        "pool_dim": hidden_size // 4,
        "router_hidden_size": hidden_size // 4,
        "conv_dilations": dilations,
        "router_context": "summary",
        "summary_heads": 4,
        "summary_rule": "delta",
        "head_bias": False,
        "block_router": False,
        "branch_gain": 2.0,
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


_WIDENING = [[1, 2], [4, 8], [16, 64], [128, 512]]  # the presets' schedule

_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)

SIZES: dict[str, Size] = {
    "A": Size("A", globallocal(128, 2, [[1, 2], [4, 8]]), gpt(128, 4, 32), 256, 2, 300, _RATES[1:], (None, 64, 32)),
    "B": Size("B", globallocal(192, 3, [[1, 2], [4, 8]]), gpt(192, 6, 48), 256, 2, 200, _RATES[:5], (None, 64, 32)),
    # All the training text once; blocks of the preset `small`.
    "C": Size(
        "C",
        globallocal(512, 4, _WIDENING) | {"pool_size": 4096, "pool_dim": 256, "summary_heads": 8}
        | {"summary_rule": "average", "head_bias": True, "block_router": True, "branch_gain": 1.0},
        gpt(512, 7, 64), 1024, 16, 680, (5e-4, 1e-3, 2e-3), on_gpu=True,
    ),
}  # fmt: skip
for times in (4, 16):
    SIZES[f"A{times}"] = replace(SIZES["A"], name=f"A{times}", steps=times * SIZES["A"].steps, learning_rates=())
SIZES["C4"] = replace(SIZES["C"], name="C4", steps=4 * SIZES["C"].steps, learning_rates=())

# What is changed of a size's GlobalLocal, one thing a row.
ABLATIONS: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "A": {
        "a running average in place of the delta rule, a bias in the head": (
            {"summary_rule": "average", "head_bias": True}, ""
        ),
        "a bias in the head": ({"head_bias": True}, ""),
        "a router in front of the feed-forward as well": ({"block_router": True}, ""),
        "branches not doubled": ({"branch_gain": 1.0}, ""),
        "keys and queries for each head, half as wide": ({"summary_key_heads": 4, "summary_key_size": 32}, ""),
        "no running summary: the router reads its token alone": ({"router_context": "token"}, ""),
        "seed layout: norm behind, dilations 1, 2, 4, no summary": (
            {"norm_placement": "post", "conv_dilations": [1, 2, 4], "router_context": "token"}, ""
        ),
        "nothing to mix: a pool of zeros": ({}, "zero"),
        "pool trained": ({}, "trained"),
        "norm behind each sum": ({"norm_placement": "post"}, ""),
        "dilations 1, 2, 4 and 8, 16, 32": ({"conv_dilations": [[1, 2, 4], [8, 16, 32]]}, ""),
        "dilations 1, 2 in both layers": ({"conv_dilations": [1, 2]}, ""),
        "pool rows as wide as the model, routers half as wide": ({"pool_dim": 128, "router_hidden_size": 64}, ""),
        "pool of 256 rows": ({"pool_size": 256}, ""),
        "pool of 4,096 rows": ({"pool_size": 4096}, ""),
        "one row per token instead of two": ({"router_top_k": 1}, ""),
        "embedding begun with deviation 0.02": ({"initializer_range": 0.02}, ""),
        "bfloat16 for the passes": ({}, "bfloat16"),
    },
    "C": {
        "no running summary: the router reads its token alone": ({"router_context": "token"}, ""),
        "nothing to mix: a pool of zeros": ({}, "zero"),
        "dilations 1, 2 in every layer": ({"conv_dilations": [1, 2]}, ""),
        "norm behind each sum": ({"norm_placement": "post"}, ""),
        "one row per token instead of two": ({"router_top_k": 1}, ""),
    },
}  # fmt: skip


def sweep(size: Size) -> dict[str, list[Run]]:
    """Every contender at every learning rate of the size, its matrices at the same and at a share of it."""
    found = [
        [size.run(label, contender, rate, base=base) for rate in size.learning_rates]
        for label, contender in size.contenders.items()
        for base in size.bases
    ]
    return {label_of(runs[0]): runs for runs in found if runs}


def best(runs: list[Run]) -> Run | None:
    """The finished run with the least held-out loss."""
    finished = [(result["valid"]["loss"], run.name, run) for run in runs if (result := run.result())]
    return min(finished)[2] if finished else None


def swept(size: Size) -> Size:
    """The size whose sweep says at which rates this one learns: itself, C for the others on a GPU, or A."""
    return size if size.learning_rates else SIZES["C" if size.on_gpu else "A"]


def candidates(size: Size) -> dict[str, list[Run]]:
    """The runs of GlobalLocal and of the GPT among which a learning rate is chosen.

    Those of the sweep; without one, at the best rate of the size that has one, and at half of it: a longer training may
    want less.
    """
    runs = [run for of_label in sweep(swept(size)).values() for run in of_label]
    found = {kind: [run for run in runs if run.contender.kind == kind] for kind in ("globallocal", "gpt")}
    if size.learning_rates:
        return found
    shorter = {name: run for name, of_name in found.items() if (run := best(of_name)) is not None}
    return {
        name: [size.like(run, rate) for rate in (run.learning_rate, run.learning_rate / 2)]
        for name, run in shorter.items()
    }


def label_of(run: Run) -> str:
    """The contender's, from the run's name."""
    return run.name.partition("-")[2].partition("-lr")[0]


def chosen(size: Size) -> dict[str, Run]:
    """The best run of GlobalLocal and of the GPT, as far as the candidates have come.

    It is the one with the least mean over the seeds that have finished at its rate: a rate at which only the first
    learned well is not the best.
    """
    found = {}
    for name, runs in candidates(size).items():
        means = [(fmean(losses), run.name, run) for run in runs if run.result() and (losses := _by_seed(size, run))]
        if means:
            found[name] = min(means)[2]
    return found


def _by_seed(size: Size, run: Run) -> list[float]:
    results = [size.like(run, run.learning_rate, seed).result() for seed in SEEDS]
    return [result["valid"]["loss"] for result in results if result]


def finals(size: Size) -> dict[str, list[Run]]:
    """Each contender at its best learning rate, one run a seed."""
    return {name: [size.like(run, run.learning_rate, seed) for seed in SEEDS] for name, run in chosen(size).items()}


def ablations(size: Size) -> dict[str, Run]:
    """GlobalLocal at its best learning rate, with one thing changed."""
    if "globallocal" not in chosen(size):
        return {}
    default = chosen(size)["globallocal"]
    rate, base = default.learning_rate, default.base_hidden_size
    return {
        title: size.run(
            f"ablation{number}", Contender("globallocal", size.globallocal | settings, variant), rate, base=base
        )
        for number, (title, (settings, variant)) in enumerate(ABLATIONS.get(size.name, {}).items())
    }


WIDTHS = (64, 128, 256, 512)
BASES = (None, 32)  # of `optimizer.base_hidden_size`
WIDTH_RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)


def widths(base: int | None) -> dict[int, list[Run]]:
    """Width → size A's GlobalLocal at that width, at every rate, with `base` as its `optimizer.base_hidden_size`."""
    size = SIZES["A"]
    runs = {}
    for width in WIDTHS:
        own = width == size.globallocal["hidden_size"]
        label = "globallocal" if own else f"width{width}"
        contender = Contender("globallocal", globallocal(width, 2, [[1, 2], [4, 8]]))
        runs[width] = [size.run(label, contender, rate, base=base) for rate in WIDTH_RATES]
    return runs
