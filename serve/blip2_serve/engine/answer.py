"""Tokens of one answer to the events its reader gets."""

from __future__ import annotations

from collections.abc import Sequence

from blip2_serve.engine.detokenizer import Decode, Detokenizer
from blip2_serve.engine.sequence import Request
from blip2_serve.types import FinishReason, TokenEvent, TokenLogprob


class Answer:
    """One of a request's n answers, as far as its reader knows it."""

    def __init__(self, request: Request, index: int, decode: Decode) -> None:
        self._request = request
        self._index = index
        self._detokenizer = Detokenizer(decode, request.params.stop)
        self._tokens = 0

    def add(
        self, tokens: list[int], logprobs: Sequence[TokenLogprob], reason: FinishReason | None
    ) -> TokenEvent:
        """The next tokens, and why they are the last (`stop`: the very last ends the sequence).

        A stop string in their text makes its last token the answer's last.
        """
        detokenizer = self._detokenizer
        text = ""
        count = 0
        for token in tokens:
            count += 1
            if reason == "stop" and count == len(tokens):
                break  # an end token, which is no text
            may_stop = self._tokens + count >= self._request.params.min_tokens
            text += detokenizer.push(token, may_stop)
            if detokenizer.stopped:
                break
        self._tokens += count
        if reason or detokenizer.stopped:
            text += detokenizer.close()
            if detokenizer.stopped:  # maybe only by the very last half of a character
                reason = "stop"
        return TokenEvent(
            tuple(tokens[:count]),
            text,
            reason,
            len(self._request.prompt),
            self._index,
            tuple(logprobs[:count]),
        )
