"""Errors over gRPC: ours leave as a status with the field's name, and come back as what they were."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn, Protocol

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from sequoia.errors import ERROR_BY_CODE, Internal, InvalidArgument, ResourceExhausted, SequoiaError, Unavailable

_log = logging.getLogger(__name__)

_STATUS_DETAILS = "grpc-status-details-bin"


class Context(Protocol):
    """The part of a servicer context that the error border needs."""

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: tuple[tuple[str, bytes], ...] = ()
    ) -> NoReturn: ...


@asynccontextmanager
async def error_border(context: Context) -> AsyncIterator[None]:
    """Around a handler's body: a SequoiaError leaves as its status and field name, a fault of ours as INTERNAL."""
    try:
        yield
    except SequoiaError as error:
        await abort(context, error)
    except DecodeError as error:
        await abort(context, unreadable(error))
    except grpc.aio.AbortError:
        raise
    except Exception as error:  # noqa: BLE001
        _log.exception("handler failed")
        await abort(context, Internal(f"{type(error).__name__}: {error}"))


def unreadable(error: DecodeError) -> InvalidArgument:
    """Bytes that are not the message they should be."""
    return InvalidArgument(f"it cannot be read: {error}", "message")


async def abort(context: Context, error: SequoiaError) -> NoReturn:
    """End the call with the error's status; what went wrong is in its details."""
    status = status_pb2.Status(code=error.code.value[0], message=str(error))
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        detail = any_pb2.Any()
        detail.Pack(error_details_pb2.BadRequest(field_violations=[violation]))
        status.details.append(detail)
    if isinstance(error, ResourceExhausted) and error.retry_seconds is not None:
        detail = any_pb2.Any()
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(error.retry_seconds * 1e9))
        detail.Pack(retry)
        status.details.append(detail)
    await context.abort(error.code, str(error), ((_STATUS_DETAILS, status.SerializeToString()),))


def has_details(error: grpc.RpcError) -> bool:
    """Whether a peer has said what failed; else the connection, or a deadline, has."""
    return _details(error) is not None


def error_from(error: grpc.RpcError) -> SequoiaError:
    """The SequoiaError that a failed call stands for: the peer's own, or one for its status code.

    INTERNAL and UNKNOWN without our details are gRPC's own, of connections that broke in the middle of a frame.
    """
    kind = ERROR_BY_CODE.get(error.code(), SequoiaError)
    status = _details(error)
    if status is None and error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        kind = Unavailable
    message, field, retry = error.details() or error.code().name, "", error_details_pb2.RetryInfo()
    for detail in status_pb2.Status.FromString(status or b"").details:
        request = error_details_pb2.BadRequest()
        if detail.Unpack(request) and request.field_violations:
            message, field = request.field_violations[0].description, request.field_violations[0].field
        detail.Unpack(retry)
    if kind is ResourceExhausted and retry.HasField("retry_delay"):
        return ResourceExhausted(message, field, retry_seconds=retry.retry_delay.ToNanoseconds() / 1e9)
    return kind(message, field)


def _details(error: grpc.RpcError) -> bytes | None:
    """The peer's own Status, serialised."""
    metadata: Any = error.trailing_metadata() or ()
    return next((value for key, value in metadata if key == _STATUS_DETAILS), None)
