"""Log lines of a replica. They go to standard error; Ray forwards them to files and terminals.

Each line names the id of its request, which is also the response's `x-request-id`, or "-" if it is
about no request or several.
"""

from __future__ import annotations

import json
import logging
import time

from ray import serve

from blip2_serve.config import LogFormat
from blip2_serve.errors import Blip2ServeError
from blip2_serve.serve_internals import request_id

TEXT = "%(asctime)s %(levelname)s %(request_id)s %(message)s"


def configure(log_format: LogFormat) -> None:
    """Sets up logging. Every replica calls it; calling it again changes nothing."""
    logger = logging.getLogger("blip2_serve")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.addFilter(_add_request_id)
        handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(TEXT))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logging.getLogger("ray.serve").addFilter(is_news)


def is_news(record: logging.LogRecord) -> bool:
    """Filters Serve's log lines: drops the tracebacks of clients' own mistakes."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, Blip2ServeError) or error.status >= 500


class JsonFormatter(logging.Formatter):
    """One JSON object per line, with the field names of Serve's own JSON logs."""

    def format(self, record: logging.LogRecord) -> str:
        replica = serve.get_replica_context()
        line = {
            "asctime": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03}Z",
            "levelname": record.levelname,
            "message": record.getMessage(),
            "request_id": record.__dict__["request_id"],
            "application": replica.app_name,
            "deployment": replica.deployment,
            "replica": replica.replica_id.unique_id,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _add_request_id(record: logging.LogRecord) -> bool:
    record.request_id = request_id() or "-"
    return True
