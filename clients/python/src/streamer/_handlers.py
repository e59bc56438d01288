"""Runs a handler and returns its result or error."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from streamer import payload
from streamer._limits import check
from streamer.context import Context
from streamer.errors import ErrorCode, FatalError, HandlerError, InvalidPayload

Handler: TypeAlias = Callable[[Context, Any], Awaitable[Any]]
"""Async function that runs one attempt: receives the context and the parsed payload, and returns
the result."""

_logger = logging.getLogger("streamer.worker")


@dataclass(frozen=True)
class HandlerResult:
    """Result of one handler run: the returned value as JSON, or an error."""

    result: bytes = b""
    error: HandlerError | None = None


async def run(handler: Handler, context: Context) -> HandlerResult:
    """Runs a handler and returns its result or error. Converts an exception that is not a
    `HandlerError` to a retryable error with code PROCESSING_FAILED. Raises only
    `asyncio.CancelledError`, if the handler was interrupted."""
    try:
        result = await handler(context, _parse(context))
        return HandlerResult(result=_encode(result, context))
    except HandlerError as error:
        return HandlerResult(error=error)
    except asyncio.CancelledError:
        raise
    except Exception as error:
        _logger.warning("handler of %s failed on %s", context.action, context.uid, exc_info=True)
        wrapped = HandlerError(_describe(error))
        wrapped.__cause__ = error
        return HandlerResult(error=wrapped)


def interrupted_error() -> HandlerError:
    """Returns the error of an attempt whose handler raised `asyncio.CancelledError` although the
    request was not cancelled."""
    return HandlerError("the handler ended with asyncio.CancelledError")


def cancelled_error() -> HandlerError:
    """Returns the error of an attempt whose handler was interrupted because the request was
    cancelled."""
    message = "the handler was interrupted: the request was cancelled"
    return FatalError(message, code=ErrorCode.CANCELLED)


def _describe(error: Exception) -> str:
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except Exception:
        # `__str__` is application code and may raise an exception.
        _logger.warning("failed to convert a %s to a string", name, exc_info=True)
        return name


def _parse(context: Context) -> Any:
    try:
        return payload.decode(context.content_type, context.payload_bytes)
    except ValueError as error:
        raise InvalidPayload("payload", f"is not {context.content_type}: {error}") from error


def _encode(result: Any, context: Context) -> bytes:
    try:
        data = payload.encode_json(result)
    except (TypeError, ValueError) as error:
        raise FatalError(f"result: cannot be encoded as JSON: {error}") from error
    limit = context.reporter.limits.max_payload_bytes
    check("result", len(data), limit, "welcome.max_payload_bytes")
    return data
