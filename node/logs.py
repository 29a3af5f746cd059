"""The only logging set-up: one handler on stderr, text for people on a terminal, JSON lines otherwise.

Rooms log `log.info("segment sealed shard=%s segment=%d rows=%d", ...)`: an event, then key=value pairs, ids before
numbers. The JSON form gives the pairs as fields too, so that nobody has to parse the sentence. Every line of a request
carries its id, also from worker threads.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

from node.settings import LogFormat, LogLevel

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request being served here; set by the API's middleware, copied to worker threads by `Workers`."""

PAIR = re.compile(r"(?:^|\s)([a-z][a-z0-9_.]*)=(\S+)")
CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")


def setup(level: LogLevel = LogLevel.INFO, format: LogFormat = LogFormat.AUTO, stream: TextIO | None = None) -> None:
    """Send all logging to `stream` (stderr) in one format; calling it again replaces the set-up of the first call."""
    stream = sys.stderr if stream is None else stream
    text = format is LogFormat.TEXT or (format is LogFormat.AUTO and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    handler.set_name("annulus")
    root = logging.getLogger()
    for old in [each for each in root.handlers if each.get_name() == "annulus"]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    logging.getLogger("aiohttp.server").addFilter(_calmed)  # the same filter twice is added once


def _calmed(record: logging.LogRecord) -> bool:
    """Make one INFO line of what the HTTP server logs as an error with its traceback: a client that talks no HTTP."""
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        from aiohttp.http_exceptions import HttpProcessingError  # here: importing it takes a tenth of a start

        if isinstance(error, HttpProcessingError):
            record.levelno, record.levelname = logging.INFO, "INFO"
            record.msg, record.args = "malformed request refused error=%s", (type(error).__name__,)
            record.exc_info = record.exc_text = None
    return record.levelno >= logging.getLogger().level


class TextFormatter(logging.Formatter):
    """`12:34:56.789 INFO    storage.seal  segment sealed shard=s3 rows=100  [request 4f2a]`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        line = f"{moment} {record.levelname:<7} {record.name}  {one_line(record.getMessage())}"
        if found := request_id.get():
            line += f"  [request {one_line(found)}]"
        trace = _trace(self, record)
        return line if not trace else line + "\n" + "\n".join("    " + each for each in trace.splitlines())


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, request_id, fields, exception; no newline inside."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
        }
        if found := request_id.get():
            entry["request_id"] = found
        if pairs := PAIR.findall(message):
            entry["fields"] = {key: _value(text) for key, text in pairs}
        if trace := _trace(self, record):
            entry["exception"] = trace
        return json.dumps(entry)


def one_line(text: str) -> str:
    """Return the text with control characters escaped: what a client sends cannot forge a line or move the cursor."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = [formatter.formatException(record.exc_info)] if record.exc_info else []
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return "\n".join(parts)


def _value(text: str) -> int | float | str:
    """Return a number where the text is one, so that log stores can add and compare it."""
    if re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    if re.fullmatch(r"-?[0-9]{1,18}\.[0-9]{1,18}", text):
        return float(text)
    return text
