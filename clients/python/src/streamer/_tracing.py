"""Integration with OpenTelemetry, if it is installed (`pip install streamer-client[tracing]`).

This package uses only the API: the application's SDK exports the spans. Without an SDK, the trace
context is still propagated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamer.context import Context

try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    _installed = False
else:
    _installed = True


def headers() -> dict[str, str]:
    """Returns the current trace context as the W3C headers `traceparent` and `tracestate`; empty
    outside a trace."""
    carrier: dict[str, str] = {}
    if _installed:
        TraceContextTextMapPropagator().inject(carrier)
    return carrier


@contextmanager
def handler_span(context: Context) -> Iterator[Callable[[], None]]:
    """Runs the block in a span that is a child of the server's span and shares its sampling
    decision. Yields a function that marks the span as failed."""
    if not (_installed and context.trace_parent):
        yield lambda: None
        return
    carrier = {"traceparent": context.trace_parent, "tracestate": context.trace_state}
    parent = TraceContextTextMapPropagator().extract(carrier)
    tracer = trace.get_tracer("streamer")
    # Exceptions are not recorded: their messages may contain parts of the payload.
    with tracer.start_as_current_span(
        "handler",
        context=parent,
        kind=trace.SpanKind.CONSUMER,
        attributes={
            "streamer.action": context.action,
            "streamer.attempt": context.attempt,
            "streamer.request_id": context.request_id,
            "streamer.tenant": context.tenant_id,
        },
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        yield lambda: span.set_status(trace.StatusCode.ERROR)
