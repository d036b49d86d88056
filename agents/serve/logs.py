"""Request ids, and what the service's log looks like."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from contextvars import ContextVar

HEADER = "X-Request-ID"
_USABLE = re.compile(r"[\x21-\x7e]{1,128}")
_CURRENT: ContextVar[str | None] = ContextVar("request_id", default=None)


def begin(offered: str | None) -> str:
    """Return the id of a request that begins, the one that it brings if that is one, and keep it for what is logged."""
    own = offered if offered is not None and _USABLE.fullmatch(offered) else uuid.uuid4().hex
    _CURRENT.set(own)
    return own


def current() -> dict[str, str]:
    """Return the header with the id of the request that is under way, if one is."""
    own = _CURRENT.get()
    return {} if own is None else {HEADER: own}


class Json(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and if there are, request id and traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told = {"time": f"{moment}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), "logger": record.name}
        told["message"] = record.getMessage()
        if (current := _CURRENT.get()) is not None:
            told["request_id"] = current
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told)


def set_up(form: str) -> None:
    """Log to stderr, as ``text`` or ``json``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json() if form == "json" else logging.Formatter("%(asctime)s %(message)s"))
    logging.basicConfig(handlers=[handler])
