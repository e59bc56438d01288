"""Tests of `streamer.testing`."""

from __future__ import annotations

import asyncio
from typing import Any

from streamer import Cancelled, Context, ErrorCode, FatalError, LimitExceeded
from streamer.testing import run_handler


async def count(context: Context, payload: dict[str, Any]) -> dict[str, Any]:
    done = context.checkpoint["done"] if context.checkpoint else []
    for chunk in done:
        await context.output(chunk)
    for number in range(len(done), payload["to"]):
        context.raise_if_cancelled()
        await context.progress(100 * number / payload["to"], f"at {number}")
        done.append({"number": number})
        await context.output(done[-1])
        await context.save_checkpoint({"done": done})
    await context.heartbeat()
    return {"attempt": context.attempt}


async def test_reports_of_a_handler_are_recorded() -> None:
    run = await run_handler(count, {"to": 3}, checkpoint={"done": [{"number": 0}]}, attempt=2)
    assert run.result == {"attempt": 2}
    assert run.error is None
    assert run.output == [{"number": 0}, {"number": 1}, {"number": 2}]
    assert [one.message for one in run.progress] == ["at 1", "at 2"]
    assert (run.checkpoint, len(run.checkpoints), run.heartbeats) == ({"done": run.output}, 2, 1)


async def test_a_running_handler_can_be_cancelled() -> None:
    run = await run_handler(count, {"to": 10}, cancel_when=lambda run: len(run.output) == 4)
    assert run.cancelled
    assert run.checkpoint == {"done": run.output}


async def test_a_sleeping_handler_is_woken_by_cancellation() -> None:
    async def sleeps(context: Context, payload: Any) -> None:
        await context.progress(1)
        await context.sleep(3600)

    run = await run_handler(sleeps, cancel_when=lambda run: bool(run.progress))
    assert isinstance(run.error, Cancelled)


async def test_a_handler_that_ignores_cancellation_is_interrupted() -> None:
    async def ignores_cancellation(context: Context, payload: Any) -> None:
        await asyncio.Event().wait()

    run = await run_handler(ignores_cancellation, cancel_when=lambda run: True, cancel_grace=0)
    assert run.cancelled


async def test_a_cancelled_handler_may_succeed() -> None:
    async def ends(context: Context, payload: Any) -> str:
        assert context.cancelled.is_set()
        return "done"

    run = await run_handler(ends, cancel_when=lambda run: True)
    assert (run.result, run.error) == ("done", None)


async def test_errors_are_recorded_as_a_worker_reports_them() -> None:
    async def breaks(context: Context, payload: Any) -> None:
        raise KeyError("missing")

    async def refuses(context: Context, payload: Any) -> None:
        raise FatalError("never")

    async def unwritable(context: Context, payload: Any) -> object:
        return object()

    async def floods(context: Context, payload: Any) -> None:
        await context.output(b"x" * (1024 * 1024 + 1))

    run = await run_handler(breaks)
    assert run.error is not None
    assert (run.error.code, run.error.retryable) == (ErrorCode.PROCESSING_FAILED, True)
    assert isinstance(run.error.__cause__, KeyError)
    for handler in (refuses, unwritable, floods):
        run = await run_handler(handler)
        assert run.error is not None
        assert not run.error.retryable
    assert isinstance(run.error, LimitExceeded)
