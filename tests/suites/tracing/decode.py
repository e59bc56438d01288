"""Decodes OTLP messages, one per line in hexadecimal digits on standard input, with OpenTelemetry's own
protocol buffers; prints trace ID, span ID, parent ID and name of each span."""

import sys

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

for line in sys.stdin:
    message = ExportTraceServiceRequest.FromString(bytes.fromhex(line))
    for resource in message.resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                assert len(span.trace_id) == 16 and len(span.span_id) == 8, span
                assert 0 < span.start_time_unix_nano <= span.end_time_unix_nano, span
                ids = (span.trace_id, span.span_id, span.parent_span_id)
                print(*(part.hex() or "-" for part in ids), span.name)
