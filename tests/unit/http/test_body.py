"""What every request goes through before a route reads it."""

from __future__ import annotations

from starlette.types import Message, Receive, Scope, Send

from blip2_serve.http.body import RequestBody

Headers = list[tuple[bytes, bytes]]


async def seen_by_the_application(headers: Headers) -> Headers:
    """The headers that are left of those that were sent."""
    seen: Headers = []

    async def application(scope: Scope, _: Receive, __: Send) -> None:
        seen.extend(scope["headers"])

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(_: Message) -> None: ...

    scope = {"type": "http", "headers": headers}
    await RequestBody(application, max_bytes=100)(scope, receive, send)
    return seen


async def test_headers_that_come_more_than_once_stay_as_they_are() -> None:
    sent = [(b"x-forwarded-for", b"10.0.0.1"), (b"accept", b"a"), (b"x-forwarded-for", b"10.0.0.2")]
    seen = await seen_by_the_application([*sent, (b"content-type", b"text/plain")])

    assert seen == [*sent, (b"content-type", b"application/json")]


async def test_a_form_keeps_its_media_type_and_boundary() -> None:
    sent = [(b"content-type", b"MULTIPART/form-data; boundary=X"), (b"accept", b"a")]

    assert await seen_by_the_application(sent) == sent
