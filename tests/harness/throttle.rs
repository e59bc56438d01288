//! A DynamoDB proxy that rejects calls as throttled.

use std::sync::{
    Arc,
    atomic::{AtomicU8, AtomicU64, Ordering},
};

use axum::{extract::Request, response::Response};

use crate::dynamodb_proxy::{self, Handler, Upstream, exception};

/// Specifies the calls that are rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Throttling {
    /// No call.
    Off = 0,
    /// Every third call.
    EveryThird = 1,
    /// All calls.
    All = 2,
}

/// A running proxy.
pub struct Throttle {
    /// URL of the proxy.
    pub endpoint: String,
    state: Arc<Inner>,
}

struct Inner {
    upstream: Upstream,
    throttling: AtomicU8,
    calls: AtomicU64,
    rejected: AtomicU64,
}

impl Throttle {
    /// Starts a proxy of the endpoint `target`.
    pub async fn start(target: &str) -> Self {
        let state = Arc::new(Inner {
            upstream: Upstream::new(target),
            throttling: AtomicU8::new(Throttling::Off as u8),
            calls: AtomicU64::new(0),
            rejected: AtomicU64::new(0),
        });
        Self { endpoint: dynamodb_proxy::start(state.clone()).await, state }
    }

    /// Sets the calls that are rejected from now on.
    pub fn set(&self, throttling: Throttling) {
        self.state.throttling.store(throttling as u8, Ordering::SeqCst);
    }

    /// Returns the number of rejected calls.
    #[must_use]
    pub fn rejected(&self) -> u64 {
        self.state.rejected.load(Ordering::SeqCst)
    }
}

impl Handler for Inner {
    async fn handle(&self, request: Request) -> Response {
        let number = self.calls.fetch_add(1, Ordering::SeqCst);
        let is_rejected = match self.throttling.load(Ordering::SeqCst) {
            1 => number.is_multiple_of(3),
            2 => true,
            _ => false,
        };
        if is_rejected {
            self.rejected.fetch_add(1, Ordering::SeqCst);
            return exception("ProvisionedThroughputExceededException");
        }
        self.upstream.forward(request).await
    }
}
