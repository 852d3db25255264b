"""Turns the tokens of one answer into the events its reader gets."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from blip2_serve.engine.detokenizer import Decode, Detokenizer
from blip2_serve.engine.sequence import Request
from blip2_serve.types import FinishReason, TokenEvent, TokenLogprob


class Answer:
    """One of a request's n answers, as far as it has been sent."""

    def __init__(self, request: Request, index: int, decode: Decode) -> None:
        self._request = request
        self._index = index
        self._detokenizer = Detokenizer(decode, request.params.stop)
        self._tokens = 0

    def resume(self, tokens: Sequence[int], ends: Collection[int]) -> TokenEvent | None:
        """Goes on after tokens that were sent earlier; `ends` are the tokens that end an answer.

        Returns the last event, without tokens, if they have ended the answer.
        """
        assert self._request.params.max_tokens is not None
        at_end = bool(tokens) and tokens[-1] in ends
        for token in tokens[:-1] if at_end else tokens:
            self.add([token], [], None)
            if self._detokenizer.stopped:
                break
        if at_end or self._detokenizer.stopped:
            return self.add([], [], "stop")
        if len(tokens) >= self._request.params.max_tokens:
            return self.add([], [], "length")
        return None

    def add(
        self, tokens: list[int], logprobs: Sequence[TokenLogprob], reason: FinishReason | None
    ) -> TokenEvent:
        """Adds the next tokens, with the reason if they are the last.

        With the reason `stop`, the last token is the end token and adds no text. A stop string in
        the text ends the answer with the token that completes it.
        """
        detokenizer = self._detokenizer
        text = ""
        count = 0
        for token in tokens:
            count += 1
            if reason == "stop" and count == len(tokens):
                break  # the end token
            may_stop = self._tokens + count >= self._request.params.min_tokens
            text += detokenizer.push(token, may_stop)
            if detokenizer.stopped:
                break
        self._tokens += count
        if reason or detokenizer.stopped:
            text += detokenizer.close()
            if detokenizer.stopped:  # the flushed text can complete a stop string
                reason = "stop"
        return TokenEvent(
            tuple(tokens[:count]),
            text,
            reason,
            len(self._request.prompt),
            self._index,
            tuple(logprobs[:count]),
        )
