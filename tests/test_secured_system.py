"""The whole system with TLS between all processes, clients with limits, a Redis with a password; and what it writes."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from certificates import Authority
from cluster import MODULES
from guarded import entry
from redis import Redis
from tiny_models import write_tiny_pair
from tls_proxy import TlsProxy

from sequoia.cli.process import ServerProcess, stop, wait_until_serving
from sequoia.cli.redis import EmbeddedRedis
from sequoia.client import Client
from sequoia.errors import PermissionDenied, Unauthenticated, Unavailable

TOKEN, PLANNER, PASSWORD = "sq-secret-of-ann", "sq-secret-of-the-planner", "secret-of-redis"
SECRETS = (TOKEN, PLANNER, PASSWORD)
pytestmark = pytest.mark.slow


class Secured:
    """A context manager: a certificate for each process, all of one authority."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, ExitStack()
        self.authority = Authority(folder)
        self.processes: dict[str, ServerProcess] = {}
        self.output = ""  # of commands

    def __enter__(self) -> Secured:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        models = write_tiny_pair(self._folder)
        self.redis_url = self._start_redis()
        self._stack.callback(lambda: stop(list(self.processes.values())))
        (self._folder / "clients.toml").write_text(
            entry("ann", TOKEN, max_tokens=20, requests_per_minute=1000) + entry("planner", PLANNER)
        )
        common = {"dtype": "float32", "num-threads": 1}
        for name, model in models.items():
            self.start(name, {"model": model, **common})
        self.serving(*models)
        workers = {name: self.processes[name].address for name in models}
        flags = {"clients": self._folder / "clients.toml", "client-certificates": "none", "log-level": "debug"}
        self.start("coordinator", {**workers, **flags}, {"SEQUOIA_REDIS": self.redis_url})
        self.serving("coordinator")

    def _start_redis(self) -> str:
        """One with a user and a password, behind TLS."""
        redis = self._stack.enter_context(EmbeddedRedis())
        with Redis(port=redis.port) as admin:
            admin.acl_setuser(
                "sequoia", enabled=True, passwords=[f"+{PASSWORD}"], keys="*", channels="*", commands=["+@all"]
            )
            admin.acl_setuser("default", enabled=False)
        server = self.authority.issue("redis", "127.0.0.1")
        proxy = self._stack.enter_context(TlsProxy(server, redis.port))
        return f"rediss://sequoia:{PASSWORD}@127.0.0.1:{proxy.port}/0?ssl_ca_certs={self.authority.path}"

    def start(self, name: str, flags: Mapping[str, object], variables: Mapping[str, str] | None = None) -> None:
        pair = self.authority.issue(name, "127.0.0.1", f"{name}.example")
        own = {"listen": "127.0.0.1:0", "tls-cert": pair.cert, "tls-key": pair.key, "tls-ca": self.authority.path}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(variables or {})}
        process = ServerProcess(name, MODULES[name], {**own, **flags}, environment, self._folder)
        self.processes[name] = process

    def serving(self, *names: str) -> None:
        list(wait_until_serving([self.processes[name] for name in names]))

    @property
    def address(self) -> str:
        return self.processes["coordinator"].address

    def client(self, token: str = TOKEN) -> Client:
        return Client(self.address, timeout_seconds=60, tls_ca=self.authority.path, token=token)

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command of `sequoia`, whose settings come from the environment."""
        environment = {
            **os.environ,
            "SEQUOIA_TLS_CA": self.authority.path,
            "SEQUOIA_ADDRESS": self.address,
            **variables,
        }
        program = "import sys; from sequoia.cli import main; sys.exit(main())"
        call = [sys.executable, "-c", program, *command]
        done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=False, env=environment)
        self.output += done.stdout + done.stderr
        return done

    def logs(self) -> dict[str, str]:
        return {name: process.log_path.read_text() for name, process in self.processes.items()}


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    with Secured(tmp_path_factory.mktemp("secured")) as secured:
        yield secured


def test_a_client_with_a_token_is_answered_with_the_help_of_both_workers(secured: Secured) -> None:
    with secured.client() as client:
        answer = client.generate("A tree has one root", max_tokens=16, temperature=0, speculation="tree")
    assert answer.usage.num_completion_tokens == 16
    assert answer.speculation.num_drafted_steps > 0
    assert '"client": "ann"' in secured.logs()["coordinator"]


def test_who_is_none_of_the_clients_is_not(secured: Secured) -> None:
    for token, error in (("sq-secret-of-eve", Unauthenticated), ("", Unauthenticated)):
        with secured.client(token) as client, pytest.raises(error):
            client.describe_pair()
    with Client(secured.address) as client, pytest.raises(Unavailable):
        client.describe_pair()


def test_limits_hold(secured: Secured) -> None:
    with secured.client() as client:
        with pytest.raises(PermissionDenied, match="max_tokens: is 21; you may ask for 20"):
            client.generate("A tree", max_tokens=21)
        assert client.generate("A tree", temperature=0, ignore_eos=True).usage.num_completion_tokens == 20


def test_a_worker_talks_to_nobody_without_a_certificate(secured: Secured) -> None:
    worker = secured.processes["verify"].address
    for access in ({"tls_ca": secured.authority.path}, {}):
        with Client(worker, **access) as client, pytest.raises(Unavailable):  # type: ignore[arg-type]
            client.describe_pair()


def test_the_planner_plans_through_tls_and_the_coordinator_finds_its_plan(secured: Secured) -> None:
    done = secured.run("plan", "--json", SEQUOIA_REDIS=secured.redis_url, SEQUOIA_TOKEN=PLANNER)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    with secured.client(PLANNER) as client:
        client.generate("A tree", max_tokens=4, temperature=0)
        assert "new tree plan" in wait_for(secured, "new tree plan")


def wait_for(secured: Secured, event: str) -> str:
    """The coordinator's log, when it has that, or after a while."""
    deadline = time.monotonic() + 30
    while event not in (log := secured.logs()["coordinator"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return log


def test_generate_takes_its_access_from_the_environment_or_from_files(secured: Secured, tmp_path: Path) -> None:
    done = secured.run("generate", "Hello", "--raw", "--max-tokens", "4", SEQUOIA_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    (tmp_path / "token").write_text(TOKEN)
    done = secured.run("generate", "Hello", "--raw", "--max-tokens", "4", "--token-file", str(tmp_path / "token"))
    assert done.returncode == 0, done.stderr
    done = secured.run("generate", "Hello", "--raw")
    assert (done.returncode, done.stderr) == (1, "error: token: is missing\n")


def test_a_wrong_password_of_redis_is_told_and_not_repeated(secured: Secured) -> None:
    wrong = secured.redis_url.replace(PASSWORD, "another-" + PASSWORD)
    for url in (wrong, f"redis://sequoia:{PASSWORD}@192.0.2.1:6379/0", f"nonsense://x:{PASSWORD}@127.0.0.1/0"):
        done = secured.run("plan", SEQUOIA_REDIS=url, SEQUOIA_TOKEN=PLANNER)
        assert done.returncode in (1, 2)
        assert PASSWORD not in done.stdout + done.stderr


def test_no_secret_is_in_anything_that_was_written(secured: Secured) -> None:
    """The last test here: every process has served, failed to, and been asked with what is wrong."""
    written = {**secured.logs(), "commands": secured.output}
    for name, text in written.items():
        for secret in SECRETS:
            for shape in (secret, base64.b64encode(secret.encode()).decode()):
                assert shape not in text, f"{name} tells a secret"
    command_lines = [Path(f"/proc/{each.pid}/cmdline").read_text() for each in secured.processes.values()]
    assert not any(secret in line for secret in SECRETS for line in command_lines)
    assert all(written[name] for name in ("coordinator", "commands"))
