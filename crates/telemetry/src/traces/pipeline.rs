//! Export of ended spans to the collector, on a dedicated thread and runtime.
//!
//! If the collector is slow, rejects spans or is unavailable, spans are dropped and counted; nothing else is
//! affected.

use std::{cell::Cell, thread, time::Duration};

use opentelemetry::{
    Context, KeyValue,
    trace::{SpanBuilder, SpanContext, SpanId, TraceContextExt, TraceId, Tracer, TracerProvider},
};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource,
    error::{OTelSdkError, OTelSdkResult},
    trace::{
        IdGenerator, RandomIdGenerator, Sampler, SdkTracer, SdkTracerProvider, Span, SpanData,
        SpanExporter as _, SpanProcessor,
    },
};
use prometheus_client::metrics::counter::Counter;
use sha2::{Digest, Sha256};
use streamer_core::AttemptNumber;
use tokio::{
    runtime,
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until, timeout},
};

use super::options::TraceOptions;
use crate::{Metrics, TelemetryError};

/// Maximum number of spans waiting for export; further spans are dropped. A span is about 500 bytes.
const QUEUE_CAPACITY: usize = 32_768;
/// Maximum number of spans per export: the default of `OTEL_BSP_MAX_EXPORT_BATCH_SIZE` in the
/// OpenTelemetry specification.
const BATCH_SIZE: usize = 512;
/// Timeout of an export, including the connection setup.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum time for which the first span of a batch waits for further spans.
const LINGER: Duration = Duration::from_secs(1);

/// Handle to the exporter.
#[derive(Clone)]
pub(super) struct Pipeline {
    tracer: SdkTracer,
    flushes: mpsc::Sender<oneshot::Sender<()>>,
    counters: Counters,
}

#[derive(Clone, Debug, Default)]
struct Counters {
    exported: Counter,
    dropped: Counter,
    failed: Counter,
}

impl Pipeline {
    /// Starts the exporter.
    pub(super) fn start(endpoint: &str, options: &TraceOptions) -> Result<Self, TelemetryError> {
        let failed =
            |reason: String| TelemetryError::Traces { endpoint: endpoint.to_owned(), reason };
        let runtime = runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| failed(error.to_string()))?;
        let exporter = {
            // The exporter's connection belongs to this runtime.
            let _entered = runtime.enter();
            SpanExporter::builder().with_tonic().with_endpoint(endpoint).build()
        };
        let mut exporter = exporter.map_err(|error| failed(error.to_string()))?;
        let resource = resource(options);
        exporter.set_resource(&resource);
        let (spans, ended) = mpsc::channel(QUEUE_CAPACITY);
        let (flushes, flush) = mpsc::channel(1);
        let counters = Counters::default();
        let worker =
            Exporter { exporter, ended, flush, counters: counters.clone(), is_failing: false };
        thread::Builder::new()
            .name("traces".into())
            .spawn(move || runtime.block_on(worker.run()))
            .map_err(|error| failed(error.to_string()))?;
        let provider = SdkTracerProvider::builder()
            .with_span_processor(SpanQueue { spans, dropped: counters.dropped.clone() })
            .with_id_generator(PresetIds::default())
            // The sampling decision is made before a span is opened.
            .with_sampler(Sampler::AlwaysOn)
            .with_resource(resource)
            .build();
        let tracer = provider.tracer("streamer");
        Ok(Self { tracer, flushes, counters })
    }

    pub(super) fn tracer(&self) -> &SdkTracer {
        &self.tracer
    }

    /// Starts a root span with the trace ID, span ID, flags and `tracestate` of `ids`.
    pub(super) fn build_with_ids(&self, ids: &SpanContext, builder: SpanBuilder) -> Span {
        NEXT_IDS.set(Some((ids.trace_id(), ids.span_id())));
        // The SDK ignores the IDs of an invalid parent, but uses its `tracestate`.
        let (flags, state) = (ids.trace_flags(), ids.trace_state().clone());
        let parent = SpanContext::new(TraceId::INVALID, SpanId::INVALID, flags, true, state);
        let parent = Context::new().with_remote_span_context(parent);
        let span = self.tracer.build_with_context(builder, &parent);
        NEXT_IDS.set(None);
        span
    }

    pub(super) fn register(&self, metrics: &Metrics) {
        let Counters { exported, dropped, failed } = self.counters.clone();
        metrics.register(
            "streamer_trace_spans_exported",
            "Spans accepted by the collector",
            exported,
        );
        metrics.register(
            "streamer_trace_spans_dropped",
            "Spans dropped because 32,768 were waiting for export",
            dropped,
        );
        metrics.register(
            "streamer_trace_spans_failed",
            "Spans dropped because the collector was unreachable or rejected them",
            failed,
        );
    }

    pub(super) async fn flush(&self, limit: Duration) {
        let (done, is_done) = oneshot::channel();
        let flush = async {
            if self.flushes.send(done).await.is_ok() {
                // This fails if the exporter has exited, and then no spans are pending.
                drop(is_done.await);
            }
        };
        if timeout(limit, flush).await.is_err() {
            tracing::warn!("timed out exporting the remaining spans");
        }
    }
}

