"""Runs a handler, and says how it ended."""

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
"""An async function that runs one attempt: context and parsed payload in, result out."""

_logger = logging.getLogger("streamer.worker")


@dataclass(frozen=True)
class Ending:
    """How a handler ended: with a result, which is JSON, or with an error."""

    result: bytes = b""
    error: HandlerError | None = None


async def run(handler: Handler, context: Context) -> Ending:
    """Runs a handler. Raises `asyncio.CancelledError` when it was interrupted by that, else
    nothing: an exception that is no `HandlerError` becomes a retryable PROCESSING_FAILED."""
    try:
        result = await handler(context, _parse(context))
        return Ending(result=_encode(result, context))
    except HandlerError as error:
        return Ending(error=error)
    except asyncio.CancelledError:
        raise
    except Exception as error:
        _logger.warning("handler of %s failed on %s", context.action, context.uid, exc_info=True)
        wrapped = HandlerError(_told(error))
        wrapped.__cause__ = error
        return Ending(error=wrapped)


def interrupted() -> HandlerError:
    """Why an attempt failed whose handler raised `asyncio.CancelledError` though nobody asked it
    to."""
    return HandlerError("the handler ended with asyncio.CancelledError")


def cut_short() -> HandlerError:
    """Why an attempt failed whose handler was interrupted because the request was cancelled."""
    message = "the handler was interrupted: the request was cancelled"
    return FatalError(message, code=ErrorCode.CANCELLED)


def _told(error: Exception) -> str:
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except Exception:
        # It is the handler's own code that says what its errors are.
        _logger.warning("a %s cannot say what it is", name, exc_info=True)
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
        raise FatalError(f"result: cannot be written as JSON: {error}") from error
    limit = context.reporter.limits.max_payload_bytes
    check("result", len(data), limit, "welcome.max_payload_bytes")
    return data
