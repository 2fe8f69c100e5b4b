"""The gateway's process before a coordinator that follows a script: every failure, keys, TLS, origins, its end."""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_type_hints

import grpc
import openai
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from openai import OpenAI
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from coordinator.gateway.failures import STATUS_BY_CODE
from coordinator.gateway.fields import HONOURED, LABELS, REFUSED, table
from coordinator.gateway.keys import ApiKeys
from sequoia.cli.process import ServerProcess, wait_until_serving
from sequoia.errors import ERROR_BY_CODE, InvalidArgument
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1 import coordinator_pb2_grpc, worker_pb2

ROOT = Path(__file__).parent.parent
KEY = "sk-of-ann"
FINISH = pb.Finish(reason=pb.FINISH_REASON_STOP, num_completion_tokens=2)


class ScriptedCoordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """The prompt is the script: the name of a status, `late STATUS` to fail behind a piece, `wait`, or any text."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()

    def DescribePair(self, request: pb.DescribePairRequest, context: grpc.ServicerContext) -> pb.DescribePairResponse:
        return pb.DescribePairResponse(verify=worker_pb2.WorkerDescription(model="big", context_length=99))

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        name = request.text.removeprefix("late ")
        if request.text.isupper():
            raise_status(context, name)
        yield pb.GenerateResponse(num_prompt_tokens=3, text="Hel", token_ids=[5])
        if request.text == "wait":
            self.may_go_on.wait(20)
        if name != request.text:
            raise_status(context, name)
        yield pb.GenerateResponse(text="lo", token_ids=[6], num_tokens_before=1, finish=FINISH)


def raise_status(context: grpc.ServicerContext, name: str) -> None:
    code = grpc.StatusCode[name]
    retry, detail = error_details_pb2.RetryInfo(), any_pb2.Any()
    retry.retry_delay.FromNanoseconds(1_500_000_000)
    detail.Pack(retry)
    status = status_pb2.Status(code=code.value[0], message=f"told {name}", details=[detail])
    context.abort_with_status(rpc_status.to_status(status))


@pytest.fixture(scope="module")
def coordinator() -> ScriptedCoordinator:
    return ScriptedCoordinator()


@pytest.fixture(scope="module")
def address(coordinator: ScriptedCoordinator) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(8))
    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(coordinator, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0)


@contextmanager
def gateway(address: str, log_dir: Path, *switches: str, **flags: object) -> Iterator[ServerProcess]:
    """A gateway's process; `address` of it is a URL."""
    named = {name.replace("_", "-"): value for name, value in flags.items()}
    own = {"address": address, "listen": "127.0.0.1:0", **named}
    environment = {"PATH": "/usr/bin:/bin"} | {f"SEQUOIA_{each[2:].upper()}": "yes" for each in switches}
    process = ServerProcess("gateway", "coordinator.gateway", own, environment, log_dir)
    try:
        list(wait_until_serving([process]))
        yield process
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def plain(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with gateway(address, tmp_path_factory.mktemp("plain"), request_timeout_seconds=1) as process:
        yield process


@pytest.fixture(scope="module")
def guarded(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """With keys, other names, and origins that may ask."""
    folder = tmp_path_factory.mktemp("guarded")
    keys = folder / "keys"
    keys.write_text(f"# who may ask\nann:{hashlib.sha256(KEY.encode()).hexdigest()}\n\n{'0' * 64}\n")
    names = {"model_names": "gpt-4o, other", "cors_origins": "https://page.example"}
    with gateway(address, folder, api_keys=keys, **names) as process:
        yield process


def client_of(process: ServerProcess, key: str = "none", **options: Any) -> OpenAI:
    return OpenAI(base_url=f"{process.address}/v1", api_key=key, max_retries=0, timeout=20, **options)


def complete(client: OpenAI, prompt: str, **options: Any) -> Any:
    return client.completions.create(model="big", prompt=prompt, **options)


@pytest.mark.parametrize(
    ("name", "status", "error"),
    [
        ("INVALID_ARGUMENT", 400, openai.BadRequestError),
        ("RESOURCE_EXHAUSTED", 429, openai.RateLimitError),
        ("INTERNAL", 500, openai.InternalServerError),
        ("UNKNOWN", 500, openai.InternalServerError),
        ("UNAVAILABLE", 503, openai.InternalServerError),
        ("FAILED_PRECONDITION", 503, openai.InternalServerError),
        ("DEADLINE_EXCEEDED", 504, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("streams", [True, False])
def test_a_status_of_the_coordinator_is_one_of_http(
    plain: ServerProcess, name: str, status: int, error: type[openai.APIStatusError], streams: bool
) -> None:
    with client_of(plain) as client, pytest.raises(error) as raised:
        complete(client, name, stream=streams)
    assert raised.value.status_code == status
    assert str(raised.value.request_id) in plain.log_path.read_text()
    assert f"told {name}" in raised.value.message


def test_every_error_has_a_status_of_http() -> None:
    assert ERROR_BY_CODE.keys() <= STATUS_BY_CODE.keys()


def test_who_is_to_come_again_is_told_when(plain: ServerProcess) -> None:
    with client_of(plain) as client, pytest.raises(openai.RateLimitError) as raised:
        complete(client, "RESOURCE_EXHAUSTED")
    assert raised.value.response.headers["retry-after"] == "2"
    assert raised.value.code == "rate_limit_exceeded"


def test_an_answer_that_takes_too_long_is_ended(plain: ServerProcess, coordinator: ScriptedCoordinator) -> None:
    with client_of(plain) as client, pytest.raises(openai.InternalServerError) as raised:
        complete(client, "wait")
    coordinator.may_go_on.set()
    assert raised.value.status_code == 504


def test_a_stream_that_fails_midway_says_so_and_ends(plain: ServerProcess) -> None:
    with client_of(plain) as client:
        stream = complete(client, "late INTERNAL", stream=True)
        assert next(stream).choices[0].text == "Hel"
        with pytest.raises(openai.APIError, match="told INTERNAL"):
            list(stream)


def test_one_choice_that_fails_is_the_failure_of_all(plain: ServerProcess) -> None:
    with client_of(plain) as client, pytest.raises(openai.InternalServerError):
        client.completions.create(model="big", prompt=["fine", "late INTERNAL"])


def test_without_a_coordinator_the_gateway_is_not_healthy(tmp_path: Path) -> None:
    with gateway("127.0.0.1:1", tmp_path) as process, client_of(process) as client:
        assert get(process, "/health")[0] == 503
        with pytest.raises(openai.InternalServerError) as raised:
            complete(client, "Hello")
    assert raised.value.status_code == 503
    assert "no coordinator answers at 127.0.0.1:1" in raised.value.message


def test_where_a_coordinator_is_lost_the_next_one_is_asked(address: str, tmp_path: Path) -> None:
    with gateway(f"127.0.0.1:1,{address}", tmp_path) as process, client_of(process) as client:
        assert complete(client, "Hello").choices[0].text == "Hello"


def get(process: ServerProcess, path: str, method: str = "GET", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(process.address.removeprefix("http://"), timeout=10)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    response.read()
    return response.status, response.headers


@pytest.mark.parametrize("key", ["none", KEY.upper()])
def test_a_key_that_is_none_is_not_let_in(guarded: ServerProcess, key: str) -> None:
    with client_of(guarded, key) as client, pytest.raises(openai.AuthenticationError):
        complete(client, "Hello")


def test_without_a_key_nothing_is_told_but_the_health(guarded: ServerProcess) -> None:
    assert get(guarded, "/v1/models")[0] == 401
    assert get(guarded, "/v1/models/big")[0] == 401
    assert get(guarded, "/v1/chat/completions", "POST")[0] == 401
    assert get(guarded, "/health")[0] == 200


def test_a_key_is_let_in_and_the_log_has_its_owners_name_and_not_the_key(guarded: ServerProcess) -> None:
    with client_of(guarded, KEY) as client:
        assert complete(client, "Hello").choices[0].text == "Hello"
    log = guarded.log_path.read_text()
    assert '"owner": "ann"' in log
    assert KEY not in log


def test_the_model_answers_to_its_other_names(guarded: ServerProcess) -> None:
    with client_of(guarded, KEY) as client:
        assert [each.id for each in client.models.list()] == ["big", "gpt-4o", "other"]
        assert client.completions.create(model="gpt-4o", prompt="Hello").model == "gpt-4o"


def test_pages_of_named_origins_may_ask(guarded: ServerProcess) -> None:
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,x-stainless-os"}
    status, headers = get(guarded, "/v1/chat/completions", "OPTIONS", Origin="https://page.example", **asked)
    assert (status, headers["access-control-allow-origin"]) == (200, "https://page.example")
    assert "x-stainless-os" in headers["access-control-allow-headers"]
    # Failures too, or the page could not read why.
    assert get(guarded, "/v1/models", Origin="https://page.example")[1]["access-control-allow-origin"]


def test_pages_of_other_origins_may_not(guarded: ServerProcess, plain: ServerProcess) -> None:
    asked = {"Origin": "https://other.example", "Access_Control_Request_Method": "POST"}
    assert get(guarded, "/v1/chat/completions", "OPTIONS", **asked)[0] == 400
    assert "access-control-allow-origin" not in get(plain, "/v1/models", Origin="https://page.example")[1]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate, and is not installed")
def test_it_serves_https(address: str, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run([*make, *subject, "-keyout", key, "-out", cert], check=True, capture_output=True)
    with gateway(address, tmp_path, tls_cert=cert, tls_key=key) as process:
        assert process.address.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=cert)
        connection = http.client.HTTPSConnection(process.address.removeprefix("https://"), context=context, timeout=10)
        connection.request("GET", "/v1/models")
        assert json.loads(connection.getresponse().read())["data"][0]["id"] == "big"
    # Though this connection is open still, and nobody reads from it that TLS ends.
    assert "ended with status 0" in process.obituary()


def test_a_running_stream_ends_before_the_process_does(
    address: str, coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    coordinator.may_go_on.clear()
    with gateway(address, tmp_path) as process, client_of(process) as client:
        stream = complete(client, "wait", stream=True)
        text = next(stream).choices[0].text
        process.terminate()
        coordinator.may_go_on.set()
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == "Hello"
        assert "ended with status 0" in process.obituary()


def test_an_address_that_is_open_to_others_is_served_when_told_so_and_warned_of(address: str, tmp_path: Path) -> None:
    with gateway(address, tmp_path, "--insecure", listen="0.0.0.0:0") as process:
        log = process.log_path.read_text()
    assert log.count("insecure: 0.0.0.0:0 is open to other hosts, in plain text") == 1
    assert "0.0.0.0:0 asks for no keys of its own" in log


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--listen", "nowhere"], "error: --listen (SEQUOIA_LISTEN) is 'nowhere'; it must be HOST:PORT"),
        (["--listen", "0.0.0.0:0"], "error: --listen: 0.0.0.0:0 is open to other hosts, in plain text; give"),
        (["--address", "192.0.2.1:5"], "error: --address: 192.0.2.1:5 is another host, and the connection would be"),
        (["--tls-cert", "x"], "error: --tls-cert (SEQUOIA_TLS_CERT) and --tls-key (SEQUOIA_TLS_KEY) go together"),
        (["--tls-cert", "x", "--tls-key", "y", "--listen", "127.0.0.1:0"], "error: --tls-cert: no certificate and key"),
        (["--api-keys", "/nowhere"], "error: --api-keys: /nowhere cannot be read: "),
        (["--max-body-bytes", "0"], "error: --max-body-bytes (SEQUOIA_MAX_BODY_BYTES) must be above 0"),
        (["--address", " , "], "error: --address: none is given"),
    ],
)
def test_a_wrong_setting_is_one_line_and_status_2(flags: list[str], message: str) -> None:
    program = "import sys; from sequoia.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "gateway", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_an_address_that_is_not_ours_is_refused() -> None:
    command = [sys.executable, "-m", "coordinator.gateway", "--listen", "192.0.2.1:5", "--insecure"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "error: --listen: 192.0.2.1:5 cannot be listened on: " in done.stderr


@pytest.mark.parametrize("begins", ["GET /", "GET / HTTP/1.1\r\nx-long: ", "GET / HTTP/1.1\r\n"])
def test_a_head_without_end_is_hung_up_on(plain: ServerProcess, begins: str) -> None:
    host, _, port = plain.address.removeprefix("http://").rpartition(":")
    piece = b"x-short: a\r\n" if begins.endswith("\n") else b"a" * 12
    num_sent = 0
    with socket.create_connection((host, int(port)), timeout=10) as connection, suppress(ConnectionError):
        connection.sendall(begins.encode())
        while num_sent < 64 * 2**20:
            connection.sendall(1000 * piece)
            num_sent += 12_000
    assert num_sent < 64 * 2**20
    assert get(plain, "/health")[0] == 200


@pytest.mark.parametrize("line", ["sk-plain", "ann:" + "0" * 63, ""])
def test_a_line_that_is_no_digest_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "keys").write_text(line)
    with pytest.raises(InvalidArgument, match="api_keys: "):
        ApiKeys(str(tmp_path / "keys"))


def test_every_field_of_the_official_client_is_known_by_name() -> None:
    chats = get_type_hints(chat_create_params.CompletionCreateParamsBase)
    assert chats.keys() | {"stream"} <= {*HONOURED["chat"], *REFUSED["chat"], *LABELS}
    completions = get_type_hints(completion_create_params.CompletionCreateParamsBase)
    assert completions.keys() | {"stream"} <= {*HONOURED["completions"], *REFUSED["completions"], *LABELS}


def test_the_documentation_has_the_table_of_fields() -> None:
    assert table() in (ROOT / "docs" / "gateway.md").read_text()
