"""A server that answers at once, and rightly, without computing anything.

    python loadtest/null_server.py [--port 8001] [--delay 0.0] [--stall-at 5 --stall-for 2]

For finding out what a load generator can do, and what it makes of a server that stops for a while.
The stall begins so many seconds after the first request. Prints its URL once it listens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import time

ANSWER = {
    "object": "caption.list",
    "data": [{"index": 0, "caption": "a drawing"}],
    "choices": [{"index": 0, "message": {"content": "a drawing"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
}
MODELS = {"object": "list", "data": [{"id": "null"}]}


class NullServer:
    """HTTP/1.1 with keep-alive: reads a request, waits, answers."""

    def __init__(self, delay_s: float, stall_at_s: float, stall_for_s: float) -> None:
        self._delay_s = delay_s
        self._stall = stall_at_s, stall_at_s + stall_for_s
        self._first: float | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.lower().split(b"\r\n")
                length = next((int(x[15:]) for x in lines if x.startswith(b"content-length:")), 0)
                body = await reader.readexactly(length)
                is_models = b"/v1/models" in lines[0]
                await asyncio.sleep(0.0 if is_models else self._wait())
                if b'"stream": true' in body:
                    writer.write(_stream())
                else:
                    writer.write(_response(MODELS if is_models else ANSWER))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()

    def _wait(self) -> float:
        """Seconds: the delay, and what is left of the stall."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
        begin, end = self._stall
        second = now - self._first
        return self._delay_s + (end - second if begin <= second < end else 0.0)


def _response(answer: dict[str, object]) -> bytes:
    return _message("application/json", json.dumps(answer))


def _stream() -> bytes:
    chunks = [{"choices": [{"index": 0, "delta": {"content": word}}]} for word in ("a ", "drawing")]
    events = [*chunks, {"choices": [], "usage": ANSWER["usage"]}]
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return _message("text/event-stream", text + "data: [DONE]\n\n")


def _message(kind: str, body: str) -> bytes:
    head = ("HTTP/1.1 200 OK", f"content-type: {kind}", f"content-length: {len(body)}", "", "")
    return "\r\n".join(head).encode() + body.encode()


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--stall-at", type=float, default=math.inf)
    parser.add_argument("--stall-for", type=float, default=2.0)
    args = parser.parse_args()
    server = NullServer(args.delay, args.stall_at, args.stall_for)
    async with await asyncio.start_server(server.serve, "127.0.0.1", args.port) as listening:
        port = listening.sockets[0].getsockname()[1]
        print(f"http://127.0.0.1:{port}", flush=True)
        await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
