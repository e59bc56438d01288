"""Parses messages from the server in protocol `streamer.v1.json`."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from streamer import events, payload
from streamer._websocket import rawjson
from streamer._websocket.rawjson import Member
from streamer.errors import ErrorCode, Failure, ServiceError, Violation
from streamer.events import Event
from streamer.model import OutputSummary


@dataclass(frozen=True)
class Frame:
    """One message from the server."""

    members: dict[str, Member]

    def get(self, name: str, otherwise: Any = None) -> Any:
        """Returns the value of member `name`, or `otherwise` if the member is missing."""
        member = self.members.get(name)
        return otherwise if member is None else member.value

    @property
    def type(self) -> str:
        """Type of the message."""
        return str(self.get("type", ""))


def parse(text: str) -> Frame:
    """Parses a message. Raises ValueError if `text` is not a JSON object."""
    return Frame(rawjson.members(text))


def event(frame: Frame) -> Event:
    """Returns the event of a request's log in a message. Raises ValueError or KeyError if a field
    is missing or invalid."""
    seq, attempt = int(frame.get("seq")), int(frame.get("attempt", 0))
    time, kind = _timestamp(frame.get("timestamp")), frame.type
    if kind == "accepted":
        return events.Accepted(seq, attempt, time, str(frame.get("action", "")))
    if kind == "started":
        return events.Started(seq, attempt, time, str(frame.get("worker", "")))
    if kind == "progress":
        value, message = frame.get("percentage"), str(frame.get("message", ""))
        percentage = None if value is None else float(value)
        return events.Progress(seq, attempt, time, percentage, message, frame.get("metadata"))
    if kind == "output":
        content_type, data = content(frame, "data")
        index = int(frame.get("chunk_index", 0))
        return events.Output(seq, attempt, time, data, content_type, index)
    if kind == "retrying":
        retry_at, rewind = _timestamp(frame.get("retry_at")), int(frame.get("rewind_to_seq"))
        return events.Retrying(seq, attempt, time, retry_at, rewind, failure(frame))
    return _terminal(frame, seq, attempt, time)


def _terminal(frame: Frame, seq: int, attempt: int, time: datetime) -> Event:
    kind = frame.type
    if kind == "complete":
        content_type, data = content(frame, "result")
        result = payload.decode(content_type, data)
        return events.Succeeded(seq, attempt, time, result, _summary(frame), data)
    if kind == "error":
        rewind = int(frame.get("rewind_to_seq", seq))
        return events.Failed(seq, attempt, time, failure(frame), rewind, _summary(frame))
    if kind == "cancelled":
        reason = str(frame.get("reason", ""))
        return events.Cancelled(seq, attempt, time, reason, _summary(frame))
    return events.Unknown(seq, attempt, time)


def content(frame: Frame, name: str) -> tuple[str, bytes]:
    """Returns the content type and bytes of the payload in member `name`. The member contains JSON
    as its source text, text as a string, and all other payloads in base64."""
    member = frame.members[name]
    content_type = str(frame.get("content_type", payload.JSON))
    if payload.is_json(content_type):
        return payload.JSON, member.text.encode()
    if frame.get("encoding") == "base64":
        return content_type, base64.b64decode(member.value)
    return content_type, str(member.value).encode()


def failure(frame: Frame) -> Failure:
    """Returns the failure in member `error` of an event."""
    error = frame.get("error") or {}
    return Failure(
        _code(error.get("code")),
        str(error.get("message", "")),
        bool(error.get("retryable", False)),
        error.get("details"),
    )


def service_error(frame: Frame) -> ServiceError:
    """Returns the error in a message that rejects a message of the client."""
    error = failure(frame)
    details = error.details if isinstance(error.details, dict) else {}
    violations = [
        Violation(str(one.get("field", "")), str(one.get("description", "")))
        for one in details.get("violations", ())
    ]
    return ServiceError(error.code, error.message, violations=tuple(violations))


def _code(name: object) -> ErrorCode:
    try:
        return ErrorCode(str(name))
    except ValueError:
        return ErrorCode.INTERNAL_ERROR


def _summary(frame: Frame) -> OutputSummary:
    summary = frame.get("output") or {}
    return OutputSummary(int(summary.get("chunks", 0)), bytes.fromhex(summary.get("sha256", "")))


def _timestamp(text: object) -> datetime:
    # Python 3.10 does not parse the suffix Z.
    return datetime.fromisoformat(str(text).replace("Z", "+00:00"))
