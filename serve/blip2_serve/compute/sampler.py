"""Chooses next tokens from logits, for all sequences at once.

A token depends only on its own logits, the request's parameters and the position: greedy takes the
largest logit, and sampling uses a random number keyed by (seed, sample, position). Neither the rest
of the batch nor the replica matters. The steps and their order are those of transformers:
repetition penalty, minimum length, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blip2_serve.compute.base import Device
from blip2_serve.compute.drawing import Filters, draw
from blip2_serve.engine.beam import Candidate
from blip2_serve.engine.sequence import Sequence
from blip2_serve.types import TokenLogprob

PLACE = (1 << 29) - 1


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
        """
        if not sequences:
            return list
        raw = self._rows(logits, rows)
        tokens = self._tokens(self._penalised(raw, sequences), sequences)
        chosen = self._device.fetch(tokens)
        tops = [sequence.request.params.top_logprobs for sequence in sequences]
        asking = [i for i, top in enumerate(tops) if top is not None]
        if not asking:
            return lambda: [Choice(token) for token in chosen().tolist()]
        blocks = (
            (self._rows(raw, block).log_softmax(-1), self._rows(tokens, block))
            for block in self._blocks(asking)
        )
        reports = self._logprobs(blocks, [tops[i] or 0 for i in asking])

        def result() -> list[Choice]:
            reported = dict(zip(asking, reports(), strict=True))
            return [Choice(t, reported.get(i)) for i, t in enumerate(chosen().tolist())]

        return result

    @torch.inference_mode()
    def expand(
        self, logits: Tensor, rows: list[int], beams: list[Sequence], count: int
    ) -> Callable[[], list[Candidate]]:
        """Finds the `count` best continuations of one request's beams, best first.

        As in transformers, penalties apply to log-probabilities here, not to logits.

        Args:
            logits: float32 [n, vocabulary], on the device.
            rows: The row of `logits` for each beam.
            beams: As many as `rows`.
            count: At most len(beams) * vocabulary.
        """
        width = logits.shape[1]
        raw = self._rows(logits, rows).log_softmax(-1)
        scores = self._device.upload(torch.tensor([[beam.score] for beam in beams]))
        sums = self._penalised(raw, beams) + scores
        values, places = _largest(sums.flatten(), count)
        best = self._device.fetch(torch.stack([places.double(), values.double()]))
        top = beams[0].request.params.top_logprobs
        reports: Callable[[], list[TokenLogprob]] | None = None
        if top is not None:
            of_beam = raw.index_select(0, places // width)
            reports = self._logprobs([(of_beam, places % width)], [top] * count)

        def result() -> list[Candidate]:
            numbers, totals = best().tolist()
            logprobs = reports() if reports else [None] * count
            return [
                Candidate(beams[int(place) // width], int(place) % width, score, logprob)
                for place, score, logprob in zip(numbers, totals, logprobs, strict=True)
            ]

        return result

    def _rows(self, tensor: Tensor, rows: list[int]) -> Tensor:
        if rows == list(range(len(tensor))):
            return tensor
        return tensor.index_select(0, self._device.upload(torch.tensor(rows)))

    def _penalised(self, raw: Tensor, sequences: list[Sequence]) -> Tensor:
        """The scores with penalties; a copy, unless there are none."""
        width = raw.shape[1]
        seen: list[int] = []
        penalties: list[float] = []
        forbidden: list[int] = []
        for row, sequence in enumerate(sequences):
            params = sequence.request.params
            if params.repetition_penalty != 1:
                # As in transformers, the tokens of the prompt and the image count too.
                tokens = {*sequence.request.prompt, *sequence.output}
                seen += [row * width + token for token in tokens]
                penalties += [params.repetition_penalty] * len(tokens)
            if len(sequence.output) < params.min_tokens:
                forbidden += [row * width + token for token in self._eos]
        if not seen and not forbidden:
            return raw
        scores = raw.flatten().clone()
        if seen:
            where, penalty = self._device.upload(
                torch.tensor([seen, penalties], dtype=torch.float64)
            )
            where, penalty = where.long(), penalty.to(scores.dtype)
            before = scores[where]
            scores[where] = torch.where(before < 0, before * penalty, before / penalty)
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
        drawn = [row for _, rows in blocks for row in rows]
        lines = [(row, *_drawing_params(sequences[row])) for row in drawn]
        table = self._device.upload(torch.tensor(lines, dtype=torch.float64))
        if len(drawn) < len(sequences):
            tokens = scores.argmax(-1)
        else:
            tokens = torch.empty(len(drawn), dtype=torch.int64, device=table.device)
        for filters, rows in blocks:
            part, table = table[: len(rows)], table[len(rows) :]
            where = part[:, 0].long()
            own = scores if len(rows) == len(scores) else scores.index_select(0, where)
            largest_k = max(sequences[row].request.params.top_k for row in rows)
            tokens.index_copy_(0, where, draw(own, part[:, 1:], filters, largest_k))
        return tokens

    def _blocks(self, rows: list[int]) -> list[list[int]]:
        size = self._device.rows_at_once
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _logprobs(
        self, blocks: Iterable[tuple[Tensor, Tensor]], tops: list[int]
    ) -> Callable[[], list[TokenLogprob]]:
        """Reports a token of each row, with as many of the likeliest as asked.

        Args:
            blocks: log-probabilities [n, vocabulary] and tokens [n] of some rows.
            tops: One per row of all blocks.
        """
        parts = []
        for logprobs, tokens in blocks:
            own = tokens[:, None]
            values, ids = _largest(logprobs, max(tops))
            parts.append(torch.cat([own.double(), ids, logprobs.gather(1, own), values], 1))
        numbers = self._device.fetch(torch.cat(parts))

        def result() -> list[TokenLogprob]:
            reports = []
            for line, top in zip(numbers().tolist(), tops, strict=True):
                of_ids, of_values = line[: len(line) // 2], line[len(line) // 2 :]
                pairs = zip(map(int, of_ids), of_values, strict=True)
                token, *others = itertools.starmap(TokenLogprob, pairs)
                reports.append(replace(token, top=tuple(others[:top])))
            return reports

        return result


def uniform(seed: int, position: int, sample: int = 0) -> float:
    """Returns a pseudo-random number in [0, 1), a hash of the arguments (64-bit integers)."""
    key = struct.pack("<qqq", seed, position, sample)
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _drawing_params(sequence: Sequence) -> tuple[float, ...]:
    params = sequence.request.params
    number = uniform(params.seed, len(sequence.output), sequence.index)
    return params.temperature, params.top_k, params.top_p, params.min_p, number


def _largest(logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row and their places; of equal ones, the first ones first.

    float32, at most 0, [..., n] -> [..., count], largest first.
    """
    # The bits of positive floats are in the order of the floats. The last 29 bits of those that
    # were float32 are 0: the place goes there.
    keys = logprobs.double().neg_().view(torch.int64)
    keys += torch.arange(logprobs.shape[-1], device=logprobs.device)
    keys = keys.topk(count, largest=False).values
    places = keys & PLACE
    return (keys - places).view(torch.float64).neg().float(), places
