"""Log lines of a replica: to standard error, from where Ray brings them to files and terminals."""

from __future__ import annotations

import logging

from blip2_serve.errors import Blip2ServeError

FORMAT = "%(asctime)s %(levelname)s %(message)s"


def configure() -> None:
    """Called once by every replica."""
    logger = logging.getLogger("blip2_serve")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(FORMAT))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logging.getLogger("ray.serve").addFilter(is_news)


def is_news(record: logging.LogRecord) -> bool:
    """Whether a line of Serve's is worth a traceback: a client's own mistake is not."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, Blip2ServeError) or error.status >= 500