fn resource(options: &TraceOptions) -> Resource {
    let mut resource =
        Resource::builder().with_attribute(KeyValue::new("service.version", options.version));
    let is_set = |name: &str, part: &str| {
        std::env::var(name).is_ok_and(|value| !value.is_empty() && value.contains(part))
    };
    if !is_set("OTEL_SERVICE_NAME", "") && !is_set("OTEL_RESOURCE_ATTRIBUTES", "service.name=") {
        resource = resource.with_service_name(options.service);
    }
    resource.build()
}

/// Span processor that queues ended spans for the exporter.
#[derive(Debug)]
struct SpanQueue {
    spans: mpsc::Sender<SpanData>,
    dropped: Counter,
}

impl SpanProcessor for SpanQueue {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if self.spans.try_send(span).is_err() {
            self.dropped.inc();
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

struct Exporter {
    exporter: SpanExporter,
    ended: mpsc::Receiver<SpanData>,
    flush: mpsc::Receiver<oneshot::Sender<()>>,
    counters: Counters,
    is_failing: bool,
}

impl Exporter {
    async fn run(mut self) {
        let mut batch = Vec::with_capacity(BATCH_SIZE);
        loop {
            let mut due = None;
            let flush_done = loop {
                let room = BATCH_SIZE - batch.len();
                let linger = async {
                    match due {
                        Some(at) => sleep_until(at).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    biased;
                    Some(done) = self.flush.recv() => break Some(done),
                    () = linger => break None,
                    count = self.ended.recv_many(&mut batch, room) => {
                        if count == 0 || batch.len() == BATCH_SIZE {
                            break None;
                        }
                        due.get_or_insert_with(|| Instant::now() + LINGER);
                    }
                }
            };
            self.export(&mut batch).await;
            if let Some(done) = flush_done {
                while let Ok(span) = self.ended.try_recv() {
                    batch.push(span);
                    if batch.len() == BATCH_SIZE {
                        self.export(&mut batch).await;
                    }
                }
                self.export(&mut batch).await;
                if done.send(()).is_err() {
                    tracing::debug!("spans were exported after the flush timed out");
                }
            } else if self.ended.is_closed() && self.ended.is_empty() {
                return;
            }
        }
    }

    async fn export(&mut self, batch: &mut Vec<SpanData>) {
        let count = batch.len() as u64;
        if count == 0 {
            return;
        }
        let spans = std::mem::replace(batch, Vec::with_capacity(BATCH_SIZE));
        let exported = timeout(EXPORT_TIMEOUT, self.exporter.export(spans)).await;
        match exported.unwrap_or(Err(OTelSdkError::Timeout(EXPORT_TIMEOUT))) {
            Ok(()) => {
                self.counters.exported.inc_by(count);
                if std::mem::take(&mut self.is_failing) {
                    tracing::info!("trace export recovered");
                }
            }
            Err(error) => {
                self.counters.failed.inc_by(count);
                if !std::mem::replace(&mut self.is_failing, true) {
                    tracing::warn!(%error, "failed to export traces; spans are dropped");
                }
            }
        }
    }
}

thread_local! {
    /// IDs of the next span that is started on this thread.
    static NEXT_IDS: Cell<Option<(TraceId, SpanId)>> = const { Cell::new(None) };
}

/// ID generator that returns preset IDs if set, and random IDs otherwise.
#[derive(Debug, Default)]
struct PresetIds(RandomIdGenerator);

impl IdGenerator for PresetIds {
    fn new_trace_id(&self) -> TraceId {
        NEXT_IDS.get().map_or_else(|| self.0.new_trace_id(), |(trace, _)| trace)
    }

    fn new_span_id(&self) -> SpanId {
        NEXT_IDS.get().map_or_else(|| self.0.new_span_id(), |(_, span)| span)
    }
}

/// Returns the IDs of an attempt's trace and of the trace's root span.
pub(super) fn attempt_ids(uid: [u8; 16], attempt: AttemptNumber) -> (TraceId, SpanId) {
    let hash = Sha256::new_with_prefix(uid).chain_update(attempt.as_u32().to_be_bytes()).finalize();
    let mut trace = [0; 16];
    trace.copy_from_slice(&hash[..16]);
    let mut span = [0; 8];
    span.copy_from_slice(&hash[16..24]);
    (TraceId::from_bytes(trace), SpanId::from_bytes(span))
}
