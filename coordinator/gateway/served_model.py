"""The model that is served, as the API lists it."""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from coordinator.clients_file import digest_of
from coordinator.gateway.caller import Caller
from coordinator.gateway.failures import ApiError
from sequoia.client import AsyncClient
from sequoia.errors import PermissionDenied, SequoiaError, Unauthenticated
from sequoia.v1 import coordinator_pb2

_FRESH_SECONDS = 10.0
_MOST_CALLERS = 4096
# A description is small, and a coordinator that is there sends it at once.
_LOOK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a coordinator says of its target. `names` are all that a request may call it by, its own first."""

    names: tuple[str, ...]
    draft: str | None
    context_length: int
    fingerprint: str

    def check(self, name: str) -> None:
        """Raises ApiError where the model is not called that."""
        if name not in self.names:
            problem = f"The model `{name}` is not served here; served is {' or '.join(self.names)}."
            raise ApiError(404, problem, "model", "model_not_found")

    def to_dict(self, name: str) -> dict[str, Any]:
        """The API's model object."""
        ours = {"draft": self.draft, "context_length": self.context_length}
        return {"id": name, "object": "model", "created": 0, "owned_by": "sequoia", "sequoia": ours}


class ModelWatch:
    """Knows the model that a coordinator serves, and looks again from time to time, for every caller."""

    def __init__(self, further_names: tuple[str, ...]) -> None:
        self._further_names = further_names
        self._known: ServedModel | None = None
        self._looked_at: dict[str, float] = {}  # by the digest of the token that was shown
        self._lock = asyncio.Lock()

    async def look(self, client: AsyncClient) -> ServedModel:
        """Ask the coordinator now. Raises SequoiaError where none answers, or does not let the caller in."""
        pair = await client.describe_pair(timeout_seconds=_LOOK_SECONDS)
        self._known = _served(pair, self._further_names)
        return self._known

    async def current(self, caller: Caller) -> ServedModel:
        """The model. One that was known stands while no coordinator answers: the request itself will tell.

        Raises SequoiaError where the caller is not let in.
        """
        who = digest_of(caller.token or "")
        async with self._lock:
            if self._known is not None and time.monotonic() < self._looked_at.get(who, 0.0) + _FRESH_SECONDS:
                return self._known
            try:
                found = await self.look(caller.client)
            except (Unauthenticated, PermissionDenied):
                raise
            except SequoiaError:
                if self._known is None:
                    raise
                return self._known
            self._remember(who)
            return found

    def _remember(self, who: str) -> None:
        if len(self._looked_at) >= _MOST_CALLERS:
            del self._looked_at[next(iter(self._looked_at))]
        self._looked_at[who] = time.monotonic()


def _served(pair: coordinator_pb2.DescribePairResponse, further_names: tuple[str, ...]) -> ServedModel:
    verify = pair.verify
    # What decides the text for a seed.
    parts = (verify.model, verify.model_revision, verify.dtype, verify.quantization)
    return ServedModel(
        names=tuple(dict.fromkeys((_name(verify.model), *further_names))),
        draft=_name(pair.draft.model) if pair.HasField("draft") else None,
        context_length=verify.context_length,
        fingerprint="fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:10],
    )


def _name(model: str) -> str:
    """Where a model lies on its server is nobody's business: of a path only the last part."""
    return PurePath(model).name if model.startswith(("/", ".", "~")) else model
