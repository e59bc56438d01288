//! The metrics of this service.

use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use streamer_telemetry::Metrics;

#[derive(Clone)]
pub(crate) struct GatewayMetrics {
    pub(crate) connections: Gauge,
    pub(crate) opened: Counter,
    pub(crate) refused: Counter,
    pub(crate) messages_in: Counter,
    pub(crate) bytes_in: Counter,
    pub(crate) bytes_out: Counter,
    pub(crate) invalid_messages: Counter,
    pub(crate) rate_limited: Counter,
    pub(crate) slow_consumers: Counter,
    pub(crate) buffered_bytes: Gauge,
    pub(crate) buffered_bytes_limit: Gauge,
    pub(crate) catch_ups: Counter,
    pub(crate) upstream_events: Counter,
    pub(crate) upstream_lost: Counter,
}

impl GatewayMetrics {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        let counter = |name, help| metrics.counter(name, help);
        Self {
            connections: metrics.gauge("streamer_gateway_connections", "Open WebSockets"),
            opened: counter("streamer_gateway_opened", "WebSockets that were let in"),
            refused: counter("streamer_gateway_refused", "WebSockets that were not let in"),
            messages_in: counter("streamer_gateway_messages_received", "Messages of clients"),
            bytes_in: counter("streamer_gateway_received_bytes", "Bytes read from sockets"),
            bytes_out: counter("streamer_gateway_sent_bytes", "Bytes queued for sockets"),
            invalid_messages: counter("streamer_gateway_invalid_messages", "Messages refused"),
            rate_limited: counter("streamer_gateway_rate_limited", "Messages over a rate limit"),
            slow_consumers: counter("streamer_gateway_slow_consumers", "Sockets closed with 4408"),
            buffered_bytes: metrics.gauge(
                "streamer_gateway_buffered_bytes",
                "Bytes of messages of clients that are not whole yet",
            ),
            buffered_bytes_limit: metrics.gauge(
                "streamer_gateway_buffered_bytes_limit",
                "Limit of streamer_gateway_buffered_bytes (gateway.max_buffered_bytes)",
            ),
            catch_ups: counter(
                "streamer_gateway_catch_ups",
                "Pages of a log read for connections that were behind",
            ),
            upstream_events: counter("streamer_gateway_upstream_events", "Events from upstream"),
            upstream_lost: counter(
                "streamer_gateway_upstream_lost",
                "Watches at progress services that broke off, or could not be opened",
            ),
        }
    }
}
