"""Log lines of a replica: to standard error, from where Ray brings them to files and terminals."""

from __future__ import annotations

import logging

FORMAT = "%(asctime)s %(levelname)s %(message)s"


def configure() -> None:
    """Called once by every replica; only this package's loggers are touched."""
    logger = logging.getLogger("blip2_serve")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(FORMAT))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
