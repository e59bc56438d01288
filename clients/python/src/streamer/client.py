"""The gRPC client: submits requests, watches them, and sees them to their end."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterable
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, TypeAlias, TypeVar, final

from google.protobuf.duration_pb2 import Duration
from grpc.aio import UnaryUnaryMultiCallable

from streamer import _watch, events, model, payload
from streamer._callbacks import Callbacks, OnOutput, OnProgress, OnRetry
from streamer._channel import Calls, open_channel, parse_server
from streamer._proto import router_pb2
from streamer._retry import UNARY_SECONDS, Patience, unary
from streamer._tokens import Token, TokenSource
from streamer.action import Action, Seconds, seconds
from streamer.errors import ServiceError, sync_failure
from streamer.events import Event
from streamer.model import Completed, Page, Request, RequestState, Submitted

Actions: TypeAlias = list[Action]

_Question = TypeVar("_Question")
_Answer = TypeVar("_Answer")

# How long a sync action may take before its call is given up.
_SUBMIT_SECONDS = 600.0


@final
class Client:
    """A client of one server; use it as an async context manager, for any number of requests.

    `server` is `http://host:port` or `https://host:port`; `token` a JWT, or an async callable that
    returns a fresh one for every call. Calls that are safe to repeat are repeated, with full
    jitter, while the server cannot be reached, for `retry_for` seconds (None: for ever).
    Every method raises `ServiceError` when the server refuses or stays away.
    """

    def __init__(self, server: str, token: Token, *, retry_for: float | None = 60.0) -> None:
        self._channel = open_channel(parse_server(server))
        self._calls = Calls(self._channel)
        self._tokens = TokenSource(token)
        self._retry_for = retry_for

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the calls that are under way, which raise `ServiceError`. Requests on the server go
        on."""
        self._calls.closed = True
        await self._channel.close()

    async def submit(
        self,
        action: str,
        payload: Any = None,
        *,
        id: str | None = None,
        wait: Seconds | None = None,
        priority: int = 0,
        delay: Seconds | None = None,
        deadline: datetime | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Submitted:
        """Asks for an action. A sync one is answered with its end; an async one is durable on
        return, and has its end too when it comes within `wait` (up to 300 s).

        `payload` is anything JSON can write, or `RawJson`; None means `{}`. `id` is the idempotency
        and correlation key: the same `id` gives the same request, which makes the call safe to
        repeat, so that it is repeated while the server cannot be reached. `priority` is 0 to 9,
        higher runs first; it starts no earlier than after `delay`, and fails unrun when not started
        by `deadline`. `metadata` is kept with the request. Those four are for async actions.
        """
        request = router_pb2.SubmitRequest(id=id or "", action=action, priority=priority)
        _fill(request, payload, metadata, wait, delay)
        if deadline is not None:
            request.deadline.CopyFrom(model.timestamp(deadline))
        # A sync action is answered when it has ended.
        timeout = _SUBMIT_SECONDS + (0 if wait is None else seconds(wait))
        response = await self._unary(
            self._calls.submit, request, repeat=id is not None, timeout=timeout
        )
        return model.submitted(response)

    async def run(
        self,
        action: str,
        payload: Any = None,
        *,
        on_progress: OnProgress | None = None,
        on_output: OnOutput | None = None,
        on_retry: OnRetry | None = None,
        id: str | None = None,
        priority: int = 0,
        delay: Seconds | None = None,
        deadline: datetime | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Any:
        """Asks for an action, sees it to its end, and returns its result.

        The callbacks may be plain or async functions. When an attempt fails and another follows,
        `on_retry` tells: chunks with a `seq` greater than its `rewind_to_seq` are void, and come
        anew. Cancelling this call does not cancel the request. Raises `RequestFailed`,
        `RequestCancelled`, and `BrokenLog` when events or output are missing.
        """
        request_id = id or uuid.uuid4().hex
        try:
            submitted = await self.submit(
                action,
                payload,
                id=request_id,
                priority=priority,
                delay=delay,
                deadline=deadline,
                metadata=metadata,
            )
        except ServiceError as error:
            raise sync_failure(error, request_id) from error
        if submitted.completed is not None and submitted.completed.output is None:
            return submitted.completed.unwrap()
        callbacks = Callbacks(on_progress, on_output, on_retry)
        async for event in self.watch(submitted.uid):
            await callbacks.tell(event)
            if isinstance(event, events.Terminal):
                ended = events.completed(event, submitted.request_id, submitted.uid)
                return ended.unwrap()
        raise AssertionError("a watch ends with a terminal event")

    def watch(self, request_id: str, after_seq: int = 0) -> AsyncGenerator[Event, None]:
        """The events of a request after `after_seq`, past and to come, up to its terminal one.

        A lost stream is opened again where it broke, with full jitter. `seq` is checked to be
        contiguous and, when all events are read (`after_seq` 0), the output is checked against the
        proof in the terminal event: raises `BrokenLog` otherwise. Ending it cancels nothing.
        """
        patience = Patience(self._retry_for)
        return _watch.watch(self._calls, self._tokens, patience, request_id, after_seq)

    async def wait(self, request_id: str) -> Completed:
        """Waits for the end of a request, however long it takes."""
        patience = Patience(self._retry_for)
        return await _watch.wait(self._calls, self._tokens, patience, request_id)

    async def get(self, request_id: str) -> Request:
        """One request, with its payload and result."""
        request = router_pb2.GetRequest(request_id=request_id)
        response = await self._unary(self._calls.get, request, repeat=True)
        return model.request(response.request)

    async def list(
        self,
        *,
        states: Iterable[RequestState | str] = (),
        action: str = "",
        page_size: int = 0,
        page_token: str = "",
    ) -> Page:
        """A page of the caller's requests (with permission `requests:read`, of the tenant's),
        newest first, without payloads and results. `page_size` is 1 to 500; 0 means 50."""
        request = router_pb2.ListRequest(
            states=[model.state_to_proto(RequestState(state)) for state in states],
            action=action,
            page_size=page_size,
            page_token=page_token,
        )
        response = await self._unary(self._calls.list, request, repeat=True)
        return Page([model.request(one) for one in response.requests], response.next_page_token)

    async def cancel(self, request_id: str, reason: str = "") -> Request:
        """Asks that a request end. A queued one is cancelled at once; a running one when its
        handler notices: look at the state. Cancelling what has ended changes nothing."""
        request = router_pb2.CancelRequest(request_id=request_id, reason=reason)
        response = await self._unary(self._calls.cancel, request, repeat=True)
        return model.request(response.request)

    async def redrive(self, request_id: str, *, id: str | None = None) -> Request:
        """Runs a failed or cancelled request again, as a new request, under the new `id`."""
        request = router_pb2.RedriveRequest(request_id=request_id, id=id or "")
        response = await self._unary(self._calls.redrive, request, repeat=id is not None)
        return model.request(response.request)

    async def actions(self) -> Actions:
        """What can be asked for, by name."""
        response = await self._unary(
            self._calls.list_actions, router_pb2.ListActionsRequest(), repeat=True
        )
        return [Action.from_proto(action) for action in response.actions]

    async def _unary(
        self,
        call: UnaryUnaryMultiCallable[_Question, _Answer],
        question: _Question,
        *,
        repeat: bool,
        timeout: float = UNARY_SECONDS,
    ) -> _Answer:
        patience = Patience(self._retry_for)
        return await unary(
            self._calls, call, question, self._tokens, patience, repeat=repeat, timeout=timeout
        )


def _fill(
    request: router_pb2.SubmitRequest,
    content: Any,
    metadata: dict[str, Any] | None,
    wait: Seconds | None,
    delay: Seconds | None,
) -> None:
    if content is not None:
        request.payload.CopyFrom(payload.to_proto(payload.encode_json(content)))
    if metadata is not None:
        request.metadata.CopyFrom(payload.to_proto(payload.encode_json(metadata)))
    if wait is not None:
        request.wait.CopyFrom(_duration(wait))
    if delay is not None:
        request.delay.CopyFrom(_duration(delay))


def _duration(length: Seconds) -> Duration:
    duration = Duration()
    duration.FromTimedelta(timedelta(seconds=seconds(length)))
    return duration
