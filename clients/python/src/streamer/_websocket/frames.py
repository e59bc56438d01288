"""What the server says: frames of `streamer.v1.json`."""

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
    """One message of the server."""

    members: dict[str, Member]

    def get(self, name: str, otherwise: Any = None) -> Any:
        """The value of a member."""
        member = self.members.get(name)
        return otherwise if member is None else member.value

    @property
    def type(self) -> str:
        """What it is."""
        return str(self.get("type", ""))


def parse(text: str) -> Frame:
    """Reads a message. Raises ValueError when it is no JSON object."""
    return Frame(rawjson.members(text))


def event(frame: Frame) -> Event:
    """An event of a request's log. Raises ValueError or KeyError when a field is missing or
    wrong."""
    seq, attempt = int(frame.get("seq")), int(frame.get("attempt", 0))
    time, kind = _moment(frame.get("timestamp")), frame.type
    if kind == "accepted":
        return events.Accepted(seq, attempt, time, str(frame.get("action", "")))
    if kind == "started":
        return events.Started(seq, attempt, time, str(frame.get("worker", "")))
    if kind == "progress":
        percentage, message = frame.get("percentage"), str(frame.get("message", ""))
        far = None if percentage is None else float(percentage)
        return events.Progress(seq, attempt, time, far, message, frame.get("metadata"))
    if kind == "output":
        content_type, data = content(frame, "data")
        index = int(frame.get("chunk_index", 0))
        return events.Output(seq, attempt, time, data, content_type, index)
    if kind == "retrying":
        retry_at, rewind = _moment(frame.get("retry_at")), int(frame.get("rewind_to_seq"))
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
    """Content type and bytes of a payload: JSON is the text of the member as it stands, text is a
    string, everything else base64."""
    member = frame.members[name]
    content_type = str(frame.get("content_type", payload.JSON))
    if payload.is_json(content_type):
        return payload.JSON, member.text.encode()
    if frame.get("encoding") == "base64":
        return content_type, base64.b64decode(member.value)
    return content_type, str(member.value).encode()


def failure(frame: Frame) -> Failure:
    """The `error` of a frame."""
    told = frame.get("error") or {}
    return Failure(
        _code(told.get("code")),
        str(told.get("message", "")),
        bool(told.get("retryable", False)),
        told.get("details"),
    )


def refusal(frame: Frame) -> ServiceError:
    """The `error` of a frame that refuses a message."""
    told = failure(frame)
    details = told.details if isinstance(told.details, dict) else {}
    violations = [
        Violation(str(one.get("field", "")), str(one.get("description", "")))
        for one in details.get("violations", ())
    ]
    return ServiceError(told.code, told.message, violations=tuple(violations))


def _code(name: object) -> ErrorCode:
    try:
        return ErrorCode(str(name))
    except ValueError:
        return ErrorCode.INTERNAL_ERROR


def _summary(frame: Frame) -> OutputSummary:
    told = frame.get("output") or {}
    return OutputSummary(int(told.get("chunks", 0)), bytes.fromhex(told.get("sha256", "")))


def _moment(text: object) -> datetime:
    # Python 3.10 does not know the Z.
    return datetime.fromisoformat(str(text).replace("Z", "+00:00"))
