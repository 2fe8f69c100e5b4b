"""Logs: one JSON line an event, on stderr."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from sequoia.redaction import redacted
from sequoia.request_scope import current_scope

# What every record has; the rest came as `extra`.
_OWN_FIELDS = frozenset((*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"))


def configure_logging(process: str, level: str) -> None:
    """Send this process's logs and warnings of `level` ("info") and above to stderr. Call once, in main().

    A line has time, level, process, logger and event (the message), request_id and, if there is one, trace_id of the
    request that it belongs to, the fields given as `extra`, and the traceback as `exception`; passwords in URLs and
    bearer tokens are hidden. Raises ValueError for an unknown level.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines(process))
    root = logging.getLogger()
    root.setLevel(level.upper())
    root.handlers = [handler]
    logging.captureWarnings(True)


class _JsonLines(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "event": record.getMessage(),
        }
        if (scope := current_scope()) is not None:
            line |= scope.log_fields
        line |= {name: value for name, value in vars(record).items() if name not in _OWN_FIELDS}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return redacted(json.dumps(line, default=str))
