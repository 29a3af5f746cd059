"""Logging: two formats, request ids, no forged lines."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Iterator

import pytest
from aiohttp.http_exceptions import BadHttpMessage

from node.logs import request_id, setup
from node.settings import LogFormat, LogLevel

log = logging.getLogger("storage.seal")


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    yield
    logging.captureWarnings(False)
    root.setLevel(level)
    for handler in [each for each in root.handlers if each.get_name() == "annulus"]:
        root.removeHandler(handler)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_text_on_a_terminal() -> None:
    """auto writes text to a terminal, with the request's id at the end."""
    stream = Terminal()
    setup(stream=stream)
    token = request_id.set("4f2a")
    log.info("segment sealed shard=s%d rows=%d", 3, 100)
    request_id.reset(token)
    line = stream.getvalue()
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d\.\d{3} INFO    storage.seal  segment sealed shard=s3 rows=100  \[request 4f2a\]\n", line
    )


def test_json_otherwise() -> None:
    """auto writes one JSON object a line to anything else, with the pairs as fields."""
    stream = io.StringIO()
    setup(stream=stream)
    token = request_id.set("4f2a")
    log.warning("segment sealed shard=%s rows=%d fill_ratio=%.2f name=%s", "s3", 100, 0.5, "a b")
    request_id.reset(token)
    entry = json.loads(stream.getvalue())
    assert entry.pop("time").endswith("+00:00")
    assert entry == {
        "level": "warning",
        "logger": "storage.seal",
        "message": "segment sealed shard=s3 rows=100 fill_ratio=0.50 name=a b",
        "request_id": "4f2a",
        "fields": {"shard": "s3", "rows": 100, "fill_ratio": 0.5, "name": "a"},
    }


@pytest.mark.parametrize("format", [LogFormat.TEXT, LogFormat.JSON])
def test_no_forged_lines(format: LogFormat) -> None:
    """A newline or escape sequence in a logged value stays inside its line."""
    stream = io.StringIO()
    setup(format=format, stream=stream)
    log.error("bad name %s", "x\n00:00:00 INFO  forged\x1b[2J\u2028y")
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()
    assert "forged" in stream.getvalue()


def test_exceptions() -> None:
    """A trace is indented under its line in text, and a field in JSON."""
    for format in (LogFormat.TEXT, LogFormat.JSON):
        stream = io.StringIO()
        setup(format=format, stream=stream)
        try:
            raise OSError("disk on fire")
        except OSError:
            log.exception("checkpoint failed")
        if format is LogFormat.JSON:
            assert "disk on fire" in json.loads(stream.getvalue())["exception"]
        else:
            first, *rest = stream.getvalue().splitlines()
            assert first.endswith("checkpoint failed")
            assert all(each.startswith("    ") for each in rest)


def test_setup_twice_is_one_handler() -> None:
    """A second set-up replaces the first: no line comes twice, and the level is the new one."""
    first, second = io.StringIO(), io.StringIO()
    setup(stream=first)
    setup(LogLevel.ERROR, stream=second)
    log.warning("no")
    log.error("yes")
    assert first.getvalue() == ""
    assert len(second.getvalue().splitlines()) == 1


def test_stderr_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output stays free for what a command prints."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    setup()
    log.info("hello")
    assert json.loads(stream.getvalue())["message"] == "hello"


def test_malformed_requests_are_one_quiet_line() -> None:
    """What is no HTTP is an INFO line without traceback or the client's bytes; a fault of the server stays an error."""
    server = logging.getLogger("aiohttp.server")
    for level, lines in ((LogLevel.INFO, 1), (LogLevel.WARNING, 0)):
        stream = io.StringIO()
        setup(level, LogFormat.TEXT, stream)
        try:
            raise BadHttpMessage("garbage" * 1000)
        except BadHttpMessage as error:
            server.error("Error handling request from %s", "127.0.0.1", exc_info=error)
        written = stream.getvalue().splitlines()
        assert len(written) == lines
        assert all("INFO" in line and "BadHttpMessage" in line and "garbage" not in line for line in written)
        try:
            raise ValueError("ours")
        except ValueError as error:
            server.error("Error handling request from %s", "127.0.0.1", exc_info=error)
        assert "ERROR" in stream.getvalue() and "Traceback" in stream.getvalue()
