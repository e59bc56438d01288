//! From ended spans to the collector, on a thread and a runtime of its own.
//!
//! A collector that is slow, refuses or is gone costs spans, which are counted, and nothing else.

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
use tokio::{
    runtime,
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until, timeout},
};

use super::{TraceOptions, Traces};
use crate::{Metrics, TelemetryError};

/// Spans that wait to be exported; beyond it, spans are dropped. About 500 bytes each.
const MAX_WAITING: usize = 32_768;
/// Spans in one call to the collector: the default of `OTEL_BSP_MAX_EXPORT_BATCH_SIZE` in the
/// OpenTelemetry specification.
const BATCH: usize = 512;
/// How long an export may take, connecting included.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the first span of a batch waits for others.
const LINGER: Duration = Duration::from_secs(1);

/// The running exporter.
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
    pub(super) fn tracer(&self) -> &SdkTracer {
        &self.tracer
    }

    /// Starts a root span with these ids and this `tracestate`.
    pub(super) fn build_as(&self, ids: &SpanContext, builder: SpanBuilder) -> Span {
        NEXT_IDS.set(Some((ids.trace_id(), ids.span_id())));
        // The ids of a parent that is not valid do not count, but its state does.
        let (flags, state) = (ids.trace_flags(), ids.trace_state().clone());
        let parent = SpanContext::new(TraceId::INVALID, SpanId::INVALID, flags, true, state);
        let parent = Context::new().with_remote_span_context(parent);
        let span = self.tracer.build_with_context(builder, &parent);
        NEXT_IDS.set(None);
        span
    }

    pub(super) fn register(&self, metrics: &Metrics) {
        let Counters { exported, dropped, failed } = self.counters.clone();
        metrics.register("streamer_trace_spans_exported", "Spans the collector took", exported);
        metrics.register(
            "streamer_trace_spans_dropped",
            "Spans dropped because 32,768 were waiting to be exported",
            dropped,
        );
        metrics.register(
            "streamer_trace_spans_failed",
            "Spans dropped because the collector could not be reached or refused them",
            failed,
        );
    }

    pub(super) async fn flush(&self, limit: Duration) {
        let (done, is_done) = oneshot::channel();
        let flush = async {
            if self.flushes.send(done).await.is_ok() {
                // It fails if the exporter has ended: then nothing waits.
                drop(is_done.await);
            }
        };
        if timeout(limit, flush).await.is_err() {
            tracing::warn!("the collector did not take all spans in time");
        }
    }
}

/// Starts the exporter, if there is an endpoint.
pub(crate) fn start(options: &TraceOptions) -> Result<(Traces, Option<SdkTracer>), TelemetryError> {
    let off = Traces {
        pipeline: None,
        sample_ratio: options.sample_ratio,
        trust_callers: options.trust_callers,
    };
    let Some(endpoint) = &options.endpoint else { return Ok((off, None)) };
    let failed = |reason: String| TelemetryError::Traces { endpoint: endpoint.clone(), reason };
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
    let (spans, ended) = mpsc::channel(MAX_WAITING);
    let (flushes, flush) = mpsc::channel(1);
    let counters = Counters::default();
    let worker = Exporter { exporter, ended, flush, counters: counters.clone(), is_failing: false };
    thread::Builder::new()
        .name("traces".into())
        .spawn(move || runtime.block_on(worker.run()))
        .map_err(|error| failed(error.to_string()))?;
    let provider = SdkTracerProvider::builder()
        .with_span_processor(Queue { spans, dropped: counters.dropped.clone() })
        .with_id_generator(Ids::default())
        // The decision is made before a span is opened.
        .with_sampler(Sampler::AlwaysOn)
        .with_resource(resource)
        .build();
    let tracer = provider.tracer("streamer");
    let pipeline = Pipeline { tracer: tracer.clone(), flushes, counters };
    Ok((Traces { pipeline: Some(pipeline), ..off }, Some(tracer)))
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

/// Takes ended spans from where they end.
#[derive(Debug)]
struct Queue {
    spans: mpsc::Sender<SpanData>,
    dropped: Counter,
}

impl SpanProcessor for Queue {
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
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let mut due = None;
            let flushed = loop {
                let room = BATCH - batch.len();
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
                        if count == 0 || batch.len() == BATCH {
                            break None;
                        }
                        due.get_or_insert_with(|| Instant::now() + LINGER);
                    }
                }
            };
            self.export(&mut batch).await;
            if let Some(done) = flushed {
                while let Ok(span) = self.ended.try_recv() {
                    batch.push(span);
                    if batch.len() == BATCH {
                        self.export(&mut batch).await;
                    }
                }
                self.export(&mut batch).await;
                if done.send(()).is_err() {
                    tracing::debug!("spans were exported after the time to wait for it");
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
        let spans = std::mem::replace(batch, Vec::with_capacity(BATCH));
        let exported = timeout(EXPORT_TIMEOUT, self.exporter.export(spans)).await;
        match exported.unwrap_or(Err(OTelSdkError::Timeout(EXPORT_TIMEOUT))) {
            Ok(()) => {
                self.counters.exported.inc_by(count);
                if std::mem::take(&mut self.is_failing) {
                    tracing::info!("the trace collector takes spans again");
                }
            }
            Err(error) => {
                self.counters.failed.inc_by(count);
                if !std::mem::replace(&mut self.is_failing, true) {
                    tracing::warn!(%error, "cannot export traces; spans are dropped");
                }
            }
        }
    }
}

thread_local! {
    /// Ids of the next span that is started on this thread.
    static NEXT_IDS: Cell<Option<(TraceId, SpanId)>> = const { Cell::new(None) };
}

/// Random ids, unless others were set.
#[derive(Debug, Default)]
struct Ids(RandomIdGenerator);

impl IdGenerator for Ids {
    fn new_trace_id(&self) -> TraceId {
        NEXT_IDS.get().map_or_else(|| self.0.new_trace_id(), |(trace, _)| trace)
    }

    fn new_span_id(&self) -> SpanId {
        NEXT_IDS.get().map_or_else(|| self.0.new_span_id(), |(_, span)| span)
    }
}

/// The ids of an attempt's trace and of its root span.
pub(super) fn attempt_ids(uid: [u8; 16], attempt: u32) -> (TraceId, SpanId) {
    let hash = Sha256::new_with_prefix(uid).chain_update(attempt.to_be_bytes()).finalize();
    let mut trace = [0; 16];
    trace.copy_from_slice(&hash[..16]);
    let mut span = [0; 8];
    span.copy_from_slice(&hash[16..24]);
    (TraceId::from_bytes(trace), SpanId::from_bytes(span))
}
