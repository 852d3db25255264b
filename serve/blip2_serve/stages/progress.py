"""What the client of a stream has received, for a replica that continues it. Needs no Ray."""

from __future__ import annotations

from dataclasses import replace

from blip2_serve.types import TokenEvent

Sent = tuple[tuple[int, ...] | None, ...]


class Progress:
    """The tokens of the answers to one request."""

    def __init__(self, answers: int) -> None:
        self._tokens: list[list[int] | None] = [[] for _ in range(answers)]
        self._begun = self._resumes = False

    def begin(self) -> Sent | None:
        """What another attempt goes on from, as `sent`."""
        self._resumes = self._begun
        return self.sent()

    def add(self, event: TokenEvent) -> TokenEvent:
        """Notes what goes to the client, and marks where another attempt went on with it."""
        self._begun = True
        if self._resumes:
            event, self._resumes = replace(event, resumed=True), False
        if event.finish_reason is not None:
            self._tokens[event.index] = None
        elif (tokens := self._tokens[event.index]) is not None:
            tokens += event.token_ids
        return event

    def sent(self) -> Sent | None:
        """The token ids sent of each answer, None for a finished one; empty if there are none.

        None if all are finished: only the end of the stream was lost.
        """
        if all(tokens is None for tokens in self._tokens):
            return None
        if not any(tokens is None or tokens for tokens in self._tokens):
            return ()
        return tuple(None if tokens is None else tuple(tokens) for tokens in self._tokens)
