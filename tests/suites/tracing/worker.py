"""Runs a worker of examples/workers with OpenTelemetry's SDK, which exports spans to the collector at
OTEL_EXPORTER_OTLP_ENDPOINT."""

import runpy
import sys

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(insecure=True)))
trace.set_tracer_provider(provider)
runpy.run_path(sys.argv[1], run_name="__main__")
