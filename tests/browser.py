"""A headless Chromium, driven over the WebDriver protocol."""

from __future__ import annotations

import base64
import http.client
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,800",
)
_STARTED = "was started successfully on port "

needs_chromium = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="chromium and chromedriver are not installed",
)


class Browser:
    """One window."""

    def __init__(self, port: int, profile: Path) -> None:
        self._port, self._session = port, ""
        options = {"args": [*_FLAGS, f"--user-data-dir={profile}"], "binary": shutil.which("chromium")}
        logs = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        opened = self._call("POST", "/session", {"capabilities": {"alwaysMatch": logs}})
        self._session = f"/session/{opened['sessionId']}"

    def open(self, url: str) -> None:
        """Go to a page, and wait until it is loaded."""
        self._call("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str) -> Any:
        """What a script returns in the page."""
        return self._call("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def wait_for(self, condition: str, seconds: float = 30) -> None:
        """Until an expression is true in the page. Raises AssertionError where it does not become so."""
        deadline = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < deadline, (condition, self.errors())

    def errors(self) -> list[Any]:
        """What the page complained of: faults of its scripts, resources that it did not get."""
        found: list[Any] = self._call("POST", f"{self._session}/se/log", {"type": "browser"})
        return found

    def screenshot(self, file: Path) -> None:
        """A PNG of what is seen."""
        file.write_bytes(base64.b64decode(self._call("GET", f"{self._session}/screenshot")))

    def close(self) -> None:
        """End it."""
        self._call("DELETE", self._session)

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        connection.request(method, path, None if body is None else json.dumps(body))
        value = json.loads(connection.getresponse().read())["value"]
        assert not (isinstance(value, dict) and "error" in value), value
        return value


@contextmanager
def headless_chromium(profile: Path) -> Iterator[Browser]:
    """A browser with a new profile, until the end."""
    command = ["chromedriver", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        try:
            assert driver.stdout is not None
            started = next(line for line in driver.stdout if _STARTED in line)
            browser = Browser(int(started.partition(_STARTED)[2].strip().rstrip(".")), profile)
            yield browser
            browser.close()
        finally:
            driver.terminate()
