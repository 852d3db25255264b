"""What the scripts do around their measurements."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator

from bench.client import WrongAnswer
from bench.servers import ServerFailed


class Missed(Exception):
    """A measurement is not what it must be."""


@contextlib.contextmanager
def failures_told() -> Iterator[None]:
    """Failures of the block end the process with one line and exit code 1."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the servers, as Ctrl-C does
    try:
        yield
    except (WrongAnswer, ServerFailed, Missed) as error:
        sys.exit(f"FAILED: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
