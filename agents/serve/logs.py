"""What the service's log looks like."""

from __future__ import annotations

import json
import logging
import sys
import time

from agents.serve.tracing import CURRENT


class Json(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and if there are, request id and traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told = {"time": f"{moment}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), "logger": record.name}
        told["message"] = record.getMessage()
        if (trace := CURRENT.get()) is not None:
            told["request_id"] = trace.id
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told)


def set_up(form: str) -> None:
    """Log to stderr, as ``text`` or ``json``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json() if form == "json" else logging.Formatter("%(asctime)s %(message)s"))
    logging.basicConfig(handlers=[handler])
