"""Texts that the model continues."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipeline.generation.sampling import Sampling, prompt_ids


@torch.no_grad()
def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    device: torch.device,
    seed: int,
    before_text: Callable[[], None] = lambda: None,
) -> list[str]:
    """Sampled continuations, each with its prompt in front. The caller's random state is left as it was.

    Every rank must call it: under ZeRO-3 each forward is a collective, and the same seed keeps ranks in step.

    Args:
        before_text: called before each; what it raises ends the work.
    """
    training = model.training
    model.eval()
    texts = []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for prompt in prompts:
            before_text()
            ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=device)
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=Sampling.temperature,
                top_k=Sampling.top_k,
            )
            texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    model.train(training)
    return texts
