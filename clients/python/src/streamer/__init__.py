"""Streamer for Python: `Worker` runs actions, `Client` submits requests over gRPC.

`streamer.websocket` is a client over one WebSocket, `streamer.testing` runs handlers without a
server, and `streamer.events` defines the events of a request's log.
"""

from streamer import events
from streamer._tokens import Token, token_file
from streamer.action import Action
from streamer.client import Client
from streamer.context import Context
from streamer.errors import (
    BrokenLog,
    Cancelled,
    ErrorCode,
    Failure,
    FatalError,
    HandlerError,
    InvalidPayload,
    LimitExceeded,
    RequestCancelled,
    RequestFailed,
    ServiceError,
    StreamerError,
    Violation,
    WorkerRefused,
)
from streamer.model import (
    Completed,
    OutputSummary,
    Page,
    ProgressInfo,
    QueuePosition,
    Request,
    RequestState,
    Submitted,
)
from streamer.output import OutputCollector
from streamer.payload import RawJson
from streamer.worker import Worker

__all__ = [
    "Action",
    "BrokenLog",
    "Cancelled",
    "Client",
    "Completed",
    "Context",
    "ErrorCode",
    "Failure",
    "FatalError",
    "HandlerError",
    "InvalidPayload",
    "LimitExceeded",
    "OutputCollector",
    "OutputSummary",
    "Page",
    "ProgressInfo",
    "QueuePosition",
    "RawJson",
    "Request",
    "RequestCancelled",
    "RequestFailed",
    "RequestState",
    "ServiceError",
    "StreamerError",
    "Submitted",
    "Token",
    "Violation",
    "Worker",
    "WorkerRefused",
    "events",
    "token_file",
]
