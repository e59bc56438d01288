//! State of a connection apart from its socket. `calls.rs` starts calls with it, and `delivery.rs` advances its
//! subscriptions.

use std::sync::Arc;

use streamer_core::{CloseCode, RateLimiter, Uid, UserWatches};
use streamer_rpc::Peer;
use streamer_telemetry::TraceContext;
use tokio::time::Instant;

use super::{submission_order::SubmissionOrder, subscriptions::Subscriptions};
use crate::{
    access_log, buffer_budget::Reservation, connection_handle::ConnectionHandle, gateway::Gateway,
};

/// State of a connection apart from its socket.
pub(crate) struct Session {
    pub(super) gateway: Arc<Gateway>,
    pub(super) handle: Arc<ConnectionHandle>,
    pub(super) subscriptions: Subscriptions,
    /// Open watches of the user, across all its connections.
    pub(super) watches: Option<Arc<UserWatches>>,
    /// Identifiers of the requests with events to send, in order.
    pub(super) ready: Vec<Uid>,
    /// Number of pending log reads.
    pub(super) log_reads: usize,
    pub(super) rate: RateLimiter,
    pub(super) submission_order: SubmissionOrder,
    pub(super) consecutive_rejections: u32,
    opened_at: Instant,
    /// Code of the close frame that was sent or received first.
    pub(super) close_code: Option<CloseCode>,
    /// Reservation of bytes for an incomplete message.
    pub(super) reservation: Reservation,
    /// Keeps the connection counted as open in the server's connection limit.
    peer: Option<Peer>,
    /// Trace context of the handshake, for requests without a trace context.
    pub(super) trace: Option<Box<TraceContext>>,
}

impl Session {
    pub(super) fn new(
        gateway: Arc<Gateway>,
        handle: Arc<ConnectionHandle>,
        trace: Option<TraceContext>,
        peer: Option<Peer>,
    ) -> Self {
        let rate = RateLimiter::new(gateway.options.rate_limit, gateway.options.rate_limit_burst);
        Self {
            gateway,
            handle,
            subscriptions: Subscriptions::default(),
            watches: None,
            ready: Vec::new(),
            log_reads: 0,
            rate,
            submission_order: SubmissionOrder::default(),
            consecutive_rejections: 0,
            opened_at: Instant::now(),
            close_code: None,
            reservation: Reservation::default(),
            peer,
            trace: trace.map(Box::new),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        for subscription in self.subscriptions.values() {
            self.gateway.fanout.leave(&subscription.topic, self.handle.id);
        }
        let registry = &self.gateway.registry;
        if self.reservation.differs(0) {
            let released =
                registry.buffer_budget.update(&self.handle.owner(), &mut self.reservation, 0);
            debug_assert_eq!(released, Ok(()), "a smaller reservation never fails");
        }
        registry.remove(&self.handle);
        let duration = self.opened_at.elapsed();
        self.gateway.metrics.connection_closed(self.close_code, duration);
        access_log::closed(
            &self.gateway,
            &self.handle,
            self.peer.as_ref(),
            self.close_code,
            duration,
        );
    }
}
