// Sets up OpenTelemetry's SDK before a worker of examples/workers is loaded. It exports spans to the collector
// at OTEL_EXPORTER_OTLP_ENDPOINT; its packages are in the folder STREAMER_TESTS_MODULES.

import { createRequire } from 'node:module';

const load = createRequire(`${process.env.STREAMER_TESTS_MODULES}/`);
const { context, trace } = load('@opentelemetry/api');
const { AsyncLocalStorageContextManager } = load('@opentelemetry/context-async-hooks');
const { OTLPTraceExporter } = load('@opentelemetry/exporter-trace-otlp-grpc');
const { resourceFromAttributes } = load('@opentelemetry/resources');
const { SimpleSpanProcessor, TracerProvider } = load('@opentelemetry/sdk-trace');

const exporter = new OTLPTraceExporter();
const resource = resourceFromAttributes({ 'service.name': process.env.OTEL_SERVICE_NAME });
const spanProcessors = [new SimpleSpanProcessor({ exporter })];
trace.setGlobalTracerProvider(new TracerProvider({ resource, spanProcessors }));
context.setGlobalContextManager(new AsyncLocalStorageContextManager().enable());
