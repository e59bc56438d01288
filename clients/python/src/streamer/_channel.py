"""The gRPC channel: server address, methods, and error mapping."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as Any_
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from streamer._proto import progress_pb2, router_pb2, worker_pb2
from streamer.errors import ErrorCode, ServiceError, Violation

_OPTIONS: list[tuple[str, int]] = [
    # No limits: the server limits the size of its messages, and this package checks sizes before it
    # sends a message.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Short delays before reconnects: this package adds its own delays, which have jitter.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name, this option is the minimum connection timeout: a server that takes longer to
    # accept a connection is never reached.
    ("grpc.min_reconnect_backoff_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Interval between keepalive pings, which detect a dead connection even while it is idle.
    ("grpc.keepalive_time_ms", 30_000),
    # Timeout of keepalive pings.
    ("grpc.keepalive_timeout_ms", 10_000),
    # Timeout of bandwidth probes; gRPC sends no keepalive ping while a probe is pending.
    ("grpc.http2.ping_timeout_ms", 10_000),
    # No limit on the number of pings without data.
    ("grpc.http2.max_pings_without_data", 0),
    # A separate connection for each channel, so that a broken connection affects no other channel.
    ("grpc.use_local_subchannel_pool", 1),
]

_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT: ErrorCode.VALIDATION_ERROR,
    grpc.StatusCode.UNAUTHENTICATED: ErrorCode.UNAUTHORIZED,
    grpc.StatusCode.PERMISSION_DENIED: ErrorCode.FORBIDDEN,
    grpc.StatusCode.NOT_FOUND: ErrorCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS: ErrorCode.CONFLICT,
    grpc.StatusCode.FAILED_PRECONDITION: ErrorCode.CONFLICT,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ErrorCode.RATE_LIMITED,
    grpc.StatusCode.DEADLINE_EXCEEDED: ErrorCode.TIMEOUT,
    grpc.StatusCode.CANCELLED: ErrorCode.CANCELLED,
    grpc.StatusCode.UNAVAILABLE: ErrorCode.UNAVAILABLE,
}


@dataclass(frozen=True)
class Address:
    """Address of a server."""

    target: str
    secure: bool


def parse_server(server: str) -> Address:
    """Parses `http://host:port`, `https://host:port` or `host:port` (short for `http`). Raises
    ValueError if `server` has a different form."""
    url = urlsplit(server if "://" in server else f"http://{server}")
    if url.scheme not in ("http", "https") or not url.hostname or url.path not in ("", "/"):
        raise ValueError(f"server: must be http://host:port or https://host:port, is {server!r}")
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    secure = url.scheme == "https"
    return Address(f"{host}:{url.port or (443 if secure else 80)}", secure)


def open_channel(address: Address) -> grpc.aio.Channel:
    """Returns a channel that connects when the first call is made."""
    if address.secure:
        credentials = grpc.ssl_channel_credentials()
        return grpc.aio.secure_channel(address.target, credentials, _OPTIONS)
    return grpc.aio.insecure_channel(address.target, _OPTIONS)


class Calls:
    """Methods of the server that clients call, on one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.closed = False
        """Whether the client is closed."""
        router = "/streamer.router.v1.RouterService/"
        self.submit = channel.unary_unary(
            f"{router}Submit",
            router_pb2.SubmitRequest.SerializeToString,
            router_pb2.SubmitResponse.FromString,
        )
        self.get = channel.unary_unary(
            f"{router}Get",
            router_pb2.GetRequest.SerializeToString,
            router_pb2.GetResponse.FromString,
        )
        self.list = channel.unary_unary(
            f"{router}List",
            router_pb2.ListRequest.SerializeToString,
            router_pb2.ListResponse.FromString,
        )
        self.cancel = channel.unary_unary(
            f"{router}Cancel",
            router_pb2.CancelRequest.SerializeToString,
            router_pb2.CancelResponse.FromString,
        )
        self.redrive = channel.unary_unary(
            f"{router}Redrive",
            router_pb2.RedriveRequest.SerializeToString,
            router_pb2.RedriveResponse.FromString,
        )
        self.list_actions = channel.unary_unary(
            f"{router}ListActions",
            router_pb2.ListActionsRequest.SerializeToString,
            router_pb2.ListActionsResponse.FromString,
        )
        self.watch = channel.unary_stream(
            "/streamer.progress.v1.ProgressService/Watch",
            progress_pb2.WatchRequest.SerializeToString,
            progress_pb2.WatchResponse.FromString,
        )


WorkCall = grpc.aio.StreamStreamCall[worker_pb2.WorkRequest, worker_pb2.WorkResponse]


def open_work(channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]) -> WorkCall:
    """Opens a `Work` stream, which connects a worker to the server."""
    work = channel.stream_stream(
        "/streamer.processor.v1.WorkerService/Work",
        _serialize,
        worker_pb2.WorkResponse.FromString,
    )
    return work(metadata=metadata)


def _serialize(request: worker_pb2.WorkRequest) -> bytes:
    return request.SerializeToString()


def service_error(error: grpc.aio.AioRpcError) -> ServiceError:
    """Converts the error of a failed call, including the `google.rpc` details of its status."""
    code = _CODES.get(error.code(), ErrorCode.INTERNAL_ERROR)
    violations: list[Violation] = []
    retry_after: float | None = None
    for packed in _details(error):
        info = error_details_pb2.ErrorInfo()
        bad_request = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if packed.Unpack(info):
            if info.domain == "streamer" and info.reason in ErrorCode.__members__:
                code = ErrorCode(info.reason)
        elif packed.Unpack(bad_request):
            violations.extend(
                Violation(one.field, one.description) for one in bad_request.field_violations
            )
        elif packed.Unpack(retry):
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    if code is ErrorCode.TIMEOUT and is_unreachable(error):
        code = ErrorCode.UNAVAILABLE
    message = error.details() or error.code().name
    return ServiceError(code, message, violations=tuple(violations), retry_after=retry_after)


def is_unreachable(error: grpc.aio.AioRpcError) -> bool:
    """Returns whether the server could not be reached or did not respond in time. If a sync action
    times out, the status code is the same, but the status has details."""
    timed_out = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not _details(error)
    return timed_out or error.code() is grpc.StatusCode.UNAVAILABLE


def _details(error: grpc.aio.AioRpcError) -> list[Any_]:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:
                break
    return []
