//! State that the connections and APIs of the gateway share.

use std::sync::Arc;

use streamer_auth::{Audit, Authenticator};
use streamer_core::{Clock, OpenWatches};
use streamer_telemetry::Traces;

use crate::{
    connections::connection_registry::ConnectionRegistry, fanout::Fanout, metrics::GatewayMetrics,
    options::GatewayOptions, upstreams::Upstreams,
};

/// State shared by all connections.
pub(crate) struct Gateway {
    pub(crate) options: Arc<GatewayOptions>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) authenticator: Arc<Authenticator>,
    pub(crate) upstreams: Arc<Upstreams>,
    pub(crate) fanout: Arc<Fanout>,
    pub(crate) registry: Arc<ConnectionRegistry>,
    pub(crate) metrics: GatewayMetrics,
    pub(crate) audit: Audit,
    pub(crate) traces: Traces,
    pub(crate) open_watches: Arc<OpenWatches>,
}
