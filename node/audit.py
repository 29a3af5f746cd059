"""The audit log: who did what, from where, on which object, and how it ended; one JSON object a line.

It holds no credentials, no rows, no vectors and no filters. It has a file of its own, rotated by size; without a file
nothing is written. A disk that is full does not stop the node: what could not be written is counted and said once.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from typing import Any, Final

from node.clock import Clock
from node.settings import AuthSettings

log = logging.getLogger(__name__)

OBJECTS_MAX: Final = 16
TEXT_CHARS_MAX: Final = 256


class Audit:
    """Appends to the audit file of the settings."""

    def __init__(self, settings: AuthSettings, clock: Clock) -> None:
        """Raises OSError if the file cannot be opened."""
        self._clock = clock
        self.has_reads = settings.audit_reads
        self.lost = 0
        self._handler: RotatingFileHandler | None = None
        if settings.audit_file:
            self._handler = _Rotating(self, settings)

    @property
    def is_on(self) -> bool:
        return self._handler is not None

    def write(
        self,
        *,
        who: str,
        address: str,
        operation: str,
        outcome: str,
        code: int = 0,
        database: str = "",
        objects: tuple[str, ...] = (),
        request_id: str = "",
    ) -> None:
        if self._handler is None:
            return
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(self._clock.wall_ms() / 1000, UTC).isoformat(timespec="milliseconds"),
            "who": who[:TEXT_CHARS_MAX],
            "address": address,
            "operation": operation,
            "outcome": outcome,
        }
        if code:
            entry["code"] = code
        if database:
            entry["database"] = database[:TEXT_CHARS_MAX]
        if objects:
            entry["objects"] = [one[:TEXT_CHARS_MAX] for one in objects[:OBJECTS_MAX]]
        if request_id:
            entry["request_id"] = request_id
        self._handler.emit(logging.LogRecord("audit", logging.INFO, "", 0, json.dumps(entry), None, None))

    def close(self) -> None:
        if self._handler is not None:
            self._handler.close()


class _Rotating(RotatingFileHandler):
    def __init__(self, audit: Audit, settings: AuthSettings) -> None:
        super().__init__(
            settings.audit_file,
            maxBytes=settings.audit_bytes_max,
            backupCount=settings.audit_files_max,
            encoding="utf-8",
        )
        self._audit = audit

    def _open(self) -> Any:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        return open(descriptor, self.mode, encoding=self.encoding, errors=self.errors)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        self._audit.lost += 1
        if self._audit.lost == 1:
            log.error("the audit log cannot be written file=%s", self.baseFilename)
