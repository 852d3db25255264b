"""A server that answers at once and correctly without computing anything.

    python tests/loadtest/null_server.py [--port 8001] [--delay 0.0] [--stall-at 5 --stall-for 2]
        [--refusals 2]

Run a load test against it to learn how much the load generator can send, and what it reports about
a server that stalls (`--stall-at` seconds after the first request) or first refuses each request a
few times with Retry-After (`--refusals`). Prints its URL once it listens.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import time
from collections import Counter

ANSWER = {
    "object": "caption.list",
    "data": [{"index": 0, "caption": "a drawing"}],
    "choices": [{"index": 0, "message": {"content": "a drawing"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
}
MODELS = {"object": "list", "data": [{"id": "null"}]}


class NullServer:
    """HTTP/1.1 with keep-alive: reads a request, waits, answers."""

    def __init__(
        self, delay_s: float, stall_at_s: float, stall_for_s: float, refusals: int
    ) -> None:
        self._delay_s = delay_s
        self._refusals = refusals
        self._tries: Counter[bytes] = Counter()
        self._stall = stall_at_s, stall_at_s + stall_for_s
        self._first: float | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.lower().split(b"\r\n")
                length = next((int(x[15:]) for x in lines if x.startswith(b"content-length:")), 0)
                body = await reader.readexactly(length)
                if b"/v1/models" in lines[0]:
                    writer.write(_json(MODELS))
                elif self._refuses(body):
                    writer.write(_refusal())
                else:
                    await asyncio.sleep(self._wait_s())
                    writer.write(_stream() if b'"stream": true' in body else _json(ANSWER))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has disconnected
        finally:
            writer.close()

    def _refuses(self, body: bytes) -> bool:
        if not self._refusals:
            return False
        name = hashlib.sha256(body).digest()
        self._tries[name] += 1
        return self._tries[name] <= self._refusals

    def _wait_s(self) -> float:
        """The delay and the rest of the stall."""
        now = time.monotonic()
        self._first = self._first or now
        begin, end = self._stall
        second = now - self._first
        return self._delay_s + (end - second if begin <= second < end else 0.0)


def _json(answer: dict[str, object]) -> bytes:
    return _message("application/json", json.dumps(answer))


def _stream() -> bytes:
    chunks = [{"choices": [{"index": 0, "delta": {"content": word}}]} for word in ("a ", "drawing")]
    events = [*chunks, {"choices": [], "usage": ANSWER["usage"]}]
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return _message("text/event-stream", text + "data: [DONE]\n\n")


def _refusal() -> bytes:
    body = json.dumps({"error": {"message": "no room", "type": "server_error", "code": None}})
    return _message("application/json", body, "429 Too Many Requests", "retry-after: 0")


def _message(kind: str, body: str, status: str = "200 OK", *more: str) -> bytes:
    headers = (f"content-type: {kind}", f"content-length: {len(body)}", *more)
    head = (f"HTTP/1.1 {status}", *headers, "", "")
    return "\r\n".join(head).encode() + body.encode()


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--stall-at", type=float, default=math.inf, help="seconds")
    parser.add_argument("--stall-for", type=float, default=2.0, help="seconds")
    parser.add_argument("--refusals", type=int, default=0, help="of each request, before an answer")
    args = parser.parse_args()
    server = NullServer(args.delay, args.stall_at, args.stall_for, args.refusals)
    async with await asyncio.start_server(server.serve, "127.0.0.1", args.port) as listening:
        port = listening.sockets[0].getsockname()[1]
        print(f"http://127.0.0.1:{port}", flush=True)
        await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
