"""Asks an OpenAI API under load, ours or another server's."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import AsyncGenerator
from typing import Any

import httpx2

from sequoia.access import Access
from sequoia.cli.load.timeline import Ending, Piece
from sequoia.cli.load.workload import Form, LoadRequest
from sequoia.errors import DeadlineExceeded, Internal, InvalidArgument, ResourceExhausted, SequoiaError, Unavailable

_DONE = "[DONE]"
_ERRORS: dict[int, type[SequoiaError]] = {
    400: InvalidArgument,
    404: InvalidArgument,
    429: ResourceExhausted,
    503: Unavailable,
    504: DeadlineExceeded,
}


class HttpDriver:
    """Over as many connections as requests run, with events as they are sent."""

    def __init__(self, client: httpx2.AsyncClient, model: str, form: Form) -> None:
        self._client, self._model, self._form = client, model, form

    async def ask(self, request: LoadRequest, arm: str) -> AsyncGenerator[Piece]:
        """As Driver has it; the token count is that of `usage`."""
        ending = None
        path = "completions" if self._form.is_raw else "chat/completions"
        try:
            async with self._client.sse(path, method="POST", json=self._body(request, arm)) as events:
                if events.response.is_error:
                    raise _error(events.response.status_code, await events.response.aread())
                async for event in events:
                    if event.data == _DONE:
                        break
                    said = _checked(event.json())
                    ending = _ending(said, ending)
                    if text := _text(said):
                        yield Piece(text, 1)
        except httpx2.HTTPError as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Internal(f"the stream has an event that is none of the API's: {error!r}") from error
        if ending is None:
            raise Internal("the stream ended without its usage")
        yield Piece("", 0, ending)

    def _body(self, request: LoadRequest, arm: str) -> dict[str, Any]:
        text = request.prompt.text
        asked = {"prompt": text} if self._form.is_raw else {"messages": [{"role": "user", "content": text}]}
        return {
            **asked,
            "model": self._model,
            "max_tokens": request.max_tokens,
            "temperature": self._form.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"seed": request.seed} if self._form.temperature else {}),
            **({"ignore_eos": True} if self._form.ignore_eos else {}),
            **({"speculation": "off"} if arm == "off" else {}),
        }


def open_http(base_url: str, access: Access, timeout_seconds: float) -> httpx2.AsyncClient:
    """With its token, or the key of OPENAI_API_KEY, if there is one, and with its CAs and certificate."""
    key = access.get("token") or os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx2.Limits(max_connections=None)
    context = ssl.create_default_context(cafile=access.get("tls_ca") or None)
    if cert := access.get("tls_cert"):
        context.load_cert_chain(cert, access.get("tls_key"))
    return httpx2.AsyncClient(
        base_url=base_url, headers=headers, timeout=timeout_seconds, limits=limits, verify=context
    )


async def first_model(client: httpx2.AsyncClient) -> str:
    """The one that a server at that address serves. Raises Unavailable where there is none."""
    try:
        response = await client.get("models")
        if response.is_error:
            raise _error(response.status_code, response.content)
        return str(response.json()["data"][0]["id"])
    except httpx2.HTTPError as error:
        raise Unavailable(f"{client.base_url}: {type(error).__name__}: {error}", "base-url") from error
    except (ValueError, LookupError, TypeError) as error:
        raise Unavailable(f"{client.base_url}models does not list a model", "base-url") from error


def _checked(said: Any) -> dict[str, Any]:
    """An event's object. Raises SequoiaError for one that tells of a failure."""
    if "error" in said:
        raise Internal(str(said["error"].get("message", said["error"])))
    return dict(said)


def _text(said: dict[str, Any]) -> str:
    """What it adds to the answer."""
    return "".join(
        each.get("text") or (each.get("delta") or {}).get("content") or "" for each in said.get("choices") or ()
    )


def _ending(said: dict[str, Any], known: Ending | None) -> Ending | None:
    """The totals so far: those of speculation come with the choice's last chunk, `usage` behind it."""
    for choice in said.get("choices") or ():
        if figures := (choice.get("sequoia") or {}).get("speculation"):
            known = Ending(0, figures["steps"], figures["num_accepted_tokens"])
    if usage := said.get("usage"):
        known = known or Ending(0)
        known = Ending(int(usage["completion_tokens"]), known.num_steps, known.num_accepted_tokens)
    return known


def _error(status: int, body: bytes) -> SequoiaError:
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = body[:200].decode(errors="replace")
    return _ERRORS.get(status, Internal)(f"status {status}: {message}")
