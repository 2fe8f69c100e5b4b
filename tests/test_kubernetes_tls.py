"""The components tls and clients: nothing is plain, every file is mounted, one certificate does for all names."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from certificates import Authority
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kustomize import Resource, pods
from manifests import DEPLOY, SECURED, VARIANTS, WORKLOADS, Process, named, processes, rendered
from prometheus_client import CollectorRegistry
from redis.backoff import ConstantBackoff
from redis.exceptions import AuthenticationError, ConnectionError
from redis.retry import Retry

from coordinator.clients_file import read_clients
from coordinator.metrics import serve_metrics
from sequoia.cli.redis import _find_binary
from sequoia.redis_connection import connect
from sequoia.rpc import Server, open_channel
from sequoia.tls import Tls

TLS_FOLDER = "/etc/sequoia/tls"
FILES = Tls(f"{TLS_FOLDER}/tls.crt", f"{TLS_FOLDER}/tls.key", f"{TLS_FOLDER}/ca.crt")
# What docs/kubernetes.md tells to put into each.
PAGE = (DEPLOY.parent / "docs" / "kubernetes.md").read_text()
SECRETS = {
    name: set(re.findall(r"--from-file=(?:([\w.]+)=)?([\w./]+)", command))
    for name, command in re.findall(r"create secret generic (\S+)((?: \\\n|[^\n])*)", PAGE)
}
_TEXT, _TEXTS = {"type": "string"}, {"type": "array", "items": {"type": "string"}}
# Of cert-manager's own schemas as much as we use.
CERT_MANAGER_SPECS: dict[str, dict[str, Any]] = {
    "Issuer": {
        "properties": {
            "selfSigned": {"type": "object", "additionalProperties": False},
            "ca": {"required": ["secretName"], "properties": {"secretName": _TEXT}, "additionalProperties": False},
        },
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": False,
    },
    "Certificate": {
        "required": ["secretName", "issuerRef", "commonName"],
        "properties": {
            **dict.fromkeys(("secretName", "commonName", "duration", "renewBefore"), _TEXT),
            "isCA": {"type": "boolean"},
            "dnsNames": _TEXTS,
            "usages": {"type": "array", "items": {"enum": ["server auth", "client auth"]}},
            "privateKey": {
                "properties": {
                    "algorithm": {"enum": ["RSA", "ECDSA", "Ed25519"]},
                    "size": {"enum": [256, 384, 521]},
                    "encoding": {"enum": ["PKCS1", "PKCS8"]},
                    "rotationPolicy": {"enum": ["Never", "Always"]},
                },
                "additionalProperties": False,
            },
            "issuerRef": {
                "required": ["name", "kind"],
                "properties": {"name": _TEXT, "kind": {"const": "Issuer"}},
                "additionalProperties": False,
            },
        },
        "additionalProperties": False,
    },
}


@pytest.fixture(params=SECURED)
def resources(request: pytest.FixtureRequest) -> list[Resource]:
    return rendered(request.param)


def certificates() -> list[Resource]:
    return list(yaml.safe_load_all((DEPLOY / "k8s" / "components" / "tls" / "certificate.yaml").read_text()))


def names() -> list[str]:
    """Of the one certificate."""
    found: list[str] = named(certificates(), "Certificate")["sequoia-tls"]["spec"]["dnsNames"]
    return found


def containers(resources: list[Resource]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """With the pods that they are in."""
    for resource in resources:
        if resource["kind"] in WORKLOADS:
            [pod] = pods(resource)
            yield from ((pod, each) for each in pod["containers"])


def probes(container: dict[str, Any]) -> list[dict[str, Any]]:
    return [container[kind] for kind in ("startupProbe", "readinessProbe", "livenessProbe") if kind in container]


def process(resources: list[Resource], name: str) -> Process:
    [found] = [each for each in processes(resources) if each.name == name]
    return found


def test_every_process_has_the_certificate_and_none_may_be_plain(resources: list[Resource]) -> None:
    for each in processes(resources):
        assert each.tls == FILES, each.name
        each.check_plain_text()
        if each.redis:
            assert each.redis == f"rediss://:a-secret@sequoia-redis:6379/0?ssl_ca_certs={FILES.ca}"


def test_nobody_is_asked_in_plain_text(resources: list[Resource]) -> None:
    for _, container in containers(resources):
        for probe in probes(container):
            assert "grpc" not in probe, "Kubernetes speaks no TLS there"
            assert probe.get("httpGet", {}).get("scheme", "HTTPS") == "HTTPS"
    told = {port.get("appProtocol") for each in named(resources, "Service").values() for port in each["spec"]["ports"]}
    assert told == {"https", None}, "of metrics and Redis nothing is told"


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_file_that_is_named_is_one_of_a_mounted_secret(variant: str) -> None:
    for pod, container in containers(rendered(variant)):
        mounts = {each["mountPath"]: each for each in container.get("volumeMounts", ())}
        for path in set(re.findall(r"/etc/sequoia/[\w./-]+\.?\w+", json.dumps({**container, "volumeMounts": []}))):
            folder, _, key = path.rpartition("/")
            [volume] = [each for each in pod["volumes"] if each["name"] == mounts[folder]["name"]]
            assert mounts[folder]["readOnly"] is True
            assert volume["secret"]["defaultMode"] == 0o440
            assert key in {each for told in SECRETS[volume["secret"]["secretName"]] for each in told}, path
            if volume["secret"]["secretName"] == "sequoia-clients":
                assert volume["secret"]["items"] == [{"key": key, "path": key}], "nobody gets another one's token"


def test_the_documented_secrets_are_those_of_the_manifests() -> None:
    asked = {
        volume["secret"]["secretName"]
        for variant in VARIANTS
        for pod, _ in containers(rendered(variant))
        for volume in pod.get("volumes", ())
        if "secret" in volume
    }
    assert asked == {"sequoia-tls", "sequoia-clients", "sequoia-api-keys"}
    assert asked <= set(SECRETS)


def test_the_one_certificate_is_for_every_name_that_is_asked(resources: list[Resource]) -> None:
    assert sorted(names()) == sorted({*named(resources, "Service"), "localhost"})
    asked = {host for each in processes(resources) for host, _ in each.addresses}
    for _, container in containers(resources):
        for probe in probes(container):
            words = " ".join(probe.get("exec", {}).get("command", ()))
            asked |= set(re.findall(r"(?:-h |health )(\w+)", words))
    for monitor in named(resources, "ServiceMonitor").values():
        asked |= {each["tlsConfig"]["serverName"] for each in monitor["spec"]["endpoints"]}
    assert asked == set(names()) - {"sequoia-gateway"}


def test_the_certificate_of_cert_manager_is_the_secret_that_is_mounted() -> None:
    for each in certificates():
        assert each["apiVersion"] == "cert-manager.io/v1"
        jsonschema.validate(each["spec"], CERT_MANAGER_SPECS[each["kind"]])
    found = named(certificates(), "Certificate")
    assert found["sequoia-tls"]["spec"]["secretName"] == "sequoia-tls"
    assert set(found["sequoia-tls"]["spec"]["usages"]) == {"server auth", "client auth"}, "each is both"
    issuers = named(certificates(), "Issuer")
    assert {each["spec"]["issuerRef"]["name"] for each in found.values()} == set(issuers)
    assert issuers["sequoia-ca"]["spec"]["ca"]["secretName"] == found["sequoia-ca"]["spec"]["secretName"]


_STUBS = {
    # Whether the files are there that the Secrets are made of.
    "kubectl": 'for word; do case $word in --from-file=*) test -s "${word#*=}";; esac; done',
    "kustomize": "test -f kustomization.yaml",
    "sequoia": f'exec "{sys.executable}" -c "import sys; from sequoia.cli import main; sys.exit(main())" "$@"',
}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates, and is not installed")
async def test_the_documented_commands_make_certificates_and_clients_that_do(tmp_path: Path) -> None:
    [block] = [each for each in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) if "openssl req" in each]
    (tmp_path / "bin").mkdir()
    for name, script in _STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\nset -eu\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    overlay = tmp_path / "deploy" / "k8s" / "overlays" / "gpu"
    overlay.mkdir(parents=True)
    (overlay / "kustomization.yaml").touch()
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
    await asyncio.to_thread(
        subprocess.run, ["sh", "-eu", "-c", block], cwd=tmp_path, env=environment, check=True, timeout=60
    )
    assert [each.name for each in read_clients(tmp_path / "clients.toml")] == ["gateway", "planner", "loadtest"]
    server = Server("127.0.0.1:0", files(tmp_path))
    address = await server.start([])
    for name in names():
        async with open_channel(address, files(tmp_path), server_name=name) as channel:
            found = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert found.status == health_pb2.HealthCheckResponse.SERVING, name
    await server.stop(0)


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    """The Secret, of another authority than anybody else's."""
    pair = Authority(tmp_path, "ca").issue("tls", *names())
    folder = tmp_path / "mounted"
    folder.mkdir()
    for name, path in (("tls.crt", pair.cert), ("tls.key", pair.key), ("ca.crt", tmp_path / "ca.pem")):
        shutil.copy(path, folder / name)
    return folder


