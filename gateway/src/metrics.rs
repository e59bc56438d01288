//! Metrics of the gateway.

use std::{sync::Arc, time::Duration};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
};
use streamer_core::{CloseCode, ErrorCode};
use streamer_telemetry::{IndexedFamily, LatencyHistogram, Metrics};
use strum::EnumCount;

use crate::protocol::client_message::MessageType;

/// Bucket bounds of the duration of connections, in seconds: 1 s to 1 day.
const CONNECTION_BOUNDS: [f64; 7] = [1.0, 10.0, 60.0, 300.0, 1800.0, 7200.0, 86_400.0];

#[derive(Clone)]
pub(crate) struct GatewayMetrics {
    pub(crate) connections: Gauge,
    pub(crate) accepted: Counter,
    rejected: Family<CodeLabel, Counter>,
    closed: Family<CodeLabel, Counter>,
    connection_seconds: Histogram,
    messages_received: Arc<IndexedFamily<TypeLabel, Counter>>,
    messages_rejected: Family<ReasonLabel, Counter>,
    pub(crate) bytes_in: Counter,
    pub(crate) bytes_out: Counter,
    pub(crate) buffered_bytes: Gauge,
    pub(crate) buffered_bytes_limit: Gauge,
    pub(crate) log_reads: Counter,
    pub(crate) upstream_events: Counter,
    pub(crate) upstream_lost: Counter,
    pub(crate) delivery_seconds: LatencyHistogram,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CodeLabel {
    code: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct TypeLabel {
    r#type: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

impl GatewayMetrics {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        let counter = |name, help| metrics.counter(name, help);
        Self {
            connections: metrics
                .gauge("streamer_gateway_connections", "Open WebSocket connections"),
            accepted: counter(
                "streamer_gateway_connections_accepted",
                "WebSocket connections accepted",
            ),
            rejected: metrics.register(
                "streamer_gateway_connections_rejected",
                "WebSocket connections rejected, by close code",
                Family::default(),
            ),
            closed: metrics.register(
                "streamer_gateway_connections_closed",
                "WebSocket connections that ended, by close code: lost if there was none, _other if it is unknown",
                Family::default(),
            ),
            connection_seconds: metrics.register(
                "streamer_gateway_connection_duration_seconds",
                "Duration of WebSocket connections that ended",
                Histogram::new(CONNECTION_BOUNDS),
            ),
            messages_received: Arc::new(IndexedFamily::register(
                metrics,
                "streamer_gateway_messages_received",
                "Valid messages received from clients, by type",
                MessageType::COUNT,
            )),
            messages_rejected: metrics.register(
                "streamer_gateway_messages_rejected",
                "Messages rejected, by reason: the error code",
                Family::default(),
            ),
            bytes_in: counter("streamer_gateway_received_bytes", "Bytes read from sockets"),
            bytes_out: counter("streamer_gateway_sent_bytes", "Bytes queued for sockets"),
            buffered_bytes: metrics.gauge(
                "streamer_gateway_buffered_bytes",
                "Bytes buffered for incomplete client messages",
            ),
            buffered_bytes_limit: metrics.gauge(
                "streamer_gateway_buffered_bytes_limit",
                "Limit of streamer_gateway_buffered_bytes (gateway.max_buffered_bytes)",
            ),
            log_reads: counter(
                "streamer_gateway_log_reads",
                "Log pages read for connections behind the events in memory",
            ),
            upstream_events: counter(
                "streamer_gateway_upstream_events",
                "Events received from progress services",
            ),
            upstream_lost: counter(
                "streamer_gateway_upstream_lost",
                "Watches of progress services that were lost or could not be opened",
            ),
            delivery_seconds: metrics.latency(
                "streamer_gateway_delivery_duration_seconds",
                "Time from an event to its queueing for a socket, including its storage, for events after the \
                 beginning of the subscription. The time of the event is from the clock of the processor, in \
                 milliseconds",
            ),
        }
    }

    /// Counts a rejected connection.
    pub(crate) fn connection_rejected(&self, code: CloseCode) {
        self.rejected.get_or_create(&CodeLabel { code: code.label() }).inc();
    }

    /// Counts a connection that ended, with the close code if it had one.
    pub(crate) fn connection_closed(&self, code: Option<CloseCode>, duration: Duration) {
        let code = code.map_or("lost", CloseCode::label);
        self.closed.get_or_create(&CodeLabel { code }).inc();
        self.connection_seconds.observe(duration.as_secs_f64());
    }

    /// Counts a valid message of the given type.
    pub(crate) fn message_received(&self, r#type: MessageType) {
        let label = || TypeLabel { r#type: r#type.into() };
        self.messages_received.with(r#type as usize, label, |counter| {
            counter.inc();
        });
    }

    /// Counts a rejected message.
    pub(crate) fn message_rejected(&self, code: ErrorCode) {
        self.messages_rejected.get_or_create(&ReasonLabel { reason: code.as_str() }).inc();
    }
}
