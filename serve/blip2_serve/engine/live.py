"""A request under way: its answers, its search, and what is left of it to send."""

from __future__ import annotations

from blip2_serve.engine.answer import Answer
from blip2_serve.engine.beam import BeamSearch
from blip2_serve.engine.detokenizer import Decode
from blip2_serve.engine.sequence import Request
from blip2_serve.errors import InvalidRequest, Unavailable
from blip2_serve.types import TokenEvent, TokenLogprob


class Live:
    """A request under way, with its answers so far; `ends` are the tokens that end an answer."""

    def __init__(self, request: Request, decode: Decode, ends: frozenset[int]) -> None:
        params = request.params
        self.request = request
        self.ends = ends
        self.answers = [Answer(request, index, decode) for index in range(params.n)]
        self.search = BeamSearch(request, ends) if params.num_beams > 1 else None
        self.unfinished = params.n  # answers
        self._to_repeat: list[tuple[int, ...]] = []  # by answer: what a search has yet to find

    def resume(self) -> list[TokenEvent]:
        """Continues after `request.sent`; returns the last events of answers that it ends.

        Those are finished then, in `request.sent` too.
        """
        events = []
        sent: list[tuple[int, ...] | None] = []
        for answer, tokens in zip(self.answers, self.request.sent, strict=True):
            event = None if tokens is None else answer.resume(tokens, self.ends)
            if event:
                events.append(event)
            sent.append(None if event else tokens)
        self.request.sent = tuple(sent)
        self.unfinished = sum(tokens is not None for tokens in sent)
        if self.search:
            self._to_repeat = [tokens or () for tokens in sent]
        return events

    def is_finished(self, index: int) -> bool:
        """Whether the client had received this answer to its end before the request came."""
        return bool(self.request.sent) and self.request.sent[index] is None

    def unsent(
        self, index: int, tokens: list[int], logprobs: list[TokenLogprob]
    ) -> tuple[list[int], list[TokenLogprob]]:
        """Drops those tokens of a search that the client has received already.

        Raises:
            Unavailable: the search, which runs again from the start, has found others.
        """
        if not self._to_repeat:
            return tokens, logprobs
        due = self._to_repeat[index]
        count = min(len(tokens), len(due))
        if due[:count] != tuple(tokens[:count]):
            raise Unavailable(
                "the answer could not be continued: a second beam search found another one; try "
                "again"
            )
        self._to_repeat[index] = due[count:]
        return tokens[count:], logprobs[count:]


def check_sent(request: Request) -> None:
    """Raises InvalidRequest unless `sent` is empty, or tells of n answers of which some go on."""
    if request.sent and len(request.sent) != request.params.n:
        raise InvalidRequest(f"{len(request.sent)} answers were sent of {request.params.n}")
    if request.sent and all(tokens is None for tokens in request.sent):
        raise InvalidRequest("all answers were sent to their ends already")
