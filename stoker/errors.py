"""Errors: one root, split by who must act, and the one table that maps them to gRPC and HTTP.

Theory of operation: code raises a `StokerError`; the server interceptor (`stoker.rpc`) turns it into a gRPC
status with the error's code, message and details in the trailing metadata; the client wrapper turns that
back into the same class. The gateway's REST edge turns it into OpenAI's error object. Nobody else maps.

Each class names a `code` (stable, machine readable, the same in REST and gRPC), a gRPC status and an HTTP
status. A class exists only if someone catches it or it has its own status or code.
"""

from __future__ import annotations

from typing import Any, ClassVar

import grpc


class StokerError(Exception):
    """Root of everything this project raises on purpose.

    Args:
        message: What happened, to which thing, and what to do about it.
        retry_after_seconds: When trying again may help; None when it won't.
        param: The request field at fault, for OpenAI's error object.
        details: Further facts for machines; must be JSON serialisable.
    """

    code: ClassVar[str] = "internal_error"
    grpc_status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"

    def __init__(
        self,
        message: str,
        *,
        retry_after_seconds: float | None = None,
        param: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_seconds = retry_after_seconds
        self.param = param
        self.details = details or {}


# --- the caller must act ---


class CallerError(StokerError):
    """The request is at fault; sending it again changes nothing."""

    code = "refused"
    grpc_status = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 400
    openai_type = "invalid_request_error"


class InvalidRequest(CallerError):
    """A field is missing, of the wrong type, or out of range."""

    code = "invalid_request"


class ContextLengthExceeded(CallerError):
    """The prompt and the tokens asked for do not fit the model's context."""

    code = "context_length_exceeded"


class BodyTooLarge(CallerError):
    """The request's body is larger than the gateway accepts."""

    code = "request_too_large"
    http_status = 413


class Unauthenticated(CallerError):
    """No API key, or one nobody knows."""

    code = "invalid_api_key"
    grpc_status = grpc.StatusCode.UNAUTHENTICATED
    http_status = 401


class ModelNotFound(CallerError):
    """No model of that name is deployed."""

    code = "model_not_found"
    grpc_status = grpc.StatusCode.NOT_FOUND
    http_status = 404


class NotFound(CallerError):
    """Something else that was named does not exist: a node, a replica, a file."""

    code = "not_found"
    grpc_status = grpc.StatusCode.NOT_FOUND
    http_status = 404


class AlreadyExists(CallerError):
    """The thing exists and differs from what was asked."""

    code = "already_exists"
    grpc_status = grpc.StatusCode.ALREADY_EXISTS
    http_status = 409


class IdempotencyKeyReused(CallerError):
    """An idempotency key came back with another request."""

    code = "idempotency_key_reused"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 422


class InUse(CallerError):
    """The thing is held by somebody and stays as it is: a leased or pinned checkpoint."""

    code = "in_use"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 409


class CheckpointInvalid(CallerError):
    """A checkpoint is missing files, truncated, hostile, or of an architecture no engine serves."""

    code = "checkpoint_invalid"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 400


# --- capacity: try later, or give more ---


class CapacityError(StokerError):
    """There is no room now; the same request may succeed later."""

    code = "overloaded"
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 503
    openai_type = "overloaded_error"


class QueueFull(CapacityError):
    """A bounded queue is full."""

    code = "queue_full"
    http_status = 429
    openai_type = "rate_limit_error"


class CannotMeetDeadline(CapacityError):
    """The request has a deadline, and the best estimate is later; the details have `estimate_seconds`."""

    code = "cannot_meet_deadline"


class ReplicaBusy(CapacityError):
    """A replica was to be stopped only if idle, and a session runs on it."""

    code = "replica_busy"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION


class DoesNotFit(CapacityError):
    """The thing can never fit: a model larger than the pool or than any device."""

    code = "does_not_fit"
    http_status = 507


class DiskFull(CapacityError):
    """The disk has no room for what is being written."""

    code = "disk_full"
    http_status = 507


# --- a peer failed: another one may serve ---


class PeerError(StokerError):
    """Another process failed or cannot be reached."""

    code = "unavailable"
    grpc_status = grpc.StatusCode.UNAVAILABLE
    http_status = 503


class ReplicaGone(PeerError):
    """The replica asked for is not (or no longer) served here: ask for a route again."""

    code = "replica_gone"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION


class WorkerDied(PeerError):
    """The worker ended while it served this session."""

    code = "worker_died"
    grpc_status = grpc.StatusCode.ABORTED


class LoadFailed(PeerError):
    """A model could not be started."""

    code = "load_failed"
    grpc_status = grpc.StatusCode.ABORTED


class StreamLost(PeerError):
    """An answer that had begun was cut off: no replica could go on with it."""

    code = "stream_lost"
    grpc_status = grpc.StatusCode.ABORTED


class KvUnavailable(PeerError):
    """Keys and values can't be shipped between two workers, or not now: compute them from the tokens."""

    code = "kv_unavailable"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION


class KvDamaged(KvUnavailable):
    """Keys and values came that are not those that were sent."""

    code = "kv_damaged"
    grpc_status = grpc.StatusCode.DATA_LOSS


class NotLeader(PeerError):
    """This controller does not lead; the details may name who does."""

    code = "not_leader"


class DeadlineExceeded(PeerError):
    """The answer did not come in time."""

    code = "deadline_exceeded"
    grpc_status = grpc.StatusCode.DEADLINE_EXCEEDED
    http_status = 504


# --- us ---


class Fenced(StokerError):
    """A write or a token carries an epoch that is over: whoever sent it is no longer the owner.

    Of a session that came too late, the details have `highest_epoch`: that of the latest owner seen there.
    """

    code = "fenced"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 409


class ConfigError(StokerError):
    """A setting is wrong, a port is taken, a folder is in use: the operator must act."""

    code = "config_error"


def _classes(root: type[StokerError]) -> list[type[StokerError]]:
    return [root] + [found for child in root.__subclasses__() for found in _classes(child)]


BY_CODE: dict[str, type[StokerError]] = {cls.code: cls for cls in reversed(_classes(StokerError))}
"""Every error by its code; where a class inherits its parent's code, the parent stands."""
