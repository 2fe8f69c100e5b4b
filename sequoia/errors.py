"""Every error a user can meet, and the one table that maps it to a gRPC status code and back."""

from __future__ import annotations

import grpc


class SequoiaError(Exception):
    """Base of all errors that cross a process border. `field` names the request field or setting at fault."""

    code = grpc.StatusCode.UNKNOWN

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.message = message
        self.field = field


class InvalidArgument(SequoiaError):
    """The request is wrong and stays wrong: change the field that is named."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class FailedPrecondition(SequoiaError):
    """The parts do not fit each other, such as a draft and a target with different tokenizers."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class ResourceExhausted(SequoiaError):
    """No capacity at this moment: try again later, after `retry_seconds` where they are known."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, field: str = "", *, retry_seconds: float | None = None) -> None:
        super().__init__(message, field)
        self.retry_seconds = retry_seconds


class Unauthenticated(SequoiaError):
    """Who asks is not known: the token is missing or wrong."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(SequoiaError):
    """Who asks is known, and may not have this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Unavailable(SequoiaError):
    """The peer cannot be reached or is going away: try again, here or elsewhere."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(SequoiaError):
    """No answer in the time allowed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(SequoiaError):
    """The caller gave up."""

    code = grpc.StatusCode.CANCELLED


class Internal(SequoiaError):
    """A fault of ours, or of the model: please report it."""

    code = grpc.StatusCode.INTERNAL


ERROR_BY_CODE: dict[grpc.StatusCode, type[SequoiaError]] = {
    error.code: error
    for error in (
        InvalidArgument,
        FailedPrecondition,
        ResourceExhausted,
        Unauthenticated,
        PermissionDenied,
        Unavailable,
        DeadlineExceeded,
        Cancelled,
        Internal,
    )
}
