"""A streamed answer between the backend and the socket."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Self

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from blip2_serve.http.deadline import Alarm
from blip2_serve.http.measure import StreamTimer
from blip2_serve.types import TokenEvent


class TokenStream:
    """The events of one answer, the first of them received already; each is timed on arrival."""

    def __init__(
        self, first: TokenEvent, rest: AsyncGenerator[TokenEvent, None], timer: StreamTimer
    ) -> None:
        self._first: TokenEvent | None = first
        self._rest = rest
        self._timer = timer
        self._alarm = Alarm()

    @classmethod
    async def start(
        cls, events: AsyncGenerator[TokenEvent, None], timer: StreamTimer
    ) -> TokenStream:
        """Waits for the first event, so that what fails before it can still set the status."""
        first = await anext(events)
        timer.received(first)
        return cls(first, events, timer)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenEvent:
        event, self._first = self._first, None
        if event is None:
            event = await self._alarm.wait(anext(self._rest))
            self._timer.received(event)
        return event

    def timing(self) -> dict[str, float]:
        """Where the time has gone so far, as `StreamTimer.timing`."""
        return self._timer.timing()

    async def aclose(self) -> None:
        """Ends the backend's work, unless it has ended."""
        self._alarm.stop()
        await self._rest.aclose()


class TokenStreamResponse(StreamingResponse):
    """Sends `body`, which is made of `tokens`, and closes `tokens` however the response ends.

    The garbage collector would close them too, but late: the backend would go on generating.
    """

    def __init__(
        self,
        tokens: TokenStream,
        body: AsyncIterator[bytes],
        media_type: str = "text/event-stream",
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(body, media_type=media_type, headers=headers)
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._tokens.aclose()
