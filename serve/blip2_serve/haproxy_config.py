"""The command that Ray Serve starts as HAProxy: it corrects Serve's configuration and becomes it.

    python -m blip2_serve.haproxy_config --binary HAPROXY [--host HOST] [--body-timeout SECONDS] \\
        -- HAPROXY'S ARGUMENTS

Ray Serve writes the configuration and starts HAProxy anew whenever the ingress replicas change, so
each start goes through here. Corrected is what its environment variables cannot change:

* Where HAProxy listens. With `--host`, the server's port is on that address and all others are on
  loopback. Without it, only the page with statistics moves to loopback.
* What HAProxy answers by itself. Errors have OpenAI's shape.
* How long a request may take to arrive. HAProxy holds it until it is complete or fills a buffer,
  for an hour if need be.
* The application is told who connected.
* Connections end with a stream on them, so that a change of the ingress cuts none off.
* Splicing is off (`-dS`). With it, the disconnect of a client goes unnoticed and its answer is
  generated to the end.

The file is changed in its place, since Ray Serve knows HAProxy's processes by its path.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path

from blip2_serve.errors import Blip2ServeError, TimedOut, Unavailable

LOOPBACK = "127.0.0.1"
PUBLIC, STATISTICS = "frontend http_frontend", "listen stats"
RETRY_AFTER_S = 1

# What HAProxy answers by itself, by the status that it would send. What it cannot parse as HTTP
# gets a 400 that no configuration changes.
ERRORS: Mapping[int, Blip2ServeError] = {
    408: TimedOut("the request was not received in time"),
    500: Blip2ServeError("the proxy failed; its log has the details"),
    502: Unavailable("a replica was lost while it worked on this; try again"),
    503: Unavailable("no replica can take the request now; try again later"),
    504: TimedOut("the answer took longer than this server allows"),
}

# A request that HAProxy holds completely can be sent to another replica when the first one dies.
BUFFER_REQUEST = "    option http-buffer-request"
BODY_TIMEOUT_S = 30.0

# A connection ends with its stream. HAProxy, replaced while one is under way, would close it right
# after the stream, when the client may have sent its next request on it.
CLOSE_AFTER_STREAM = (
    "    http-after-response set-header connection close "
    "if { res.hdr(content-type) -m beg text/event-stream }"
)

# Tells who connected. A client's own header of that name is replaced.
PEER = "x-blip2-peer"
TELL_PEER = f"    http-request set-header {PEER} %[src]"
_OURS = (
    "errorfile ",
    BUFFER_REQUEST.strip(),
    "timeout http-request ",
    CLOSE_AFTER_STREAM.strip(),
    TELL_PEER.strip(),
)

_SECTION = re.compile(r"(?:global|defaults|frontend|backend|listen)\b")
_BIND = re.compile(r"(?P<start>\s*bind )\S*:(?P<port>\d+)(?P<end>.*)")
_NO_APPLICATION = re.compile(r"\s*http-request return status 404 ")


def main() -> None:
    """Corrects the configuration and replaces this process by HAProxy."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", required=True)
    parser.add_argument("--host")
    parser.add_argument("--body-timeout", type=float, default=BODY_TIMEOUT_S)
    parser.add_argument("arguments", nargs="*")
    args = parser.parse_args()
    config = Path(args.arguments[args.arguments.index("-f") + 1])
    correct(config, args.host, args.body_timeout)
    os.execv(args.binary, [args.binary, "-dS", *args.arguments])  # noqa: S606


def correct(config: Path, host: str | None, body_timeout_s: float = BODY_TIMEOUT_S) -> None:
    """Rewrites a configuration of Ray Serve, and writes the answers that it names beside it."""
    files = {status: config.with_name(f"{status}.openai.http") for status in ERRORS}
    for status, error in ERRORS.items():
        files[status].write_bytes(answer(error))
    corrected = config.with_name("corrected.cfg")
    text = lines(config.read_text(), host, files, body_timeout_s)
    corrected.write_text("".join(f"{line}\n" for line in text))
    corrected.replace(config)


def answer(error: Blip2ServeError) -> bytes:
    """The whole HTTP response that says so, as HAProxy reads it from a file."""
    body = json.dumps(error.body(), separators=(",", ":")).encode()
    head = [
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-cache",
        *(f"{name}: {value}" for name, value in error.headers().items()),
    ]
    if error.status == HTTPStatus.SERVICE_UNAVAILABLE:
        head.append(f"Retry-After: {RETRY_AFTER_S}")
    return "\r\n".join([*head, "", ""]).encode() + body


def lines(
    text: str, host: str | None, files: Mapping[int, Path], body_timeout_s: float
) -> Iterator[str]:
    """The corrected lines of a configuration; a corrected one stays as it is."""
    section = ""
    for line in text.splitlines():
        if _SECTION.match(line):
            section = line.strip()
        bind = _BIND.fullmatch(line)
        if bind and (host or section == STATISTICS):
            address = host if host and section == PUBLIC else LOOPBACK
            dual = " v4v6" if address == "[::]" and "v4v6" not in bind["end"] else ""
            yield f"{bind['start']}{address}:{bind['port']}{bind['end']}{dual}"
        elif section == "backend default_backend" and _NO_APPLICATION.match(line):
            yield "    http-request deny deny_status 503"
        elif not line.strip().startswith(_OURS):
            yield line
        if line.strip() == "defaults":
            yield from (f"    errorfile {status} {path}" for status, path in files.items())
            yield BUFFER_REQUEST
            yield f"    timeout http-request {round(1000 * body_timeout_s)}"
        elif line.strip() == PUBLIC:
            yield CLOSE_AFTER_STREAM
            yield TELL_PEER


if __name__ == "__main__":
    main()
