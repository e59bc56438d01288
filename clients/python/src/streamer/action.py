"""Declarations of actions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias

from streamer import payload
from streamer._proto import common_pb2
from streamer.errors import ErrorCode

Seconds: TypeAlias = "float | timedelta"
"""Duration: a number of seconds, or a timedelta."""


@dataclass(frozen=True)
class Action:
    """Declaration of an action. Times are in seconds; None selects the server's default: 3
    attempts, backoff from 1 s to 1 min, and no limit for everything else."""

    name: str
    """Name of the action; must match `[a-z][a-z0-9_.-]{0,63}`."""
    description: str = ""
    sync: bool = False
    """Whether a call returns the result directly, and the request is neither queued nor stored."""
    estimated_duration: Seconds | None = None
    """Typical duration of a run. If it is below the server's threshold (5 s by default), the action
    is sync."""
    max_attempts: int | None = None
    """Maximum number of attempts, at least 1. Attempts that were handed back do not count."""
    start_to_close: Seconds | None = None
    """Maximum duration of one attempt."""
    heartbeat_timeout: Seconds | None = None
    """Maximum time between reports of a running handler; the attempt fails when it is exceeded."""
    schedule_to_start: Seconds | None = None
    """Maximum time between the due time of a request and its first attempt."""
    schedule_to_close: Seconds | None = None
    """Maximum time between the due time of a request and its end, including all retries."""
    initial_backoff: Seconds | None = None
    """Initial bound of the wait between attempts. It doubles after each attempt; waits have full
    jitter."""
    max_backoff: Seconds | None = None
    """Maximum bound of the wait between attempts."""
    final_errors: tuple[ErrorCode, ...] = ()
    """Error codes that are not retried."""
    permission: str = ""
    """Permission that a caller requires; empty if none is required."""
    max_concurrency: int | None = None
    """Maximum number of concurrent runs on one processor."""
    payload_schema: str = ""
    """JSON Schema (2020-12) of the payload, as JSON text; empty if any payload is valid."""
    workers: int = 0
    """Number of workers that offer the action; 0 if the processor runs it itself or if the action
    is not available. Set by the server; ignored in a declaration."""
    available: bool = True
    """Whether a worker or a processor offers the action. Set by the server; ignored in a
    declaration."""

    def to_proto(self) -> common_pb2.Action:
        """Returns the declaration as a protobuf message."""
        return common_pb2.Action(
            name=self.name,
            description=self.description,
            sync=self.sync,
            estimated_duration_ms=_millis(self.estimated_duration),
            max_attempts=self.max_attempts or 0,
            start_to_close_ms=_millis(self.start_to_close),
            heartbeat_timeout_ms=_millis(self.heartbeat_timeout),
            schedule_to_start_ms=_millis(self.schedule_to_start),
            schedule_to_close_ms=_millis(self.schedule_to_close),
            initial_backoff_ms=_millis(self.initial_backoff),
            max_backoff_ms=_millis(self.max_backoff),
            final_errors=[code_to_proto(code) for code in self.final_errors],
            permission=self.permission,
            max_concurrency=self.max_concurrency or 0,
            payload_schema=self.payload_schema,
        )

    @classmethod
    def from_proto(cls, action: common_pb2.Action) -> Action:
        """Returns the action in a message from the server."""
        return cls(
            name=action.name,
            description=action.description,
            sync=action.sync,
            estimated_duration=_seconds(action.estimated_duration_ms),
            max_attempts=action.max_attempts or None,
            start_to_close=_seconds(action.start_to_close_ms),
            heartbeat_timeout=_seconds(action.heartbeat_timeout_ms),
            schedule_to_start=_seconds(action.schedule_to_start_ms),
            schedule_to_close=_seconds(action.schedule_to_close_ms),
            initial_backoff=_seconds(action.initial_backoff_ms),
            max_backoff=_seconds(action.max_backoff_ms),
            final_errors=tuple(code_from_proto(code) for code in action.final_errors),
            permission=action.permission,
            max_concurrency=action.max_concurrency or None,
            payload_schema=action.payload_schema,
            workers=action.workers,
            available=action.available,
        )


def schema_text(schema: Any) -> str:
    """Returns the text of a JSON Schema, which is text or a value that `json.dumps` accepts."""
    if schema is None or isinstance(schema, str):
        return schema or ""
    return payload.encode_json(schema).decode()


def codes(names: Iterable[ErrorCode | str]) -> tuple[ErrorCode, ...]:
    """Returns the error codes with the given names. Raises ValueError if a name is unknown."""
    return tuple(ErrorCode(name) for name in names)


def code_to_proto(code: ErrorCode) -> str:
    """Returns the name of an error code in the protobuf schema."""
    return f"ERROR_CODE_{code.value}"


def code_from_proto(number: int) -> ErrorCode:
    """Returns the error code with the given number in the protobuf schema; INTERNAL_ERROR if this
    version does not know the number."""
    try:
        name = common_pb2.ErrorCode.Name(number)
        return ErrorCode(name.removeprefix("ERROR_CODE_"))
    except ValueError:
        return ErrorCode.INTERNAL_ERROR


def seconds(time: Seconds) -> float:
    """Returns a duration in seconds."""
    return time.total_seconds() if isinstance(time, timedelta) else time


def _millis(time: Seconds | None) -> int:
    if time is None:
        return 0
    millis = round(seconds(time) * 1000)
    if millis <= 0:
        raise ValueError(f"a time limit must be at least 1 ms, is {time}")
    return millis


def _seconds(millis: int) -> float | None:
    return millis / 1000 if millis else None