def files(mounted: Path) -> Tls:
    return Tls(*(str(mounted / name) for name in ("tls.crt", "tls.key", "ca.crt")))


@pytest.mark.parametrize("name", ["worker", "coordinator"])
async def test_a_probe_reaches_a_server_that_wants_a_certificate(mounted: Path, name: str) -> None:
    resources = rendered(SECURED[0])
    container = next(each for _, each in containers(resources) if each["name"] == name)
    environment = next(each for each in processes(resources) if each.name == name).environment
    server = Server("127.0.0.1:0", files(mounted))
    port = (await server.start(["sequoia.v1.VerifyService"])).rpartition(":")[2]
    [command] = {tuple(each["exec"]["command"]) for each in probes(container)}
    own = {key: value.replace(TLS_FOLDER, str(mounted)) for key, value in environment.items()}
    ask = [sys.executable, *command[1:3], re.sub(r"\d+$", port, command[3])]
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    asked = await asyncio.to_thread(subprocess.run, ask, env={**own, **path}, timeout=60, check=False)
    await server.stop(0)
    assert asked.returncode == 0


def test_what_prometheus_is_told_changes_by_tls_alone_and_is_what_the_coordinator_wants(mounted: Path) -> None:
    [plain], [endpoint] = (
        named(rendered(variant), "ServiceMonitor")["sequoia-coordinator"]["spec"]["endpoints"]
        for variant in ("gpu", "gpu+tls")
    )
    tls = endpoint["tlsConfig"]
    assert endpoint == {**plain, "scheme": "https", "tlsConfig": tls}
    keys = {name: tls[name].get("secret", tls[name]) for name in ("ca", "cert", "keySecret")}
    assert {each["name"] for each in keys.values()} == {"sequoia-tls"}
    context = ssl.create_default_context(cafile=mounted / keys["ca"]["key"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve_metrics(CollectorRegistry(), port, files(mounted))
    assert scraped(port, context, tls["serverName"]) == b"", "it wants a certificate"
    context.load_cert_chain(mounted / keys["cert"]["key"], mounted / keys["keySecret"]["key"])
    assert scraped(port, context, tls["serverName"]).startswith(b"HTTP/1.0 200 OK")


def scraped(port: int, context: ssl.SSLContext, name: str) -> bytes:
    """Nothing where the connection is refused: with TLS 1.3 that is told, or not, behind the handshake."""
    with (
        suppress(ssl.SSLError, ConnectionResetError, BrokenPipeError),
        socket.create_connection(("127.0.0.1", port), timeout=10) as connection,
        context.wrap_socket(connection, server_hostname=name) as secured,
    ):
        secured.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        return secured.recv(4096)
    return b""


def redis(variant: str) -> dict[str, Any]:
    [container] = [each for _, each in containers(rendered(variant)) if each["name"] == "redis"]
    return container


def test_redis_is_the_same_but_for_tls() -> None:
    (plain,), (secured,) = (redis(variant)["args"] for variant in ("cpu-dev", "cpu-dev+tls"))
    lines = [line for line in secured.splitlines() if "tls" not in line and line != "port 0"]
    assert lines == plain.splitlines()
    assert {"port 0", "tls-port 6379"} <= set(secured.splitlines())


def redis_command(folder: Path, mounted: Path, server: str, port: int) -> list[str]:
    """The container's own, with the files and the port of here."""
    (folder / "valkey-server").symlink_to(server)
    [script] = redis("cpu-dev+tls")["args"]
    script = script.replace("/data", str(folder)).replace(TLS_FOLDER, str(mounted))
    return [*redis("cpu-dev+tls")["command"], script.replace("tls-port 6379", f"tls-port {port}\nbind 127.0.0.1")]


def test_redis_knows_every_line_of_its_configuration(tmp_path: Path, mounted: Path) -> None:
    """The packaged server has no TLS: it reads all, and then says so."""
    command = redis_command(tmp_path, mounted, _find_binary(), 20_000)
    environment = {"PATH": f"{tmp_path}:/bin:/usr/bin", "REDIS_PASSWORD": "a-secret"}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=False)
    assert "Configuration loaded" in told.stdout
    assert "FATAL CONFIG FILE ERROR" not in told.stdout + told.stderr


SERVER, CLIENT = (
    next(filter(None, (shutil.which(f"{kind}-{part}") for kind in ("valkey", "redis"))), "")
    for part in ("server", "cli")
)


@contextmanager
def running(command: list[str], environment: dict[str, str]) -> Iterator[None]:
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as server:
        try:
            yield
        finally:
            server.terminate()
            server.wait(20)


@pytest.mark.skipif(not (SERVER and CLIENT), reason="there is no valkey-server or redis-server, which have TLS")
async def test_redis_serves_tls_alone_and_its_probe_reaches_it(tmp_path: Path, mounted: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = redis_command(tmp_path, mounted, SERVER, port)
    (tmp_path / "valkey-cli").symlink_to(CLIENT)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "REDIS_PASSWORD": "a-secret"}
    url = process(rendered(SECURED[0]), "coordinator").redis
    url = url.replace(TLS_FOLDER, str(mounted)).replace("sequoia-redis:6379", f"localhost:{port}")
    [probe] = {tuple(each["exec"]["command"]) for each in probes(redis("cpu-dev+tls"))}
    ask = [*probe[:2], probe[2].replace(TLS_FOLDER, str(mounted)).replace("valkey-cli", f"valkey-cli -p {port}")]
    Authority(tmp_path, "other")
    with running(command, environment):
        client = connect(url)
        client.set_retry(Retry(ConstantBackoff(0.1), 100))
        assert await client.ping()
        for wrong, error in (
            (url.replace("a-secret", "another"), AuthenticationError),
            (url.replace("rediss", "redis").partition("?")[0], ConnectionError),
            (url.replace(str(mounted / "ca.crt"), str(tmp_path / "other.pem")), ConnectionError),
            (url.replace("localhost", "127.0.0.1"), ConnectionError),
        ):
            with pytest.raises(error):
                await connect(wrong).ping()
        assert await asyncio.to_thread(subprocess.call, ask, env=environment) == 0
        await client.aclose()
    assert await asyncio.to_thread(subprocess.call, ask, env=environment) != 0


def test_coordinators_know_their_clients_and_each_client_has_its_token() -> None:
    for variant in (each for each in VARIANTS if "clients" in each):
        resources = rendered(variant)
        assert process(resources, "coordinator").settings().clients == "/etc/sequoia/clients/clients.toml"
        told = {each.name: each.environment.get("SEQUOIA_TOKEN_FILE") for each in processes(resources)}
        asking = {name for name, path in told.items() if path == f"/etc/sequoia/clients/{name}.token"}
        assert asking == {name for name, path in told.items() if path} == {"gateway", "planner", "loadtest"}
        assert process(resources, "gateway").settings().api_keys, "without them a gateway shows the clients' own"
