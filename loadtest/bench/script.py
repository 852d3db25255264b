"""What every benchmark script does around its measurements."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator

from loadtest.answers import WrongAnswer
from loadtest.bench.servers import ServerFailed


class Missed(Exception):
    """A measurement exceeds its limit."""


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help shows the script's docstring."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


@contextlib.contextmanager
def one_line_failures() -> Iterator[None]:
    """Turns failures of the block into one line and exit code 1."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the servers like Ctrl-C
    try:
        yield
    except (WrongAnswer, ServerFailed, Missed) as error:
        sys.exit(f"FAILED: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
