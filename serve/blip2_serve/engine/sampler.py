"""Logits to next tokens.

Every answer is a function of its own logits, parameters and position: greedy takes the largest
logit, sampling draws one number from a generator keyed by (seed, position). So the answer does not
depend on what else is in the batch, nor on which replica computes it. Order and meaning of the
steps are transformers': repetition penalty, minimum length, temperature, top-k, top-p.
"""

from __future__ import annotations

import hashlib
import struct

import torch
from torch import Tensor

from blip2_serve.engine.sequence import Sequence


class Sampler:
    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self._eos = list(eos_token_ids)

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: list[Sequence]) -> list[int]:
        """float32 logits [n, vocabulary] (changed in place) -> one token id per sequence."""
        for row, sequence in zip(logits, sequences, strict=True):
            self._penalise(row, sequence)
        tokens: list[int] = logits.argmax(-1).tolist()
        for i, sequence in enumerate(sequences):
            if sequence.params.temperature > 0:
                tokens[i] = _draw(logits[i], sequence)
        return tokens

    def _penalise(self, row: Tensor, sequence: Sequence) -> None:
        params = sequence.params
        if params.repetition_penalty != 1:
            # Prompt and image tokens count, as in transformers.
            seen = torch.tensor(sorted({*sequence.prompt, *sequence.output}), device=row.device)
            scores = row[seen]
            penalty = params.repetition_penalty
            row[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
        if len(sequence.output) < params.min_tokens:
            row[self._eos] = -torch.inf


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments (both 64-bit)."""
    key = struct.pack("<qq", seed, position)
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _draw(row: Tensor, sequence: Sequence) -> int:
    """One token by inverting the cumulative distribution at a keyed uniform number."""
    params = sequence.params
    # Less the largest, or a tiny temperature would make them infinite.
    scores = row.double().cpu()
    scores = (scores - scores.max()) / params.temperature
    if 0 < params.top_k < len(scores):
        smallest_kept = scores.topk(params.top_k).values[-1]
        scores[scores < smallest_kept] = -torch.inf
    if params.top_p < 1:
        ordered, order = scores.sort(descending=True)
        probabilities = ordered.softmax(-1)
        # Kept: every token before which less than top_p is gathered; so at least the likeliest.
        dropped = probabilities.cumsum(-1) - probabilities >= params.top_p
        dropped[0] = False
        scores[order[dropped]] = -torch.inf
    cumulative = scores.softmax(-1).cumsum(-1)
    wanted = uniform(params.seed, len(sequence.output)) * cumulative[-1]
    token = int(torch.searchsorted(cumulative, wanted, right=True))
    # Rounding may put the last step's end a hair below `wanted`: then the last possible token.
    return token if token < len(scores) else int(scores.isfinite().nonzero()[-1])
