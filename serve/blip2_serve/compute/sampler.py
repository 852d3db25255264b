"""Chooses next tokens from logits.

A token depends only on its own logits, the request's parameters and the position: greedy takes the
largest logit, and sampling uses a random number keyed by (seed, sample, position). Neither the rest
of the batch nor the replica matters. The steps and their order are those of transformers:
repetition penalty, minimum length, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from blip2_serve.engine.beam import Candidate
from blip2_serve.engine.sequence import Sequence
from blip2_serve.types import TokenLogprob


@dataclass(frozen=True)
class Choice:
    """The next token of a sequence, with its log-probability if the request wants it."""

    token: int
    logprob: TokenLogprob | None = None


class Sampler:
    """Chooses tokens for a model whose answers end with one of `eos_token_ids`."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self._eos = list(eos_token_ids)

    @torch.inference_mode()
    def choose(self, logits: Tensor, rows: list[int], sequences: list[Sequence]) -> list[Choice]:
        """Chooses the next token of each sequence.

        Args:
            logits: float32 [n, vocabulary].
            rows: The row of `logits` for each sequence. Samples of one request share a row until
                they have tokens of their own.
            sequences: As many as `rows`.
        """
        raw = logits if rows == list(range(len(logits))) else logits[rows]
        scores = raw.clone() if any(_changes_scores(s) for s in sequences) else raw
        for row, sequence in zip(scores, sequences, strict=True):
            self._penalise(row, sequence)
        tokens: list[int] = scores.argmax(-1).tolist()
        for i, sequence in enumerate(sequences):
            if sequence.request.params.temperature > 0:
                tokens[i] = _draw(scores[i], sequence)
        return [
            Choice(token, _logprob(row.log_softmax(-1), token, top))
            if (top := sequence.request.params.top_logprobs) is not None
            else Choice(token)
            for row, token, sequence in zip(raw, tokens, sequences, strict=True)
        ]

    @torch.inference_mode()
    def expand(
        self, logits: Tensor, rows: list[int], beams: list[Sequence], count: int
    ) -> list[Candidate]:
        """Returns the `count` best continuations of one request's beams, best first.

        As in transformers, penalties apply to log-probabilities here, not to logits.

        Args:
            logits: float32 [n, vocabulary].
            rows: The row of `logits` for each beam.
            beams: As many as `rows`.
            count: At most len(beams) * vocabulary.
        """
        raw = logits[rows].log_softmax(-1)
        scores = raw.clone() if _changes_scores(beams[0]) else raw
        for row, beam in zip(scores, beams, strict=True):
            self._penalise(row, beam)
        sums = scores + torch.tensor([b.score for b in beams], device=scores.device)[:, None]
        best = sums.flatten().topk(count)
        top = beams[0].request.params.top_logprobs
        candidates = []
        for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            beam, token = divmod(index, logits.shape[1])
            logprob = None if top is None else _logprob(raw[beam], token, top)
            candidates.append(Candidate(beams[beam], token, score, logprob))
        return candidates

    def _penalise(self, row: Tensor, sequence: Sequence) -> None:
        params = sequence.request.params
        if params.repetition_penalty != 1:
            # As in transformers, the tokens of the prompt and the image count too.
            seen = sorted({*sequence.request.prompt, *sequence.output})
            where = torch.tensor(seen, device=row.device)
            scores = row[where]
            penalty = params.repetition_penalty
            row[where] = torch.where(scores < 0, scores * penalty, scores / penalty)
        if len(sequence.output) < params.min_tokens:
            row[self._eos] = -torch.inf


def uniform(seed: int, position: int, sample: int = 0) -> float:
    """Returns a pseudo-random number in [0, 1), a hash of the arguments (64-bit integers)."""
    key = struct.pack("<qqq", seed, position, sample)
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _changes_scores(sequence: Sequence) -> bool:
    params = sequence.request.params
    return params.repetition_penalty != 1 or len(sequence.output) < params.min_tokens


def _logprob(row: Tensor, token: int, top: int) -> TokenLogprob:
    """Reads a token's log-probability, and the `top` largest, from `row` [vocabulary]."""
    likeliest = row.topk(top)
    others = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return TokenLogprob(token, row[token].item(), top=tuple(TokenLogprob(*o) for o in others))


def _draw(row: Tensor, sequence: Sequence) -> int:
    """Samples a token: inverts the cumulative distribution at the position's random number."""
    params = sequence.request.params
    # Subtracting the largest score keeps the others finite at tiny temperatures.
    scores = row.double().cpu()
    scores = (scores - scores.max()) / params.temperature
    if 0 < params.top_k < len(scores):
        threshold = scores.topk(params.top_k).values[-1]
        scores[scores < threshold] = -torch.inf
    if params.top_p < 1:
        ordered, order = scores.sort(descending=True)
        probabilities = ordered.softmax(-1)
        # A token stays if those before it sum to less than top_p; the likeliest always stays.
        dropped = probabilities.cumsum(-1) - probabilities >= params.top_p
        dropped[0] = False
        scores[order[dropped]] = -torch.inf
    if params.min_p > 0:
        probabilities = scores.softmax(-1)
        scores[probabilities < params.min_p * probabilities.max()] = -torch.inf
    cumulative = scores.softmax(-1).cumsum(-1)
    number = uniform(params.seed, len(sequence.output), sequence.index)
    token = int(torch.searchsorted(cumulative, number * cumulative[-1], right=True))
    # Rounding can leave the number above the whole sum; it then means the last possible token.
    return token if token < len(scores) else int(scores.isfinite().nonzero()[-1])
