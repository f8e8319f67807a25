"""How the next token is chosen, by transformers' logits processors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList


@dataclass(frozen=True)
class Sampling:
    """What a person may ask of a text; the defaults are those of every command.

    Attributes:
        max_new_tokens: tokens added to the prompt at most.
        temperature: divides the scores; 0 always takes the likeliest token.
        top_k: only so many likeliest tokens are drawn from; 0 stands for all.
        top_p: only the likeliest tokens that together have this probability are drawn from.
        repetition_penalty: above 1, tokens that the prompt or the text holds already become less likely.
        seed: of the sequence's own random numbers.
        stop: the text ends in front of the first of these strings.
    """

    max_new_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: list[str] = field(default_factory=list)

    def processors(self) -> LogitsProcessorList:
        """What `generate` of transformers would do to the scores, in its order."""
        from transformers import generation as hf

        found = hf.LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            found.append(hf.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature == 0.0:
            return found
        if self.temperature != 1.0:
            found.append(hf.TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            found.append(hf.TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            found.append(hf.TopPLogitsWarper(self.top_p))
        return found

    def generation_config(self, **special_ids: Any) -> GenerationConfig:
        """The same for `generate` of transformers, with the model's `eos_token_id` and its like."""
        from transformers import GenerationConfig

        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.temperature > 0.0,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            **special_ids,
        )


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """An empty prompt begins as a document does, behind the token that ends the one before."""
    return tokenizer(prompt, add_special_tokens=False).input_ids or [tokenizer.eos_token_id]
