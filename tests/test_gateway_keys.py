"""Keys over HTTP that are a coordinator's tokens: a real gateway over TLS before a coordinator that asks for them."""

from __future__ import annotations

import asyncio
import http.client
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from certificates import Authority
from guarded import TOKEN, ClientsFile, Clock, Guarded, digest_of, entry, guarded
from openai import AsyncOpenAI

from sequoia.cli.process import ServerProcess, wait_until_serving
from sequoia.tls import Tls

GATEWAY_TOKEN = "sq-of-the-gateway"


@pytest.fixture
def file(tmp_path: Path) -> ClientsFile:
    return ClientsFile(tmp_path / "clients.toml")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@asynccontextmanager
async def gateway(tmp_path: Path, **flags: object) -> AsyncIterator[ServerProcess]:
    named = {name.replace("_", "-"): value for name, value in flags.items()}
    own = {"listen": "127.0.0.1:0", **named}
    process = ServerProcess("gateway", "coordinator.gateway", own, {"PATH": "/usr/bin:/bin"}, tmp_path)
    try:
        await asyncio.to_thread(lambda: list(wait_until_serving([process])))
        yield process
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait)


@asynccontextmanager
async def secured(
    authority: Authority, file: ClientsFile, tmp_path: Path, **flags: object
) -> AsyncIterator[tuple[ServerProcess, Guarded]]:
    """Both over TLS; the gateway is let in by its certificate, which is no client's."""
    pair = authority.server()
    async with guarded(file, Clock(), Tls(*pair, ca=authority.path)) as (address, coordinator):
        tls = {"tls_cert": pair.cert, "tls_key": pair.key, "tls_ca": authority.path}
        async with gateway(tmp_path, address=address, **tls, **flags) as process:
            yield process, coordinator


@asynccontextmanager
async def client_of(process: ServerProcess, authority: Authority, key: str) -> AsyncIterator[AsyncOpenAI]:
    context = ssl.create_default_context(cafile=authority.path)
    url = f"{process.address}/v1"
    async with (
        openai.DefaultAsyncHttpxClient(verify=context) as transport,
        AsyncOpenAI(base_url=url, api_key=key, http_client=transport, max_retries=0, timeout=20) as client,
    ):
        yield client


async def ask(process: ServerProcess, authority: Authority, key: str, **options: Any) -> Any:
    async with client_of(process, authority, key) as client:
        return (await client.completions.create(model="big", prompt="Hello", **options)).choices[0].text


async def test_a_key_is_the_coordinators_token_and_its_limits_are_of_http(
    authority: Authority, file: ClientsFile, tmp_path: Path
) -> None:
    file.write(entry("ann", TOKEN, requests_per_minute=2, max_tokens=50))
    async with secured(authority, file, tmp_path) as (process, _):
        assert process.address.startswith("https://")
        with pytest.raises(openai.PermissionDeniedError) as denied:
            await ask(process, authority, TOKEN, max_tokens=51)
        assert await ask(process, authority, TOKEN) == "ann"
        with pytest.raises(openai.RateLimitError) as limited:
            await ask(process, authority, TOKEN)
        for stranger in ("wrong", TOKEN.upper(), "öäü"):
            with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
                await ask(process, authority, stranger)
        log = await asyncio.to_thread(process.log_path.read_text)
    assert (denied.value.param, denied.value.code) == ("max_tokens", "permission_denied")
    assert limited.value.response.headers["retry-after"] == "30"
    assert limited.value.code == "rate_limit_exceeded"
    assert TOKEN not in log


async def test_who_has_no_key_is_not_the_gateway(authority: Authority, file: ClientsFile, tmp_path: Path) -> None:
    """Its certificate is one that the coordinator knows, and stands for itself alone."""
    file.write(entry("ann", TOKEN) + '[clients.gateway]\nidentity = "localhost"\n')
    async with secured(authority, file, tmp_path) as (process, coordinator):
        for path, body in (("/v1/models", None), ("/v1/models/big", None), ("/v1/completions", {"model": "big"})):
            status, headers, told = await asyncio.to_thread(fetch, process, authority, path, body)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
            assert told["error"]["code"] == "invalid_api_key"
        status, _, told = await asyncio.to_thread(fetch, process, authority, "/health", None)
    assert (status, told) == (200, {"status": "serving", "model": "big"})
    assert coordinator.callers.empty()


def fetch(process: ServerProcess, authority: Authority, path: str, body: Any) -> tuple[int, Any, Any]:
    """Status, headers and document, without a key."""
    context = ssl.create_default_context(cafile=authority.path)
    connection = http.client.HTTPSConnection(process.address.removeprefix("https://"), context=context, timeout=10)
    if body is None:
        connection.request("GET", path)
    else:
        connection.request("POST", path, json.dumps(body | {"prompt": "a"}), {"content-type": "application/json"})
    response = connection.getresponse()
    document = json.loads(response.read())
    connection.close()
    return response.status, response.headers, document


async def test_a_gateway_with_keys_of_its_own_asks_for_others_by_its_token(
    authority: Authority, file: ClientsFile, tmp_path: Path
) -> None:
    file.write(entry("gateway", GATEWAY_TOKEN))
    keys, token = ClientsFile(tmp_path / "keys"), ClientsFile(tmp_path / "token")
    keys.write(f"ann:{digest_of(TOKEN)}\n")
    token.write(GATEWAY_TOKEN + "\n")
    async with secured(authority, file, tmp_path, api_keys=keys.path, token_file=token.path) as (process, _):
        assert await ask(process, authority, TOKEN) == "gateway"
        with pytest.raises(openai.AuthenticationError):
            await ask(process, authority, GATEWAY_TOKEN)
        keys.write(f"ben:{digest_of('sq-new')}\n")
        assert await ask(process, authority, "sq-new") == "gateway"
        with pytest.raises(openai.AuthenticationError):
            await ask(process, authority, TOKEN)
        file.write(entry("other", "sq-other"))
        with pytest.raises(openai.InternalServerError) as raised:
            await ask(process, authority, "sq-new")
    assert raised.value.status_code == 502, "the gateway's own token is wrong, not the client's key"


async def test_https_has_the_new_certificate_when_the_files_have_changed(
    authority: Authority, file: ClientsFile, tmp_path: Path
) -> None:
    file.write(entry("ann", TOKEN))
    async with guarded(file, Clock()) as (address, _):
        pair = authority.server()
        async with gateway(tmp_path, address=address, tls_cert=pair.cert, tls_key=pair.key) as process:
            assert await ask(process, authority, TOKEN) == "ann"
            key, cert = pair.read()
            pair.write(key[:50], cert)
            assert await ask(process, authority, TOKEN) == "ann"
            successor = Authority(tmp_path, "next")
            successor.server()
            assert await ask(process, successor, TOKEN) == "ann"
            with pytest.raises(openai.APIConnectionError):
                await ask(process, authority, TOKEN)
            log = await asyncio.to_thread(process.log_path.read_text)
    assert log.count("changed files not used") == 1
    assert log.count("files read again") == 1


async def test_a_key_that_was_let_in_is_looked_at_again(
    authority: Authority, file: ClientsFile, tmp_path: Path
) -> None:
    file.write(entry("ann", TOKEN))
    async with secured(authority, file, tmp_path) as (process, _):
        assert await ask(process, authority, TOKEN) == "ann"
        file.write(entry("ben", "sq-other"))
        with pytest.raises(openai.AuthenticationError):
            await ask(process, authority, TOKEN)
