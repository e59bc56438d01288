"""Events of a request's log.

Every log begins with `Accepted` (seq 1) and ends with one terminal event: `Succeeded`, `Failed` or
`Cancelled`. Events are numbered without gaps and never change.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

from streamer import model, payload
from streamer._proto import common_pb2
from streamer.errors import ErrorCode, Failure
from streamer.model import Completed, OutputSummary, RequestState


@dataclass(frozen=True)
class _Event:
    seq: int
    """Position in the log, from 1."""
    attempt: int
    """Number of the attempt to which the event belongs, from 1; 0 before the first attempt."""
    time: datetime
    """Time at which the event was reported, according to the server's clock."""


@dataclass(frozen=True)
class Accepted(_Event):
    """The request is stored and will run."""

    action: str


@dataclass(frozen=True)
class Started(_Event):
    """An attempt started."""

    worker: str
    """Processor or worker that runs the attempt."""


@dataclass(frozen=True)
class Progress(_Event):
    """Progress of the attempt."""

    percentage: float | None
    """From 0 to 100; None if unknown."""
    message: str
    metadata: Any = None


@dataclass(frozen=True)
class Output(_Event):
    """The next chunk of output. It is void after a `Retrying` or `Failed` event whose
    `rewind_to_seq` is less than its `seq`."""

    data: bytes
    """Exact bytes of the chunk."""
    content_type: str
    chunk_index: int
    """Position in the output of the attempt, from 0."""

    @property
    def value(self) -> Any:
        """Value of the chunk: parsed JSON, str for `text/…`, bytes for all other types."""
        return payload.decode(self.content_type, self.data)


@dataclass(frozen=True)
class Retrying(_Event):
    """The attempt failed or was handed back, and another follows. Output after `rewind_to_seq` is void."""

    retry_at: datetime
    rewind_to_seq: int
    failure: Failure


@dataclass(frozen=True)
class Succeeded(_Event):
    """Terminal event: the request succeeded."""

    result: Any
    output: OutputSummary
    result_bytes: bytes = b""
    """Exact bytes of the result."""


@dataclass(frozen=True)
class Failed(_Event):
    """Terminal event: the request failed. Output after `rewind_to_seq` is void."""

    failure: Failure
    rewind_to_seq: int
    output: OutputSummary


@dataclass(frozen=True)
class Cancelled(_Event):
    """Terminal event: the request was cancelled. Its output remains valid."""

    reason: str
    output: OutputSummary


@dataclass(frozen=True)
class Unknown(_Event):
    """Event of a type that this version of the package does not know."""


Event: TypeAlias = (
    Accepted | Started | Progress | Output | Retrying | Succeeded | Failed | Cancelled | Unknown
)
Terminal: TypeAlias = Succeeded | Failed | Cancelled


def from_proto(event: common_pb2.Event) -> Event:
    """Returns the event in a gRPC message."""
    seq, attempt, time = event.seq, event.attempt, model.moment(event.time)
    kind = event.WhichOneof("kind")
    if kind == "accepted":
        return Accepted(seq, attempt, time, event.accepted.action)
    if kind == "started":
        return Started(seq, attempt, time, event.started.worker)
    if kind == "progress":
        info = model.progress(event.progress)
        return Progress(seq, attempt, time, info.percentage, info.message, info.metadata)
    if kind == "output":
        chunk = event.output
        content_type = chunk.data.content_type or payload.JSON
        return Output(seq, attempt, time, payload.body(chunk.data), content_type, chunk.chunk_index)
    if kind == "retrying":
        retry_at = model.moment(event.retrying.retry_at)
        failure = model.failure(event.retrying.error)
        return Retrying(seq, attempt, time, retry_at, event.retrying.rewind_to_seq, failure)
    return _terminal(event, seq, attempt, time)


def _terminal(event: common_pb2.Event, seq: int, attempt: int, time: datetime) -> Event:
    kind = event.WhichOneof("kind")
    if kind == "succeeded":
        result = event.succeeded.result
        summary = model.output_summary(event.succeeded.output)
        return Succeeded(seq, attempt, time, payload.value(result), summary, payload.body(result))
    if kind == "failed":
        failure = model.failure(event.failed.error)
        summary = model.output_summary(event.failed.output)
        return Failed(seq, attempt, time, failure, event.failed.rewind_to_seq, summary)
    if kind == "cancelled":
        summary = model.output_summary(event.cancelled.output)
        return Cancelled(seq, attempt, time, event.cancelled.reason, summary)
    return Unknown(seq, attempt, time)


def completed(event: Terminal, request_id: str, uid: str) -> Completed:
    """Returns the result or failure in a terminal event."""
    summary, seq = event.output, event.seq
    if isinstance(event, Succeeded):
        return Completed(
            request_id,
            uid,
            RequestState.SUCCEEDED,
            result=event.result,
            output=summary,
            seq=seq,
            result_bytes=event.result_bytes,
        )
    if isinstance(event, Failed):
        state, failure = RequestState.FAILED, event.failure
    else:
        state = RequestState.CANCELLED
        failure = Failure(ErrorCode.CANCELLED, event.reason)
    return Completed(request_id, uid, state, failure=failure, output=summary, seq=seq)
