/**
 * Integration with OpenTelemetry, if `@opentelemetry/api` is installed. This package uses only the
 * API: the application's SDK exports the spans, and the context is active if the application has
 * registered a context manager, as SDKs do.
 */

/** @type {typeof import('@opentelemetry/api') | null} */
const api = await import('@opentelemetry/api').catch(() => null);

/** @returns {{traceparent?: string, tracestate?: string}} W3C headers; empty outside a trace. */
export function traceHeaders() {
  const span = api?.trace.getSpanContext(api.context.active());
  if (!api || !span || !api.isSpanContextValid(span)) return {};
  const flags = (span.traceFlags & 1).toString(16).padStart(2, '0');
  const traceparent = `00-${span.traceId}-${span.spanId}-${flags}`;
  const tracestate = span.traceState?.serialize();
  return tracestate ? { traceparent, tracestate } : { traceparent };
}

/**
 * Runs a handler in a span that is a child of the server's span and shares its sampling decision.
 * @template T
 * @param {import('./worker-context.js').AttemptInfo} info
 * @param {() => Promise<T>} run
 * @returns {Promise<T>}
 */
export async function inHandlerSpan(info, run) {
  const parent = api && parse(info.traceParent);
  if (!api || !parent) return run();
  const traceState = info.traceState ? api.createTraceState(info.traceState) : undefined;
  const remote = api.trace.setSpanContext(api.ROOT_CONTEXT, { ...parent, traceState });
  const attributes = {
    'streamer.action': info.action,
    'streamer.attempt': info.attempt,
    'streamer.request_id': info.requestId,
    'streamer.tenant': info.tenantId,
  };
  const kind = api.SpanKind.CONSUMER;
  const span = api.trace.getTracer('streamer').startSpan('handler', { kind, attributes }, remote);
  try {
    return await api.context.with(api.trace.setSpan(remote, span), run);
  } catch (thrown) {
    // The exception is not recorded: its message may contain parts of the payload.
    span.setStatus({ code: api.SpanStatusCode.ERROR });
    throw thrown;
  } finally {
    span.end();
  }
}

/** @param {string} traceParent W3C `traceparent`, version 00. */
function parse(traceParent) {
  const [, traceId, spanId, flags] = traceParent.split('-');
  if (!traceId || !spanId || !flags) return null;
  return { traceId, spanId, traceFlags: Number.parseInt(flags, 16) & 1, isRemote: true };
}
