"""OpenAI's penalties and biases in plain Python, as a processor for transformers' `generate`."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

from blip2_serve.types import SamplingParams


class OpenAIPenalties(LogitsProcessor):
    """logit[t] - count[t] * frequency - (count[t] > 0) * presence + bias[t], for every token t.

    `count` is how often the answer has the token; the first `prompt_tokens` ids are the prompt.
    """

    def __init__(self, params: SamplingParams, prompt_tokens: int) -> None:
        self._params = params
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = zip(input_ids.tolist(), scores.tolist(), strict=True)
        changed = [self.changed(row, ids[self._prompt_tokens :]) for ids, row in rows]
        return torch.tensor(changed, dtype=scores.dtype)

    def changed(self, scores: list[float], answer: list[int]) -> list[float]:
        params, biases = self._params, dict(self._params.logit_bias)
        result = []
        for token, score in enumerate(scores):
            count = answer.count(token)
            score -= count * params.frequency_penalty
            score -= (1 if count > 0 else 0) * params.presence_penalty
            result.append(score + biases.get(token, 0.0))
        return result
