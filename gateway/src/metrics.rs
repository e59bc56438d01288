//! Metrics of the gateway.

use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use streamer_telemetry::Metrics;

#[derive(Clone)]
pub(crate) struct GatewayMetrics {
    pub(crate) connections: Gauge,
    pub(crate) accepted: Counter,
    pub(crate) rejected: Counter,
    pub(crate) messages_in: Counter,
    pub(crate) bytes_in: Counter,
    pub(crate) bytes_out: Counter,
    pub(crate) invalid_messages: Counter,
    pub(crate) rate_limited: Counter,
    pub(crate) slow_consumers: Counter,
    pub(crate) buffered_bytes: Gauge,
    pub(crate) buffered_bytes_limit: Gauge,
    pub(crate) log_reads: Counter,
    pub(crate) upstream_events: Counter,
    pub(crate) upstream_lost: Counter,
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
            rejected: counter(
                "streamer_gateway_connections_rejected",
                "WebSocket connections rejected",
            ),
            messages_in: counter(
                "streamer_gateway_messages_received",
                "Messages received from clients",
            ),
            bytes_in: counter("streamer_gateway_received_bytes", "Bytes read from sockets"),
            bytes_out: counter("streamer_gateway_sent_bytes", "Bytes queued for sockets"),
            invalid_messages: counter("streamer_gateway_invalid_messages", "Messages rejected"),
            rate_limited: counter("streamer_gateway_rate_limited", "Messages over the rate limit"),
            slow_consumers: counter(
                "streamer_gateway_slow_consumers",
                "Connections of slow consumers closed with code 4408",
            ),
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
        }
    }
}
