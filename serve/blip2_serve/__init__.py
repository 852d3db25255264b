"""Serve BLIP-2 OPT models: captions, visual question answering and chat about an image."""

import time

__version__ = "0.1.0"

IMPORTED_AT = time.monotonic()  # seconds; replicas count from here how long they take to start
