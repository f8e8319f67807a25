"""Every ZeRO stage on 1, 2 and 4 ranks goes on as every other of them; then the run must be as if unbroken."""

from pathlib import Path

from tests.pipeline import test_reshard as proofs
from tests.pipeline.reshard_ranks import ALL_STEPS, FIRST_STEPS, run_pairs
from tests.torture.kills import prepare

SHAPES = [f"z{stage}r{ranks}" for stage in (0, 1, 2, 3) for ranks in (1, 2, 4)]


def run(folder: Path) -> dict[str, object]:
    pairs = [(source, target) for source in SHAPES for target in SHAPES if source != target]
    run_pairs(pairs, folder, prepare(folder))
    worst = {"loss": 0.0, "gradient_norm": 0.0}
    for pair in pairs:
        proofs.test_losses_and_gradients_go_on_as_if_unbroken(folder, pair)
        proofs.test_the_same_samples_rates_and_decays_for_ten_steps(folder, pair)
        proofs.test_weights_moments_steps_and_buffers_are_bitwise_those_saved(folder, pair)
        unbroken, resumed = proofs.results(folder, pair)
        for name in worst:
            apart = [abs(one - other) / one for one, other in zip(unbroken[name], resumed[name], strict=True)]
            worst[name] = max(worst[name], *apart)
    return {
        "pairs of (stage, ranks)": len(pairs),
        "weights, moments, update counts, buffers after the resume": "bitwise those that were saved",
        "global batches, learning rates, decays": "those of the unbroken run",
        f"loss of the {ALL_STEPS - FIRST_STEPS} steps after it, largest relative difference": f"{worst['loss']:.1e}",
        "norm of the gradient, largest relative difference": f"{worst['gradient_norm']:.1e}",
    }
