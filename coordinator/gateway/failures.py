"""Errors as HTTP and the OpenAI API have them: one table, one shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import grpc

from sequoia.errors import ResourceExhausted, SequoiaError

# UNAUTHENTICATED is what the coordinator says to the gateway, whose own token is wrong then, not the client's key.
# Where it was shown the client's key, _OF_THE_CLIENT counts.
STATUS_BY_CODE = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNKNOWN: 500,
    grpc.StatusCode.UNAUTHENTICATED: 502,
    grpc.StatusCode.PERMISSION_DENIED: 502,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.FAILED_PRECONDITION: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
_OF_THE_CLIENT = {grpc.StatusCode.UNAUTHENTICATED: 401, grpc.StatusCode.PERMISSION_DENIED: 403}
_CODES = {400: None, 401: "invalid_api_key", 403: "permission_denied", 429: "rate_limit_exceeded"}
# Fields of the wire by the names that they have in a body, where those are others.
_PARAMS = {
    "text": "prompt",
    "token_ids": "prompt",
    "input": "prompt",
    "chat": "messages",
    "tool_call_form": "tool_choice",
    "speculation.rule": "rule",
    "speculation.mode": "speculation",
    "speculation.topology": "speculation",
    "speculation.dynamic": "speculation",
    "num_logprobs": "logprobs",
    "json_schema": "response_format",
}


class ApiError(Exception):
    """An error on its way to the client. `param` is the field of the body that is at fault, `code` a short name."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def to_dict(self) -> dict[str, Any]:
        """The API's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def api_error(error: SequoiaError, names: Mapping[str, str] | None = None, *, forwards: bool = False) -> ApiError:
    """What a failed request is told. `names` are fields that this request's body has by other names.

    `forwards`: the coordinator was shown the client's own key.
    """
    status = STATUS_BY_CODE[error.code]
    if forwards:
        status = _OF_THE_CLIENT.get(error.code, status)
    if status == 401:
        return wrong_key(is_given=not error.message.endswith("missing"))
    code = _CODES.get(status, error.code.name.lower())
    retry = error.retry_seconds if isinstance(error, ResourceExhausted) else None
    headers = {"retry-after": str(math.ceil(retry))} if retry is not None else {}
    if status not in (400, 403) or not error.field:
        return ApiError(status, str(error), None, code, headers)
    param = _param(error.field, names or {})
    return ApiError(status, f"{param}: {error.message}", param, code)


def wrong_key(*, is_given: bool) -> ApiError:
    """What whoever is not let in is told."""
    problem = "Incorrect API key provided" if is_given else "No API key was provided"
    reason = f"{problem}; send one as the header Authorization: Bearer KEY."
    return ApiError(401, reason, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _param(field_name: str, names: Mapping[str, str]) -> str:
    name = field_name.removeprefix("sampling.").removeprefix("chat.")
    # A part of a field of the wire is no field of a body.
    name = _PARAMS.get(".".join(name.split(".")[:2]), name)
    return names.get(name, name)
