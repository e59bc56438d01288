//! Options of the gateway.

use std::time::Duration;

use streamer_core::is_loopback_host;

/// Gateway options.
#[derive(Clone, Debug)]
pub struct GatewayOptions {
    /// Origins whose pages may connect. An empty list allows only pages served from this machine; `*` allows all.
    pub allowed_origins: Vec<String>,
    /// Maximum number of connections.
    pub max_connections: usize,
    /// Maximum number of connections per user.
    pub max_connections_per_user: usize,
    /// Maximum number of connections per client address.
    pub max_connections_per_address: usize,
    /// Maximum number of subscriptions per connection.
    pub max_subscriptions: usize,
    /// Maximum number of pending calls per connection. The gateway does not read from a connection at the limit.
    pub max_in_flight_requests: usize,
    /// Maximum number of messages per second from one connection; 0 disables the limit.
    pub rate_limit: u32,
    /// Maximum number of messages that one connection may send in a burst above `rate_limit`.
    pub rate_limit_burst: u32,
    /// Maximum number of bytes buffered for incomplete client messages of all connections.
    pub max_buffered_bytes: usize,
    /// Maximum number of bytes buffered for incomplete messages of one user.
    pub max_buffered_bytes_per_user: usize,
    /// Maximum time from the start of a message to its end.
    pub message_timeout: Duration,
    /// Maximum size of a client message, in bytes.
    pub max_message_bytes: usize,
    /// Interval at which the gateway pings a silent client. The connection is dropped after twice the interval.
    pub heartbeat: Duration,
    /// Time after which a connection is closed if its pending output makes no progress.
    pub slow_consumer_timeout: Duration,
    /// Timeout for the closing handshake of a rejected connection.
    pub handshake_timeout: Duration,
    /// Maximum delay before a client reconnects after a drain.
    pub reconnect_after: Duration,
    /// Whether to log each connection, and each HTTP request of the process.
    pub access_log: bool,
}

impl GatewayOptions {
    /// Returns whether a page of the given origin may connect. If the list is empty, only pages served
    /// from this machine may connect.
    pub(crate) fn allows_origin(&self, origin: &str) -> bool {
        if self.allowed_origins.is_empty() {
            let host = origin.split_once("://").map_or(origin, |(_, rest)| rest);
            let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
            return is_loopback_host(name) || is_loopback_host(host);
        }
        self.allowed_origins.iter().any(|allowed| allowed == "*" || allowed == origin)
    }
}
