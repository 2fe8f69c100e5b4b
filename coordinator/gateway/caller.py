"""Who asks over HTTP, and how the coordinator is asked for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from starlette.requests import Request

from coordinator.gateway.failures import ApiError, api_error
from coordinator.gateway.keys import ApiKeys
from sequoia.access import token_of
from sequoia.client import AsyncClient
from sequoia.errors import SequoiaError


@dataclass(frozen=True, slots=True)
class Caller:
    """One of the keys of `--api-keys`, for whom the gateway asks; or whoever the coordinator knows by `token`."""

    client: AsyncClient
    owner: str = ""  # the name of the key, for the log
    token: str | None = None  # as it came; None: the gateway's own is shown

    def failure(self, error: SequoiaError, names: Mapping[str, str] | None = None) -> ApiError:
        """What it is told of a failure."""
        return api_error(error, names, forwards=self.token is not None)


def caller_of(request: Request, client: AsyncClient, keys: ApiKeys) -> Caller:
    """Raises ApiError for a key that is none of ours.

    Without keys of our own what came is shown to the coordinator, also where it is nothing: the gateway's own
    certificate must not stand for somebody who has no key.
    """
    authorization = request.headers.get("authorization", "")
    if keys:
        return Caller(client, keys.owner(authorization))
    token = token_of(authorization)
    return Caller(client.with_token(token), token=token)
