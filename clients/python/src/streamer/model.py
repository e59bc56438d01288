"""Requests and their results, as returned by the server."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from streamer import payload
from streamer._proto import common_pb2, router_pb2
from streamer.action import code_from_proto
from streamer.errors import Failure, RequestCancelled, RequestFailed


class RequestState(str, Enum):
    """State of a request."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def is_terminal(self) -> bool:
        """Whether the request has ended."""
        return self not in (RequestState.QUEUED, RequestState.RUNNING)


@dataclass(frozen=True)
class ProgressInfo:
    """Progress of a running attempt."""

    percentage: float | None
    """From 0 to 100; None if unknown."""
    message: str
    metadata: Any = None


@dataclass(frozen=True)
class OutputSummary:
    """Summary of the output: the number of valid chunks, and the SHA-256 of their bytes."""

    chunks: int
    sha256: bytes


@dataclass(frozen=True)
class Completed:
    """Result or failure of a request that has ended."""

    request_id: str
    uid: str
    state: RequestState
    result: Any = None
    """Result, if the request succeeded."""
    failure: Failure | None = None
    """Failure, if the request did not succeed."""
    output: OutputSummary | None = None
    """Summary of the output; None for a sync action, which has no log."""
    seq: int = 0
    """`seq` of the terminal event; 0 for a sync action."""
    result_bytes: bytes = b""
    """Exact bytes of the result."""

    def unwrap(self) -> Any:
        """Returns the result. Raises `RequestFailed` or `RequestCancelled`."""
        if self.state is RequestState.SUCCEEDED:
            return self.result
        if self.state is RequestState.CANCELLED:
            reason = self.failure.message if self.failure else ""
            raise RequestCancelled(self.request_id, reason)
        assert self.failure is not None
        raise RequestFailed(self.request_id, self.failure)


@dataclass(frozen=True)
class QueuePosition:
    """Position of a queued request: a range, because tenants share the queue fairly."""

    earliest: int
    """Position if no request of another tenant runs first, from 1."""
    latest: int
    """Position if all requests of other tenants run first, from 1."""
    estimated_start_time: datetime | None
    """Start time, estimated from recent requests; None if no estimate is available."""


@dataclass(frozen=True)
class Submitted:
    """Response to a submission: the request is durable or has ended."""

    request_id: str
    """`id` of the caller, or the `uid` if the caller did not specify an `id`."""
    uid: str
    duplicate: bool
    """Whether the `id` was submitted before, so that no new request was created."""
    state: RequestState
    last_seq: int
    """`seq` of the latest event; 0 for a sync action."""
    completed: Completed | None
    """Result or failure of a sync action, or of an async request that ended within `wait`."""
    queue_position: QueuePosition | None = None
    """Position in the queue; None unless the request is queued and due."""


@dataclass(frozen=True)
class Request:
    """One request. Payload, metadata and result are None if the call does not return them."""

    uid: str
    request_id: str
    tenant_id: str
    user_id: str
    action: str
    state: RequestState
    attempt: int
    last_seq: int
    create_time: datetime | None
    start_time: datetime | None
    finish_time: datetime | None
    not_before: datetime | None
    deadline: datetime | None
    priority: int
    progress: ProgressInfo | None
    metadata: Any
    payload: Any
    result: Any
    failure: Failure | None
    cancel_requested: bool
    output: OutputSummary | None
    redrive_of: str
    queue_position: QueuePosition | None
    """Position in the queue, if the request is queued and due; None in lists."""


@dataclass(frozen=True)
class Page:
    """A page of requests, newest first."""

    requests: list[Request]
    next_page_token: str
    """Token of the next page; empty on the last page."""


def timestamp(time: datetime) -> Timestamp:
    """Converts a datetime to a protobuf message; without a time zone, it is local time."""
    stamp = Timestamp()
    stamp.FromDatetime(time.astimezone(timezone.utc))
    return stamp


def moment(stamp: Timestamp) -> datetime:
    """Converts a protobuf message to a datetime in UTC."""
    return stamp.ToDatetime(timezone.utc)


def state(number: int) -> RequestState:
    """Returns the state with the given number. Raises ValueError if the number is unknown."""
    name = common_pb2.RequestState.Name(number)
    return RequestState(name.removeprefix("REQUEST_STATE_"))


def state_to_proto(one: RequestState) -> str:
    """Returns the name of a state in the protobuf schema."""
    return f"REQUEST_STATE_{one.value}"


def failure(error: common_pb2.Error) -> Failure:
    """Returns the failure in a message."""
    details = payload.value(error.details) if error.HasField("details") else None
    return Failure(code_from_proto(error.code), error.message, error.retryable, details)


def progress(one: common_pb2.Progress) -> ProgressInfo:
    """Returns the progress in a message."""
    percentage = one.percentage if one.HasField("percentage") else None
    metadata = payload.value(one.metadata) if one.HasField("metadata") else None
    return ProgressInfo(percentage, one.message, metadata)


def output_summary(summary: common_pb2.OutputSummary) -> OutputSummary:
    """Returns the output summary in a message."""
    return OutputSummary(summary.chunks, summary.sha256)


def queue_position(position: common_pb2.QueuePosition) -> QueuePosition:
    """Returns the queue position in a message."""
    has_estimate = position.HasField("estimated_start_time")
    start = moment(position.estimated_start_time) if has_estimate else None
    return QueuePosition(position.earliest, position.latest, start)


def submitted(response: router_pb2.SubmitResponse) -> Submitted:
    """Returns the submission in a response."""
    request_id, uid = response.request_id, response.uid
    if not response.HasField("completed"):
        acknowledged = response.acknowledgment
        current = state(acknowledged.state)
        last_seq = acknowledged.last_seq
        queued = acknowledged.HasField("queue_position")
        position = queue_position(acknowledged.queue_position) if queued else None
        duplicate = acknowledged.duplicate
        return Submitted(request_id, uid, duplicate, current, last_seq, None, position)
    ended = response.completed
    completed = Completed(
        request_id,
        uid,
        state(ended.state),
        result=payload.value(ended.result) if ended.HasField("result") else None,
        failure=failure(ended.error) if ended.HasField("error") else None,
        output=output_summary(ended.output) if ended.HasField("output") else None,
        seq=ended.seq,
        result_bytes=ended.result.data,
    )
    return Submitted(request_id, uid, ended.duplicate, completed.state, ended.seq, completed)


def request(one: common_pb2.Request) -> Request:
    """Returns the request in a message."""

    def time(name: str) -> datetime | None:
        return moment(getattr(one, name)) if one.HasField(name) else None

    def content(name: str) -> Any:
        return payload.value(getattr(one, name)) if one.HasField(name) else None

    return Request(
        uid=one.uid,
        request_id=one.request_id,
        tenant_id=one.tenant_id,
        user_id=one.user_id,
        action=one.action,
        state=state(one.state),
        attempt=one.attempt,
        last_seq=one.last_seq,
        create_time=time("create_time"),
        start_time=time("start_time"),
        finish_time=time("finish_time"),
        not_before=time("not_before"),
        deadline=time("deadline"),
        priority=one.priority,
        progress=progress(one.progress) if one.HasField("progress") else None,
        metadata=content("metadata"),
        payload=content("payload"),
        result=content("result"),
        failure=failure(one.error) if one.HasField("error") else None,
        cancel_requested=one.cancel_requested,
        output=output_summary(one.output) if one.HasField("output") else None,
        redrive_of=one.redrive_of,
        queue_position=queue_position(one.queue_position)
        if one.HasField("queue_position")
        else None,
    )
