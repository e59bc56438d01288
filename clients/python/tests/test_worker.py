"""Workers against a real server: handlers, reports, retries, cancellation, limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from harness import Server, serving, within_timeout

from streamer import (
    Cancelled,
    Client,
    Context,
    ErrorCode,
    FatalError,
    HandlerError,
    InvalidPayload,
    LimitExceeded,
    OutputCollector,
    RawJson,
    RequestCancelled,
    RequestFailed,
    ServiceError,
    Worker,
    WorkerRefused,
    events,
)

NewWorker = Callable[[], Worker]
QUICK: dict[str, Any] = {"initial_backoff": 0.01, "max_backoff": 0.01}


async def test_the_client_receives_the_reports_of_the_handler(
    server: Server, client: Client, new_worker: NewWorker
) -> None:
    worker = new_worker()
    seen: list[Context] = []

    @worker.action("report", description="Reports", estimated_duration=60)
    async def report(context: Context, payload: dict[str, Any]) -> dict[str, Any]:
        seen.append(context)
        await context.progress(50, "half", {"rows": payload["rows"]})
        await context.output("text é")
        await context.output(b"\x00\xff")
        await context.output({"n": 2**63 - 1})
        await context.output(RawJson(b'{ "as" : "it is" }'))
        await context.progress(message="no percentage")
        return {"rows": payload["rows"]}

    progress: list[events.Progress] = []
    output: list[events.Output] = []
    async with serving(worker, server):
        result = await client.run(
            "report",
            {"rows": 2**63 - 1},
            on_progress=progress.append,
            on_output=output.append,
            id="all-of-it",
        )
    assert result == {"rows": 2**63 - 1}
    received = [(one.percentage, one.message, one.metadata) for one in progress]
    assert received == [(50, "half", {"rows": 2**63 - 1}), (None, "no percentage", None)]
    assert [one.value for one in output] == [
        "text é",
        b"\x00\xff",
        {"n": 2**63 - 1},
        {"as": "it is"},
    ]
    assert output[3].data == b'{ "as" : "it is" }'
    assert [one.chunk_index for one in output] == [0, 1, 2, 3]
    [context] = seen
    assert (context.request_id, context.tenant_id, context.user_id) == ("all-of-it", "dev", "u")
    assert (context.action, context.attempt, context.checkpoint) == ("report", 1, None)


async def test_a_sync_action_returns_its_result(
    server: Server, client: Client, new_worker: NewWorker
) -> None:
    worker = new_worker()

    @worker.action("add", sync=True)
    async def add(context: Context, payload: list[int]) -> int:
        await context.progress(50, "discarded")
        await context.output("discarded, too")
        await context.save_checkpoint({})
        if not payload:
            raise FatalError("nothing to add")
        return sum(payload)

    async with serving(worker, server):
        submitted = await client.submit("add", [1, 2])
        assert submitted.completed is not None
        assert (submitted.completed.result, submitted.completed.output) == (3, None)
        with pytest.raises(RequestFailed, match="nothing to add"):
            await client.run("add", [])


async def test_a_failed_attempt_has_void_output_and_keeps_its_checkpoint(
    server: Server, client: Client, new_worker: NewWorker
) -> None:
    worker = new_worker()

    @worker.action("twice", **QUICK)
    async def twice(context: Context, payload: Any) -> Any:
        done = context.checkpoint["done"] if context.checkpoint else []
        begin = len(done)
        for number in done:
            await context.output({"attempt": context.attempt, "number": number})
        for number in range(begin, begin + 3):
            await context.output({"attempt": context.attempt, "number": number})
            done.append(number)
            await context.save_checkpoint({"done": done})
        if context.attempt == 1:
            raise OSError("the disk is full")
        return begin

    collector = OutputCollector()
    retries: list[events.Retrying] = []
    async with serving(worker, server):
        submitted = await client.submit("twice")
        async for event in client.watch(submitted.uid):
            collector.apply(event)
            if isinstance(event, events.Retrying):
                retries.append(event)
        ended = await client.wait(submitted.uid)
    assert collector.values == [{"attempt": 2, "number": number} for number in range(6)]
    assert ended.result == 3
    [retry] = retries
    assert retry.failure.message == "OSError: the disk is full"
    assert (retry.failure.code, retry.failure.retryable) == (ErrorCode.PROCESSING_FAILED, True)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FatalError("no", code=ErrorCode.CONFLICT, details={"a": 1}), ErrorCode.CONFLICT),
        (InvalidPayload("payload.rows", "must be there"), ErrorCode.VALIDATION_ERROR),
    ],
)
async def test_final_errors_are_not_retried(
    server: Server, client: Client, new_worker: NewWorker, error: Exception, code: ErrorCode
) -> None:
    worker = new_worker()

    @worker.action("fails", **QUICK)
    async def fails(context: Context, payload: Any) -> Any:
        raise error

    async with serving(worker, server):
        with pytest.raises(RequestFailed) as raised:
            await client.run("fails", id=f"fails-{code.value}")
        request = await client.get(f"fails-{code.value}")
    failure = raised.value.failure
    assert (failure.code, failure.retryable, request.attempt) == (code, False, 1)
    assert failure.details


class FailingStr(Exception):
    def __str__(self) -> str:
        raise LookupError("no text")


class WithoutFailure(HandlerError):
    def __init__(self) -> None:
        pass  # does not set `failure`


@pytest.mark.parametrize(
    ("name", "raises", "code", "message", "details"),
    [
        ("code", lambda: FatalError("x", code="NOT_FOUND"), "NOT_FOUND", "x", None),
        ("text", lambda: FatalError(OSError("x")), "PROCESSING_FAILED", "x", None),  # type: ignore[arg-type]
        ("mute", FailingStr, "PROCESSING_FAILED", "FailingStr", None),
        ("none", WithoutFailure, "PROCESSING_FAILED", "the error could not be reported", None),
        ("long", lambda: FatalError("x", details={"d": "x" * 6_000_000}), None, "x", None),
        ("full", lambda: FatalError("x", details="x" * 65_535), None, "x", None),
        ("odd", lambda: FatalError("x", details={"d": object()}), None, "x", None),
        (
            "kept",
            lambda: FatalError("x", details={"d": "x" * 60_000}),
            None,
            "x",
            {"d": "x" * 60_000},
        ),
    ],
)
async def test_an_attempt_ends_with_any_exception_of_its_handler(
    server: Server,
    client: Client,
    new_worker: NewWorker,
    name: str,
    raises: Callable[[], Exception],
    code: str | None,
    message: str,
    details: Any,
) -> None:
    worker = new_worker()

    @worker.action(f"raises-{name}", max_attempts=1)
    async def fails(context: Context, payload: Any) -> None:
        raise raises()

    async with serving(worker, server):
        with pytest.raises(RequestFailed) as raised:
            await within_timeout(client.run(f"raises-{name}"))
    failure = raised.value.failure
    assert (failure.code, failure.message) == (code or "PROCESSING_FAILED", message)
    assert failure.details == details


async def test_a_cancellation_reaches_the_handler(
    server: Server, client: Client, new_worker: NewWorker
) -> None:
    worker = new_worker()
    began = asyncio.Event()
    reasons: list[str] = []

    @worker.action("sleeps")
    async def sleeps(context: Context, payload: Any) -> None:
        await context.output("kept")
        began.set()
        try:
            await context.sleep(3600)
        except Cancelled:
            reasons.append(context.cancel_reason)
            raise

    output: list[events.Output] = []
    async with serving(worker, server):
        running = asyncio.ensure_future(client.run("sleeps", id="c-1", on_output=output.append))
        await within_timeout(began.wait())
        await client.cancel("c-1", "no longer needed")
        with pytest.raises(RequestCancelled, match="no longer needed"):
            await within_timeout(running)
    assert reasons == ["no longer needed"]
    assert [one.value for one in output] == ["kept"]


async def test_a_handler_that_ignores_cancellation_is_interrupted(
    server: Server, client: Client, new_worker: NewWorker
) -> None:
    worker = new_worker()
    began, interrupted = asyncio.Event(), asyncio.Event()

    @worker.action("ignores-cancellation")
    async def ignores_cancellation(context: Context, payload: Any) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            interrupted.set()
            raise

    async with serving(worker, server):
        submitted = await client.submit("ignores-cancellation")
        await within_timeout(began.wait())
        await client.cancel(submitted.uid)
        await within_timeout(interrupted.wait())
        ended = await client.wait(submitted.uid)
    assert ended.state == "CANCELLED"


async def test_an_attempt_times_out_after_start_to_close(
    server: Server, client: Client, new_worker: NewWorker
) -> None:
    worker = new_worker()
    interrupted = asyncio.Event()

    @worker.action("slow", start_to_close=0.3, max_attempts=1)
    async def slow(context: Context, payload: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            interrupted.set()
            raise

    async with serving(worker, server):
        with pytest.raises(RequestFailed) as raised:
            await client.run("slow")
        await within_timeout(interrupted.wait())
    assert raised.value.failure.code is ErrorCode.TIMEOUT


async def test_limit_errors_name_the_field_and_the_limit(
    server: Server, client: Client, new_worker: NewWorker
) -> None:
    worker = new_worker()
    errors: dict[str, LimitExceeded] = {}

    @worker.action("large")
    async def large(context: Context, payload: Any) -> str:
        for report in (
            context.output(b"x" * (1024 * 1024 + 1)),
            context.progress(message="x" * 4097),
            context.progress(metadata="x" * 65536),
            context.save_checkpoint(b"x" * (256 * 1024 + 1)),
        ):
            try:
                await report
            except LimitExceeded as error:
                errors[error.field] = error
        await context.output(b"x" * 1024 * 1024)
        return "x" * 5 * 1024 * 1024

    async with serving(worker, server):
        with pytest.raises(RequestFailed, match=r"result: must be at most 4195328 bytes"):
            await client.run("large")
    assert set(errors) == {"output", "progress.message", "progress.metadata", "checkpoint"}
    assert errors["output"].limit == 1024 * 1024


async def test_a_payload_that_violates_the_schema_never_reaches_the_handler(
    server: Server, client: Client, new_worker: NewWorker
) -> None:
    worker = new_worker()

    @worker.action("strict", payload_schema={"type": "object", "required": ["text"]})
    async def strict(context: Context, payload: Any) -> Any:
        return payload

    async with serving(worker, server):
        with pytest.raises(ServiceError) as raised:
            await client.run("strict", {})
        assert await client.run("strict", {"text": 1}) == {"text": 1}
    assert raised.value.code is ErrorCode.VALIDATION_ERROR
    assert raised.value.violations


async def test_heartbeats_prevent_a_heartbeat_timeout(
    server: Server, client: Client, new_worker: NewWorker
) -> None:
    worker = new_worker()
    silent = asyncio.Event()

    @worker.action("heartbeats", heartbeat_timeout=0.5, max_attempts=2, **QUICK)
    async def heartbeats(context: Context, payload: Any) -> int:
        if context.attempt == 1:
            silent.set()
            await asyncio.Event().wait()
        for _ in range(10):
            await context.sleep(0.1)
            await context.heartbeat()
        return context.attempt

    async with serving(worker, server):
        assert await client.run("heartbeats") == 2
    assert silent.is_set()


async def test_a_worker_without_permission_is_refused(server: Server) -> None:
    for token in ("nonsense", server.token("worker:other")):
        worker = Worker(server.url, token)

        @worker.action("mine")
        async def mine(context: Context, payload: Any) -> None:
            pass

        with pytest.raises(WorkerRefused):
            await within_timeout(worker.serve())


async def test_running_attempts_are_released_before_a_plain_token_expires(
    server: Server, client: Client
) -> None:
    started = asyncio.Event()

    async def brief(context: Context, payload: Any) -> int:
        if context.attempt == 1:
            started.set()
            await asyncio.Event().wait()
        return context.attempt

    # This declaration of the action outlives the token with the short lifetime.
    earlier = Worker(server.url, server.token("worker:*"))
    earlier.action("brief")(brief)
    async with serving(earlier, server):
        pass
    short = Worker(server.url, server.token("worker:*", expires="3s"))
    short.action("brief")(brief)
    first = asyncio.ensure_future(short.serve())
    running = asyncio.ensure_future(client.run("brief"))
    await within_timeout(started.wait())
    with pytest.raises(WorkerRefused, match="cannot be refreshed"):
        await within_timeout(first)
    lasting = Worker(server.url, server.token("worker:*"))
    lasting.action("brief")(brief)
    async with serving(lasting, server):
        assert await within_timeout(running) == 2


async def test_a_client_with_an_invalid_token_raises_unauthorized(server: Server) -> None:
    async with Client(server.url, "nonsense") as client:
        with pytest.raises(ServiceError) as raised:
            await client.actions()
    assert raised.value.code is ErrorCode.UNAUTHORIZED
