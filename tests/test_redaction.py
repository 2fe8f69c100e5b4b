"""Secrets in URLs and headers: hidden wherever text leaves a process. And Redis: what is refused of its URLs."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.clients_file import digest_of, read_clients
from sequoia.config import fail
from sequoia.errors import InvalidArgument
from sequoia.redaction import redacted
from sequoia.redis_connection import check_redis, connect
from sequoia.telemetry import configure_logging
from sequoia.tls import Tls

PASSWORD = "s3cret"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"redis://:{PASSWORD}@host:6379/0", "redis://:***@host:6379/0"),
        (f"rediss://ann:{PASSWORD}@host/0?x=1", "rediss://ann:***@host/0?x=1"),
        (
            f"at rediss://ann:{PASSWORD}@p@host/0, 'redis://b:{PASSWORD}@h'",
            "at rediss://ann:***@host/0, 'redis://b:***@h'",
        ),
        (f"rediss://host/0?password={PASSWORD}&db=1", "rediss://host/0?password=***&db=1"),
        (f"rediss://host/0?ssl_password={PASSWORD}", "rediss://host/0?ssl_password=***"),
        (f"authorization: Bearer {PASSWORD}", "authorization: Bearer ***"),
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("http://127.0.0.1:8000/v1 and a@b.example", "http://127.0.0.1:8000/v1 and a@b.example"),
    ],
)
def test_passwords_and_tokens_are_hidden_and_all_else_is_not(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_a_log_line_hides_them_wherever_they_stand_and_is_json_still(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers, root.level
    try:
        configure_logging("test", "info")
        stream = io.StringIO()
        root.handlers[0].setStream(stream)  # type: ignore[attr-defined]
        url = f"redis://ann:{PASSWORD}@host/0"
        try:
            raise ValueError(url)
        except ValueError:
            logging.getLogger("any").exception("at %s", url, extra={"reason": url, "other": {"deep": [url]}})
    finally:
        root.handlers, root.level = before
    line = json.loads(stream.getvalue())
    assert PASSWORD not in stream.getvalue()
    assert line["event"] == "at redis://ann:***@host/0"
    assert line["other"] == {"deep": ["redis://ann:***@host/0"]}
    assert "ValueError: redis://ann:***@host/0" in line["exception"]


def test_the_last_line_of_a_process_hides_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fail(f"redis://ann:{PASSWORD}@host is wrong")
    assert capsys.readouterr().err == "error: redis://ann:***@host is wrong\n"


def test_what_is_no_redis_url_is_told_without_its_password() -> None:
    with pytest.raises(InvalidArgument, match=r"redis: 'nonsense://ann:\*\*\*@host' is no Redis URL") as caught:
        connect(f"nonsense://ann:{PASSWORD}@host")
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:6379/0",
        "redis://localhost",
        "redis:///0",
        "redis://[::1]:6379",
        "unix:///run/redis.sock",
        "rediss://ann:x@redis.example:6380/0?ssl_ca_certs=/ca.pem",
        "rediss://redis.example",
    ],
)
def test_redis_on_this_machine_or_with_tls_is_fine(url: str) -> None:
    check_redis(url, Tls())


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        (f"redis://ann:{PASSWORD}@redis.example:6379/0", "give a rediss:// URL, or --insecure"),
        ("redis://192.0.2.1", "give a rediss:// URL, or --insecure"),
        (
            f"rediss://ann:{PASSWORD}@redis.example/0?ssl_cert_reqs=none",
            "give ssl_ca_certs=FILE instead, or --insecure",
        ),
        ("rediss://redis.example/0?ssl_check_hostname=false", "give ssl_ca_certs=FILE instead, or --insecure"),
    ],
)
def test_redis_elsewhere_in_plain_text_or_unchecked_is_refused(
    url: str, remedy: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_redis(url, Tls())
    assert remedy in str(caught.value)
    check_redis(url, Tls(insecure=True))
    assert PASSWORD not in str(caught.value) + caplog.text
    assert caplog.text.count("as --insecure allows") <= 1


def test_tls_to_redis_checks_certificate_and_host() -> None:
    options = connect("rediss://redis.example").connection_pool.connection_kwargs
    assert (options["ssl_cert_reqs"], options["ssl_check_hostname"]) == ("required", True)


def test_a_token_is_made_told_once_and_let_in_by_its_digest(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; from sequoia.cli import main; sys.exit(main())", "token"]
    lines = [
        subprocess.run([*command, *each], capture_output=True, text=True, check=True, timeout=60)
        for each in (["ann", "--out", str(tmp_path / "token")], ["ben"])
    ]
    (tmp_path / "clients.toml").write_text("".join(each.stdout for each in lines))
    ann, ben = read_clients(tmp_path / "clients.toml")
    token = (tmp_path / "token").read_text().strip()
    assert (ann.name, ann.token_sha256) == ("ann", (digest_of(token),))
    assert ben.token_sha256 == (digest_of(lines[1].stderr.split()[-1]),)
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    assert lines[0].stderr == ""
    again = subprocess.run([*command, "ann", "--out", str(tmp_path / "token")], capture_output=True, check=False)
    assert again.returncode == 2, "a token that is there is not overwritten"
