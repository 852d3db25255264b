"""Chooses next tokens from logits, for all sequences at once.

A token depends only on its own logits, the request's parameters and the position: greedy takes the
largest logit, and sampling uses a random number keyed by (seed, sample, position). Neither the rest
of the batch nor the replica matters. The steps and their order are those of transformers, with
OpenAI's penalties and biases between them: repetition penalty, frequency and presence penalty,
logit bias, minimum length, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blip2_serve.compute.base import Device
from blip2_serve.compute.drawing import Filters, draw
from blip2_serve.engine.beam import Candidate
from blip2_serve.engine.sequence import Sequence
from blip2_serve.engine.step import NO_NUMBERS
from blip2_serve.types import SamplingParams, TokenLogprob

PLACES = (1 << 29) - 1  # the bits of a key that are a place; see `Sampler._keys`
MAGNITUDE = (1 << 63) - 1  # the bits of a float64 but its sign


@dataclass(frozen=True)
class Choice:
    """The next token of a sequence, with its log-probability if the request wants it."""

    token: int
    logprob: TokenLogprob | None = None


class Sampler:
    """Chooses tokens for a model whose answers end with one of `eos_token_ids`.

    `choose` and `expand` queue work on the device; the function that they return waits for it.
    """

    def __init__(self, eos_token_ids: tuple[int, ...], device: Device) -> None:
        self._eos = eos_token_ids
        self._device = device
        self._places = torch.empty(0)

    @torch.inference_mode()
    def choose(
        self, logits: Tensor, rows: list[int], sequences: list[Sequence]
    ) -> Callable[[], list[Choice]]:
        """Chooses the next token of each sequence.

        Args:
            logits: float32 [n, vocabulary], on the device.
            rows: The row of `logits` for each sequence. Samples of one request share a row until
                they have tokens of their own.
            sequences: As many as `rows`.

        Returns:
            What waits for the choices. A sequence whose logits are not all finite, which penalties
            and biases have no part in, gets the token NO_NUMBERS.
        """
        if not sequences:
            return list
        raw = self._rows(logits, rows)
        tokens = self._tokens(self._penalised(raw, sequences), sequences)
        chosen = self._device.fetch(torch.where(_are_finite(raw), tokens, NO_NUMBERS))
        tops = [sequence.request.params.top_logprobs for sequence in sequences]
        asking = [i for i, top in enumerate(tops) if top is not None]
        if not asking:
            return lambda: [Choice(token) for token in chosen().tolist()]
        most = max(tops[i] or 0 for i in asking)
        keys = []
        for block in self._blocks(asking):
            logprobs = self._rows(raw, block).log_softmax(-1)
            keys.append(self._best_keys(logprobs, self._rows(tokens, block), most))
        fetched = self._device.fetch(torch.cat(keys))

        def result() -> list[Choice]:
            choices = [Choice(token) for token in chosen().tolist()]
            for i, values, ids in zip(asking, *_read(fetched()), strict=True):
                choices[i] = replace(choices[i], logprob=_logprob(values, ids, tops[i] or 0))
            return choices

        return result

    @torch.inference_mode()
    def expand(
        self, logits: Tensor, rows: list[int], beams: list[Sequence], count: int
    ) -> Callable[[], list[Candidate]]:
        """Finds the `count` best continuations of one request's beams, best first.

        As in transformers, penalties (and biases) apply to log-probabilities here, not to logits.

        Args:
            logits: float32 [n, vocabulary], on the device.
            rows: The row of `logits` for each beam.
            beams: As many as `rows`.
            count: At most len(beams) * vocabulary.

        Returns:
            What waits for the candidates; none if the logits of any beam are not all finite.
        """
        width = logits.shape[1]
        own = self._rows(logits, rows)
        raw = own.log_softmax(-1)
        scores = self._device.upload(torch.tensor([[beam.score] for beam in beams]))
        sums = self._penalised(raw, beams) + scores
        signed = _adds(beams[0].request.params)  # sums may be above 0
        best = self._keys(sums.flatten(), signed=signed).topk(count, largest=False).values
        fetched = self._device.fetch(torch.where(_are_finite(own).all(), best, NO_NUMBERS))
        top = beams[0].request.params.top_logprobs
        if top is not None:
            places = best & PLACES
            its_logprobs = raw.index_select(0, places // width)
            lines = self._device.fetch(self._best_keys(its_logprobs, places % width, top))

        def result() -> list[Candidate]:
            keys = fetched()
            if keys[0] == NO_NUMBERS:
                return []
            candidates = [
                Candidate(beams[place // width], place % width, score)
                for score, place in zip(*_read(keys, signed=signed), strict=True)
            ]
            if top is None:
                return candidates
            return [
                replace(candidate, logprob=_logprob(values, ids, top))
                for candidate, values, ids in zip(candidates, *_read(lines()), strict=True)
            ]

        return result

    def _rows(self, tensor: Tensor, rows: list[int]) -> Tensor:
        first, end = rows[0], rows[0] + len(rows)
        if rows == list(range(first, end)):
            return tensor[first:end]
        return tensor.index_select(0, self._device.upload(torch.tensor(rows)))

    def _penalised(self, raw: Tensor, sequences: list[Sequence]) -> Tensor:
        """The scores with penalties; a copy, unless there are none."""
        width = raw.shape[1]
        changed: list[int] = []
        changes: list[tuple[float, float]] = []
        forbidden: list[int] = []
        for row, sequence in enumerate(sequences):
            params = sequence.request.params
            if params.repetition_penalty != 1 or _adds(params):
                own = _changes(sequence)
                changed += [row * width + token for token in own]
                changes += own.values()
            if len(sequence.output) < params.min_tokens:
                forbidden += [row * width + token for token in self._eos]
        if not changed and not forbidden:
            return raw
        scores = raw.clone().view(-1)
        if changed:
            table = torch.tensor([changed, *zip(*changes, strict=True)], dtype=torch.float64)
            where, penalty, addend = self._device.upload(table)
            where, penalty, addend = where.long(), penalty.to(scores.dtype), addend.to(scores.dtype)
            before = scores[where]
            scores[where] = torch.where(before < 0, before * penalty, before / penalty) + addend
        if forbidden:
            scores.index_fill_(0, self._device.upload(torch.tensor(forbidden)), -torch.inf)
        return scores.view_as(raw)

    def _tokens(self, scores: Tensor, sequences: list[Sequence]) -> Tensor:
        """int64 [n]: that of the largest score, or a drawn one if the temperature is above 0."""
        groups: dict[Filters, list[int]] = {}
        for row, sequence in enumerate(sequences):
            params = sequence.request.params
            if params.temperature > 0:
                groups.setdefault(Filters.of(params, scores.shape[1]), []).append(row)
        if not groups:
            return scores.argmax(-1)
        blocks = [(f, rows) for f, group in groups.items() for rows in self._blocks(group)]
        order = [row for _, rows in blocks for row in rows]
        columns = [*zip(*(_drawing_params(sequences[row]) for row in order), strict=True)]
        table = self._device.upload(torch.tensor(columns, dtype=torch.float64)[:, :, None])
        tokens, keep = [], self._device.keep_top_p
        for filters, rows in blocks:
            largest_k = max(sequences[row].request.params.top_k for row in rows)
            own, table = table[:, : len(rows)], table[:, len(rows) :]
            tokens.append(draw(self._rows(scores, rows), own, filters, largest_k, keep))
        if order == list(range(len(sequences))):
            return torch.cat(tokens)
        where = self._device.upload(torch.tensor(order))
        return scores.argmax(-1).index_copy_(0, where, torch.cat(tokens))

    def _blocks(self, rows: list[int]) -> list[list[int]]:
        size = self._device.rows_at_once
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _best_keys(self, logprobs: Tensor, tokens: Tensor, count: int) -> Tensor:
        """Keys of a token of each row, and of its `count` likeliest: int64 [n, 1 + count]."""
        keys = self._keys(logprobs)
        best = keys.topk(count, largest=False).values
        return torch.cat([keys.gather(1, tokens[:, None]), best], 1)

    def _keys(self, scores: Tensor, *, signed: bool = False) -> Tensor:
        """Numbers that are all different, the smallest for the first of the likeliest.

        float32 [..., n] -> int64 [..., n]; `_read` reads them. Unless `signed`, scores must be at
        most 0.
        """
        count = scores.shape[-1]
        if len(self._places) < count:
            self._places = torch.arange(count, device=scores.device)
        # Positive floats are in the order of their bits, of which the last 29 are 0 in those that
        # were float32: there is room for the place.
        bits = scores.double().neg_().view(torch.int64)
        if signed:  # negative floats are in the opposite order
            bits = torch.where(bits < 0, (bits ^ MAGNITUDE) & ~PLACES, bits)
        return bits.add_(self._places[:count])


def _are_finite(logits: Tensor) -> Tensor:
    """bool [n]: whether rows have no NaN, nothing infinite, and a token that is possible at all.

    A single -inf is a token that is impossible.
    """
    return logits.amax(-1).isfinite()  # a NaN is the largest


def _adds(params: SamplingParams) -> bool:
    """Whether anything is added to scores."""
    return bool(params.frequency_penalty or params.presence_penalty or params.logit_bias)


def _changes(sequence: Sequence) -> dict[int, tuple[float, float]]:
    """By token: what divides its score, or multiplies it below 0, and what is added then."""
    params = sequence.request.params
    divisor = params.repetition_penalty
    changes: dict[int, tuple[float, float]] = {}
    if divisor != 1:
        # As in transformers, the tokens of the prompt and the image count too.
        changes = dict.fromkeys((*sequence.request.prompt, *sequence.output), (divisor, 0.0))
    if params.frequency_penalty or params.presence_penalty:
        # As at OpenAI, only those of the answer count.
        for token, count in Counter(sequence.output).items():
            loss = count * params.frequency_penalty + params.presence_penalty
            changes[token] = divisor, -loss
    for token, bias in params.logit_bias:
        penalty, addend = changes.get(token, (1.0, 0.0))
        changes[token] = penalty, addend + bias
    return changes


def uniform(seed: int, position: int, sample: int = 0) -> float:
    """Returns a pseudo-random number in [0, 1), a hash of the arguments (64-bit integers)."""
    key = struct.pack("<qqq", seed, position, sample)
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _drawing_params(sequence: Sequence) -> tuple[float, ...]:
    params = sequence.request.params
    number = uniform(params.seed, len(sequence.output), sequence.index)
    return params.temperature, params.top_k, params.top_p, params.min_p, number


def _read(keys: Tensor, *, signed: bool = False) -> tuple[list[Any], list[Any]]:
    """Scores and their places, in lists of the shape of `keys`."""
    places = keys & PLACES
    bits = keys - places
    if signed:
        bits = torch.where(bits < 0, (bits | PLACES) ^ MAGNITUDE, bits)
    return bits.view(torch.float64).neg().tolist(), places.tolist()


def _logprob(values: list[float], ids: list[int], top: int) -> TokenLogprob:
    """Of a token, and the `top` likeliest behind it."""
    token, *others = map(TokenLogprob, ids[: top + 1], values)
    return replace(token, top=tuple(others))
