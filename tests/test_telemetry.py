"""Logs as an operator reads them: the stderr of a real process, line by line."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from typing import Any

import pytest

from sequoia.telemetry import configure_logging

PROGRAM = """
import logging, warnings
from pathlib import Path
from sequoia.request_scope import request_scope
from sequoia.telemetry import configure_logging
configure_logging("coordinator", "info")
log = logging.getLogger("coordinator.session")
log.debug("unseen")
log.info("request %s", "finished", extra={"request_id": "r1", "num_tokens": 3, "path": Path("a")})
try:
    1 / 0
except ZeroDivisionError:
    log.exception("two\\nlines")
warnings.warn("old")
with request_scope([("x-request-id", "r2"), ("traceparent", f"00-{'1' * 32}-{'2' * 16}-01")]):
    log.info("within")
"""


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_each_event_is_one_json_line(lines: list[dict[str, Any]]) -> None:
    assert [line["level"] for line in lines] == ["info", "error", "warning", "info"]


def test_line_carries_the_extra_fields_and_no_others(lines: list[dict[str, Any]]) -> None:
    line = lines[0]
    assert datetime.fromisoformat(line.pop("time")).utcoffset() is not None
    assert line == {
        "level": "info",
        "process": "coordinator",
        "logger": "coordinator.session",
        "event": "request finished",
        "request_id": "r1",
        "num_tokens": 3,
        "path": "a",
    }


def test_line_carries_the_traceback(lines: list[dict[str, Any]]) -> None:
    assert lines[1]["event"] == "two\nlines"
    assert lines[1]["exception"].endswith("ZeroDivisionError: division by zero")


def test_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="LOUD"):
        configure_logging("coordinator", "loud")


def test_line_of_a_request_has_its_id_and_its_trace(lines: list[dict[str, Any]]) -> None:
    assert (lines[3]["request_id"], lines[3]["trace_id"]) == ("r2", "1" * 32)
    assert "request_id" not in lines[2]
