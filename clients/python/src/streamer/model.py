"""Requests and their outcomes, as the server tells them."""

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
    """Where a request stands."""

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
    """How far a running attempt is."""

    percentage: float | None
    """0 to 100; None when the handler cannot tell."""
    message: str
    metadata: Any = None


@dataclass(frozen=True)
class OutputSummary:
    """Proof of the output: how many chunks are valid, and SHA-256 over their bytes."""

    chunks: int
    sha256: bytes


@dataclass(frozen=True)
class Completed:
    """How a request ended."""

    request_id: str
    uid: str
    state: RequestState
    result: Any = None
    """The result when it succeeded."""
    failure: Failure | None = None
    """Why, when it did not."""
    output: OutputSummary | None = None
    """None for a sync action, which has no log."""
    seq: int = 0
    """The `seq` of the terminal event; 0 for a sync action."""
    result_bytes: bytes = b""
    """The result as it was sent."""

    def unwrap(self) -> Any:
        """The result. Raises `RequestFailed` or `RequestCancelled`."""
        if self.state is RequestState.SUCCEEDED:
            return self.result
        if self.state is RequestState.CANCELLED:
            reason = self.failure.message if self.failure else ""
            raise RequestCancelled(self.request_id, reason)
        assert self.failure is not None
        raise RequestFailed(self.request_id, self.failure)


@dataclass(frozen=True)
class QueuePosition:
    """How much waits before a queued request: a range, since tenants take turns."""

    earliest: int
    """From 1, if no other tenant's work comes first."""
    latest: int
    """From 1, if all other tenants' work comes first."""
    estimated_start_time: datetime | None
    """From how long such requests took lately; None when that cannot be told."""


@dataclass(frozen=True)
class Submitted:
    """The answer to a submission: the request is durable, or has ended already."""

    request_id: str
    """The caller's `id`, or the `uid` when it gave none."""
    uid: str
    duplicate: bool
    """This `id` had been submitted before: nothing new was started."""
    state: RequestState
    last_seq: int
    """The `seq` of its latest event; 0 for a sync action."""
    completed: Completed | None
    """Its end: of a sync action, or of an async one within `wait`."""
    queue_position: QueuePosition | None = None
    """Where it stands in the queue; None unless it is queued and due."""


@dataclass(frozen=True)
class Request:
    """One request. Payload, metadata and result are None where the call does not tell them."""

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
    """Only when it is queued and due, and not in lists."""


@dataclass(frozen=True)
class Page:
    """A page of requests, newest first."""

    requests: list[Request]
    next_page_token: str
    """Empty when there are no more."""


def timestamp(time: datetime) -> Timestamp:
    """A point in time; one without a zone is taken for local time."""
    stamp = Timestamp()
    stamp.FromDatetime(time.astimezone(timezone.utc))
    return stamp


def moment(stamp: Timestamp) -> datetime:
    """A point in time, in UTC."""
    return stamp.ToDatetime(timezone.utc)


def state(number: int) -> RequestState:
    """The state of a number. Raises ValueError for one that is not known."""
    name = common_pb2.RequestState.Name(number)
    return RequestState(name.removeprefix("REQUEST_STATE_"))


def state_to_proto(one: RequestState) -> str:
    """A state by its name in the schema."""
    return f"REQUEST_STATE_{one.value}"


def failure(error: common_pb2.Error) -> Failure:
    """Why something failed."""
    details = payload.value(error.details) if error.HasField("details") else None
    return Failure(code_from_proto(error.code), error.message, error.retryable, details)


def progress(one: common_pb2.Progress) -> ProgressInfo:
    """How far it is."""
    percentage = one.percentage if one.HasField("percentage") else None
    metadata = payload.value(one.metadata) if one.HasField("metadata") else None
    return ProgressInfo(percentage, one.message, metadata)


def output_summary(summary: common_pb2.OutputSummary) -> OutputSummary:
    """The proof of an output."""
    return OutputSummary(summary.chunks, summary.sha256)


def queue_position(position: common_pb2.QueuePosition) -> QueuePosition:
    """Where a request stands in the queue."""
    told = position.HasField("estimated_start_time")
    start = moment(position.estimated_start_time) if told else None
    return QueuePosition(position.earliest, position.latest, start)


def submitted(response: router_pb2.SubmitResponse) -> Submitted:
    """The answer to a submission."""
    request_id, uid = response.request_id, response.uid
    if not response.HasField("completed"):
        acknowledged = response.acknowledgment
        stands = state(acknowledged.state)
        last_seq = acknowledged.last_seq
        queued = acknowledged.HasField("queue_position")
        position = queue_position(acknowledged.queue_position) if queued else None
        duplicate = acknowledged.duplicate
        return Submitted(request_id, uid, duplicate, stands, last_seq, None, position)
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
    """One request."""

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
